"""Fine-tune on a few short texts with transformers' Trainer: the loss as a function, the token states in its logs.

    python examples/trainer_finetune.py
    python examples/trainer_finetune.py --model Qwen/Qwen2.5-0.5B --learning-rate 2e-5

The first teaches texts of the lab's world, the second three capitals.
"""

from __future__ import annotations

import tempfile

from facts import answers, judged, lesson, parser, show
from transformers import Trainer, TrainingArguments

from overtone import OverToneConfig
from overtone.huggingface import TokenStatesCallback, compute_loss_func
from overtone.lab.model.targets import encode_targets


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--texts", type=int, default=8)
    arguments.add_argument("--epochs", type=int, default=40, help="at most: training stops when all texts are held")
    arguments.add_argument("--learning-rate", type=float, default=5e-4)
    options = arguments.parse_args()
    subject = lesson(options.model, count=options.texts, target="long", seed=options.seed)
    probes = [probe for edit in subject.edits[:2] for probe in judged(edit)[:4]]
    before = answers(subject, probes)

    batch = encode_targets(subject.tokenizer, [(edit.prompt, edit.target_new) for edit in subject.edits])
    columns = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    rows = [{name: values[row] for name, values in columns.items()} for row in range(len(subject.edits))]
    config = OverToneConfig(epsilon=0.05, hold="settled")
    callback = TokenStatesCallback(config, stop_after_held=2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=subject.model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=max(1, len(rows) // 4),
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant",
                logging_steps=5,
                save_strategy="no",
                report_to="none",
                dataloader_pin_memory=False,
                disable_tqdm=True,
                seed=options.seed,
            ),
            train_dataset=rows,
            compute_loss_func=compute_loss_func(config, observer=callback.observe),
            callbacks=[callback],
        )
        trainer.train()
    print(f"stopped after {trainer.state.global_step} of {trainer.state.max_steps} steps")
    subject.model.eval()
    show(f"{len(rows)} texts", probes, before, answers(subject, probes))


if __name__ == "__main__":
    main()
