"""A weight for each token: forget one fact, or learn from one text only what is new in it.

`unlearn` trains a refusal in the place of one answer and, in the same batch, keeps the neighbours: their tokens count
only a little. `new-words` trains on a long text in which only a name is new: the words that the model expects anyway
count only a little, so that the text is not driven in for their sake.

    python examples/selective_loss.py unlearn
    python examples/selective_loss.py new-words
"""

from __future__ import annotations

from dataclasses import replace

import torch
from facts import Lesson, answers, judged, lesson, parser, show
from torch import Tensor

from overtone import OverToneConfig
from overtone.huggingface import attach
from overtone.lab.data.edit import Edit
from overtone.lab.model.targets import TargetBatch, encode_targets


def refusal(subject: Lesson, edit: Edit) -> tuple[Edit, TargetBatch, Tensor]:
    """The answer becomes a refusal with weight 1; the neighbours keep their answers with weight 0.1."""
    forgotten = replace(edit, target_new=" not known", generality=(), portability=())
    kept = [(probe.prompt, probe.target) for probe in edit.locality]
    batch = encode_targets(subject.tokenizer, [(edit.prompt, forgotten.target_new), *kept])
    weights = torch.full(batch.labels.shape, 0.1)
    weights[0] = 1
    return forgotten, batch, weights


def new_words(subject: Lesson, edit: Edit) -> tuple[Edit, TargetBatch, Tensor]:
    """Weight 1 where the model expects another token than the text's, 0.1 where there is nothing to learn."""
    batch = encode_targets(subject.tokenizer, [(edit.prompt, edit.target_new)])
    with torch.no_grad():
        expected = subject.model(input_ids=batch.input_ids).logits.argmax(dim=-1)
    weights = torch.full(batch.labels.shape, 0.1)
    weights[:, 1:][expected[:, :-1] != batch.input_ids[:, 1:]] = 1
    return edit, batch, weights


EXAMPLES = {"unlearn": (refusal, "short"), "new-words": (new_words, "long")}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("example", choices=EXAMPLES)
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--learning-rate", type=float, default=3e-4)
    options = arguments.parse_args()
    prepare, target = EXAMPLES[options.example]
    subject = lesson(options.model, count=2, target=target, seed=options.seed)
    edit, batch, loss_mask = prepare(subject, subject.edits[-1])
    probes = judged(edit)
    before = answers(subject, probes)

    optimizer = torch.optim.AdamW(subject.model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    with attach(subject.model, OverToneConfig(hold="settled")):
        for step in range(options.steps):
            optimizer.zero_grad()
            loss = subject.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                labels=batch.labels,
                loss_mask=loss_mask,
            ).loss
            loss.backward()
            if all(parameter.grad is None for parameter in subject.model.parameters()):
                print(f"held after {step} steps")
                break
            optimizer.step()
    targets = batch.labels != -100
    title = f"{options.example}: {int((loss_mask[targets] == 1).sum())} of {int(targets.sum())} tokens count in full"
    show(title, probes, before, answers(subject, probes))


if __name__ == "__main__":
    main()
