"""Edit one fact with a LoRA adapter: attach the loss to the PEFT model, train until the step is held, save.

    python examples/peft_lora_edit.py
    python examples/peft_lora_edit.py --model Qwen/Qwen2.5-0.5B --learning-rate 5e-4

The first edits a fact of the lab's world, the second the capital of a country.
"""

from __future__ import annotations

import torch
from facts import CAPITALS, answers, judged, lesson, parser, show
from peft import LoraConfig, get_peft_model

from overtone import OverToneConfig
from overtone.huggingface import attach
from overtone.lab.model.targets import encode_targets


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--edit",
        type=int,
        default=0,
        help="which of the lab's first ten edits, or of three capitals for another --model",
    )
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--learning-rate", type=float, default=5e-3)
    arguments.add_argument("--save", help="folder for the adapter")
    options = arguments.parse_args()
    count = 10 if options.model is None else len(CAPITALS)
    if not 0 <= options.edit < count:
        arguments.error(f"argument --edit: must lie in [0, {count}), got {options.edit}")
    torch.manual_seed(options.seed)
    subject = lesson(options.model, count=count, target="short")
    edit = subject.edits[options.edit]
    probes = judged(edit)
    before = answers(subject, probes)

    subject.model = get_peft_model(subject.model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32))
    batch = encode_targets(subject.tokenizer, [(edit.prompt, edit.target_new)], subject.model.device)
    trained = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    with attach(subject.model, OverToneConfig.preset("lora", hold="settled")):
        for step in range(options.steps):
            optimizer.zero_grad()
            loss = subject.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
            ).loss
            loss.backward()
            if all(parameter.grad is None for parameter in trained):
                print(f"held after {step} steps at a loss of {loss.item():.3f}: every token is learned, nothing moves")
                break
            optimizer.step()
    if options.save:
        subject.model.save_pretrained(options.save)
    show(f"{edit.prompt}{edit.target_old} -> {edit.target_new}", probes, before, answers(subject, probes))


if __name__ == "__main__":
    main()
