"""Fine-tune the lab's model on a few dozen long texts with each loss: what is learned, and what is lost on the way?

    python examples/finetune_comparison.py
    python examples/finetune_comparison.py --losses overtone "cross-entropy" --seeds 2 --out /tmp/finetune

Every loss gets the same texts, learning rate and epochs, by transformers' Trainer. Finished runs are kept in
OUT.jsonl, under a first line with the settings, so that an interrupted comparison goes on where it stopped; those of
the losses and sets that were asked for are written to OUT.csv, and their table is printed.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from facts import Lesson, lesson
from scipy import stats
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from overtone import OverToneConfig
from overtone.huggingface import TokenStatesCallback, compute_loss_func
from overtone.lab.data.edit import Probe
from overtone.lab.model.completion import complete, is_exact_match
from overtone.lab.model.targets import encode_targets
from overtone.lab.results.files import write_whole
from overtone.lab.score.scores import teacher_forced, token_agreement

TEXTS, EPOCHS, BATCH, LEARNING_RATE = 30, 30, 10, 5e-4
SETTINGS = {"texts": TEXTS, "epochs": EPOCHS, "batch": BATCH, "learning_rate": LEARNING_RATE}
BEFORE = "before"


@dataclass(frozen=True)
class Outcome:
    """One run. Accuracies are shares in [0, 1], the perplexity is per token."""

    loss: str
    seed: int
    learned: float = field(metadata={"title": "new texts, tokens"})
    rephrased: float = field(metadata={"title": "rephrased, exact"})
    reasoned: float = field(metadata={"title": "reasoning, exact"})
    perplexity: float = field(metadata={"title": "untouched knowledge, perplexity"})
    steps: int = field(metadata={"title": "steps"})


class StopBelow(TrainerCallback):  # type: ignore[misc]
    """The rival: cross-entropy that stops once the logged loss of an epoch is low enough."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and logs.get("loss", math.inf) < self.threshold:
            control.should_training_stop = True


def dft_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """Dynamic fine-tuning: cross-entropy, weighted by the probability that the token already has."""
    log_probs = outputs.logits[:, :-1].log_softmax(dim=-1)
    targets = labels[:, 1:]
    token_log_probs = log_probs.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)[targets != -100]
    loss: Tensor = -(token_log_probs.exp().detach() * token_log_probs).sum() / num_items_in_batch
    return loss


def overtone_held(hold: str | float) -> dict[str, Any]:
    """Stops once an epoch of batches has been held."""
    config = OverToneConfig(hold=hold)
    callback = TokenStatesCallback(config, stop_after_held=TEXTS // BATCH)
    return {"compute_loss_func": compute_loss_func(config, observer=callback.observe), "callbacks": [callback]}


LOSSES: dict[str, Callable[[], dict[str, Any]]] = {
    "cross-entropy": dict,
    "cross-entropy, stopped at 0.1": lambda: {"callbacks": [StopBelow(0.1)]},
    "cross-entropy, stopped at 0.02": lambda: {"callbacks": [StopBelow(0.02)]},
    "label smoothing 0.1": lambda: {"label_smoothing_factor": 0.1},
    "DFT": lambda: {"compute_loss_func": dft_loss},
    "OverTone": lambda: {"compute_loss_func": compute_loss_func()},
    "OverTone, held": lambda: overtone_held("settled"),
    "OverTone, held at a mean KL of 0.02": lambda: overtone_held(0.02),
}


def run(subject: Lesson, loss: str, seed: int) -> Outcome:
    """Train a copy of the model and examine it."""
    pupil = Lesson(copy.deepcopy(subject.model), subject.tokenizer, subject.edits)
    batch = encode_targets(pupil.tokenizer, [(edit.prompt, edit.target_new) for edit in pupil.edits])
    columns = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    settings = LOSSES[loss]()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=pupil.model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=BATCH,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                label_smoothing_factor=settings.pop("label_smoothing_factor", 0.0),
                logging_strategy="epoch",
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=[{name: values[row] for name, values in columns.items()} for row in range(len(pupil.edits))],
            **settings,
        )
        trainer.train()
    pupil.model.eval()
    return Outcome(loss, seed, *examine(pupil), steps=trainer.state.global_step)


