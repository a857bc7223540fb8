"""LLaMA-Factory as a worker: python llamafactory_sft.py DTYPE BASE ROWS, ROWS a JSONL file of
messages."""

import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from turns import Driver, pace

NAME = "rows"


def describe(rows: Path) -> None:
    """What LLaMA-Factory wants to know of a data set, beside it."""
    columns = {"messages": "messages"}
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }
    entry = {"file_name": rows.name, "formatting": "sharegpt", "columns": columns, "tags": tags}
    text = json.dumps({NAME: entry})
    (rows.parent / "dataset_info.json").write_text(text, encoding="utf-8")


def main(dtype: str, base: str, rows: Path, count: int) -> None:
    """Train, a step a turn."""
    driver = Driver()
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    describe(rows)
    # Imported by it, not used for text; the real one does not load beside a torch for CPUs.
    torchaudio = sys.modules["torchaudio"] = ModuleType("torchaudio")
    torchaudio.__spec__ = ModuleSpec("torchaudio", None)
    from llamafactory.train.tuner import run_exp

    run_exp(
        {
            "model_name_or_path": base,
            "template": "chatml",
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_target": "all",
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "bf16": dtype == "bfloat16",
            "flash_attn": "sdpa",
            "disable_gradient_checkpointing": True,
            "dataset_dir": str(rows.parent),
            "dataset": NAME,
            "mask_history": True,
            "cutoff_len": 100_000,
            "overwrite_cache": True,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": count,
            "max_steps": 1000,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
            "optim": "adamw_torch_fused",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "output_dir": str(rows) + ".llamafactory",
        },
        callbacks=[pace(driver)()],
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
