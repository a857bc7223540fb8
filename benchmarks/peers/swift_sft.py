"""ms-swift as a worker: python swift_sft.py DTYPE BASE ROWS, ROWS a JSONL file of messages."""

import sys

from turns import Driver, pace


def main(dtype: str, base: str, rows: str, count: int) -> None:
    """Train, a step a turn."""
    driver = Driver()
    from swift import SftArguments, sft_main
    from swift.callbacks.mapping import callbacks_map

    made = pace(driver)
    callbacks_map["pace"] = lambda _args, _trainer: made()
    sft_main(
        SftArguments(
            model=base,
            model_type="llama",
            template="chatml",
            torch_dtype=dtype,
            bf16=dtype == "bfloat16",
            attn_impl="sdpa",
            dataset=[rows],
            split_dataset_ratio=0.0,
            loss_scale="last_round",
            max_length=100_000,
            tuner_type="lora",
            target_modules=["all-linear"],
            lora_rank=16,
            lora_alpha=32,
            lora_dropout=0.0,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=count,
            gradient_checkpointing=False,
            max_steps=1000,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            weight_decay=0.0,
            max_grad_norm=0.0,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            eval_strategy="no",
            report_to=["none"],
            use_cpu=True,
            dataloader_num_workers=0,
            callbacks=["pace"],
            output_dir=rows + ".swift",
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