def examine(pupil: Lesson) -> tuple[float, float, float, float]:
    """Tokens of the new texts, rephrased and reasoned answers, perplexity of what no edit touched."""
    new = encode_targets(pupil.tokenizer, [(edit.prompt, edit.target_new) for edit in pupil.edits])
    forced = teacher_forced(pupil.model, new)
    learned = fmean(token_agreement(rows, tokens) for rows, tokens in zip(forced, new.targets, strict=True))
    untouched = {(probe.prompt, probe.target) for edit in pupil.edits for probe in edit.locality}
    known = encode_targets(pupil.tokenizer, sorted(untouched))
    rows, tokens = torch.cat(teacher_forced(pupil.model, known)), torch.cat(known.targets)
    perplexity = torch.exp(-rows.gather(1, tokens.unsqueeze(1)).mean()).item()
    rephrased = exact(pupil, [probe for edit in pupil.edits for probe in edit.generality])
    reasoned = exact(pupil, [probe for edit in pupil.edits for probe in edit.portability])
    return learned, rephrased, reasoned, perplexity


def exact(pupil: Lesson, probes: list[Probe]) -> float:
    length = max(len(pupil.tokenizer(probe.target).input_ids) for probe in probes) + 2
    said = complete(pupil.model, pupil.tokenizer, [probe.prompt for probe in probes], length)
    return fmean(is_exact_match(text, probe) for text, probe in zip(said, probes, strict=True))


def table(outcomes: list[Outcome]) -> str:
    """A row for each loss: the mean over seeds and its 95% t-interval; perplexities geometrically, accuracies in %."""
    measures = [name for name in Outcome.__dataclass_fields__ if name not in ("loss", "seed")]
    titles = [Outcome.__dataclass_fields__[name].metadata["title"] for name in measures]
    lines = [f"| loss | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for loss in dict.fromkeys(outcome.loss for outcome in outcomes):
        cells = []
        for name in measures:
            values = [getattr(outcome, name) for outcome in outcomes if outcome.loss == loss]
            cells.append(cell(name, values))
        lines.append(f"| {loss} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(name: str, values: list[float]) -> str:
    if name == "perplexity":
        mean, low, high = (math.exp(bound) for bound in interval([math.log(value) for value in values]))
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    mean, low, high = interval(values)
    if name == "steps":
        return f"{mean:.0f}"
    return f"{100 * mean:.1f} [{100 * max(low, 0):.1f}, {100 * min(high, 1):.1f}]"


def interval(values: list[float]) -> tuple[float, float, float]:
    mean = fmean(values)
    if len(values) == 1 or min(values) == max(values):
        return mean, mean, mean
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=stats.sem(values))
    return mean, low, high


def read_outcomes(path: Path) -> list[Outcome]:
    """The finished runs; a ValueError if they are those of other settings."""
    if not path.exists():
        return []
    settings, *outcomes = map(json.loads, path.read_text().splitlines())
    if settings != SETTINGS:
        raise ValueError(
            f"{path} holds runs with {settings}, not {SETTINGS}: choose another --out, or remove this file"
        )
    return [Outcome(**outcome) for outcome in outcomes]


def write_outcomes(path: Path, outcomes: list[Outcome]) -> None:
    lines = [SETTINGS, *map(asdict, outcomes)]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS")
    arguments.add_argument("--seeds", type=int, default=8, help="sets of texts")
    arguments.add_argument("--out", type=Path, default=Path("finetune-out/finetune"))
    options = arguments.parse_args()
    records = options.out.with_suffix(".jsonl")
    records.parent.mkdir(parents=True, exist_ok=True)
    try:
        outcomes = read_outcomes(records)
    except ValueError as error:
        arguments.error(str(error))
    losses = [BEFORE, *options.losses]
    for seed in range(options.seeds):
        done = {outcome.loss for outcome in outcomes if outcome.seed == seed}
        left = [loss for loss in losses if loss not in done]
        if not left:
            continue
        subject = lesson(None, count=TEXTS, target="long", seed=seed)
        for loss in left:
            outcome = Outcome(BEFORE, seed, *examine(subject), steps=0) if loss == BEFORE else run(subject, loss, seed)
            outcomes.append(outcome)
            write_outcomes(records, outcomes)
    asked = [
        outcome for loss in losses for outcome in outcomes if outcome.loss == loss and outcome.seed < options.seeds
    ]
    with options.out.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Outcome.__dataclass_fields__, *map(astuple, asked)])
    print(table(asked))


if __name__ == "__main__":
    main()
