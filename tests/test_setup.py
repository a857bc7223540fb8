"""What `auto` comes to where the fastest back end does not run."""

import logging

import pytest

from stemtune import setup
from stemtune.setup import checked_backend
from tests.models import tiny_model, with_lora
from tests.tree.test_attention import random_sequences


def test_a_gpu_that_lacks_the_fastest_back_end_still_shares(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """FlashAttention takes a newer GPU than training does; here it takes a GPU at all."""
    monkeypatch.setattr(setup, "choose_backend", lambda *_: "varlen")
    model, sequences = with_lora(tiny_model("llama")), random_sequences(stem=30, branch=9)
    with caplog.at_level(logging.INFO):
        assert checked_backend(model, "auto", sequences) == "segments"
    assert "the tree is not exact on this model, by varlen" in caplog.text


def test_what_was_asked_for_is_not_replaced(caplog: pytest.LogCaptureFixture) -> None:
    model, sequences = with_lora(tiny_model("llama")), random_sequences(stem=30, branch=9)
    assert checked_backend(model, "varlen", sequences) == "padded"
    assert "training runs padded, nothing is shared" in caplog.text
