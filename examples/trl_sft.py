"""Supervised fine-tuning with TRL: SFTTrainer with the loss as a function, on a LoRA adapter.

SFTTrainer computes its own loss past the model's loss_function, so the loss goes in as compute_loss_func, with the
default loss_type="nll", no Liger kernels and no label smoothing; prompts do not count (completion_only_loss).

    python examples/trl_sft.py
    python examples/trl_sft.py --model Qwen/Qwen2.5-0.5B --learning-rate 2e-4
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from facts import answers, judged, lesson, parser, show
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from overtone import OverToneConfig
from overtone.huggingface import TokenStatesCallback, compute_loss_func


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--texts", type=int, default=8)
    arguments.add_argument("--epochs", type=int, default=40, help="at most: training stops when all texts are held")
    arguments.add_argument("--learning-rate", type=float, default=5e-3)
    options = arguments.parse_args()
    subject = lesson(options.model, count=options.texts, target="long", seed=options.seed)
    probes = [probe for edit in subject.edits[:2] for probe in judged(edit)[:4]]
    before = answers(subject, probes)

    rows = [{"prompt": edit.prompt, "completion": edit.target_new} for edit in subject.edits]
    config = OverToneConfig(epsilon=0.05, hold="settled")
    callback = TokenStatesCallback(config, stop_after_held=2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=subject.model,
            args=SFTConfig(
                output_dir=folder,
                loss_type="nll",
                completion_only_loss=True,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=len(rows),
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant",
                logging_steps=5,
                bf16=False,
                dataloader_pin_memory=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=options.seed,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=subject.tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32),
            compute_loss_func=compute_loss_func(config, observer=callback.observe),
            callbacks=[callback],
        )
        trainer.train()
    print(f"stopped after {trainer.state.global_step} of {trainer.state.max_steps} steps")
    subject.model = trainer.model.eval()
    show(f"{len(rows)} texts", probes, before, answers(subject, probes))


if __name__ == "__main__":
    main()
