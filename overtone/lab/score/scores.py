"""How good an edit is: teacher-forced token accuracy as EasyEdit computes it, and what the model says on its own.

Rel, Gen, Por and Loc follow EasyEdit's `test_prediction_acc` and locality comparison: the share of target tokens that
are the argmax given the true tokens before them, and for locality the share of positions at which the edited model's
argmax is the unedited model's. A measure is the mean over its kinds of probes, a kind the mean over its probes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from overtone.lab.data.edit import Edit, Probe
from overtone.lab.model.completion import complete
from overtone.lab.model.targets import TargetBatch, encode_targets, target_logits
from overtone.lab.score.exact import Wanted, is_plain, says, want

MEASURES = ("rel", "gen", "por", "loc")
"""Reliability (the edited prompt), generality (rephrased), portability (reasoning from it), locality (all else)."""

ProbeValue = tuple[str, str, float]
"""What is measured on one probe: which of `MEASURES` it counts towards, the probe's kind, and the value."""


@dataclass(frozen=True)
class Scores:
    """One edit, scored. Accuracies lie in [0, 1].

    Attributes:
        accuracy: measure to teacher-forced token accuracy (locality: token agreement with the unedited model).
        accuracy_by_kind: "measure.kind" to the same, for every kind of probe.
        exact_match: measure to the share of probes that free-running greedy generation answers exactly (locality: that
            it completes as the unedited model does).
        p_new: probability of the whole new target after the edited prompt.
        p_old: probability of the whole old target after the edited prompt; None where the edit names none.
        kl: KL(unedited || edited) of next-token distributions in nats, mean over the target tokens of a locality
            probe, over a kind's probes, over kinds; None without locality probes, and in results where it is not
            finite.
        begins: measure to the share of probes whose answer greedy generation begins with, token for token (locality:
            that it agrees with the unedited model as far as the answer goes).
        said: measure to the share of probes whose answer, or an alias of it, greedy generation begins with as
            normalised text; empty where nothing was generated for it. Locality is not asked.
        por_of_others: portability without the probes whose answer is the edit's own target, which a model that says
            the target everywhere gets right; None where none is left.

    A measure or kind without probes is left out of its dictionary.
    """

    accuracy: dict[str, float]
    accuracy_by_kind: dict[str, float]
    exact_match: dict[str, float]
    p_new: float
    p_old: float | None
    kl: float | None
    begins: dict[str, float] = field(default_factory=dict)
    said: dict[str, float] = field(default_factory=dict)
    por_of_others: float | None = None


@dataclass(frozen=True)
class Examination:
    """An edit's probes, tokenised once, and what the unedited model makes of them.

    Build it with `examine` while the model is unedited; `score` then holds an edited model against it.

    Attributes:
        probes: the edited prompt first, then generality, portability and locality.
        measures: which of `MEASURES` a probe counts towards.
        batch: the probes' texts, and after them the edited prompt with the old target, where there is one.
        unedited: the unedited model's log-probabilities (N, V) at the N target tokens of every text.
        max_new_tokens: how far completions go.
        wanted: what an edited model should say after every probe's prompt.
    """

    probes: tuple[Probe, ...]
    measures: tuple[str, ...]
    batch: TargetBatch
    unedited: tuple[Tensor, ...]
    max_new_tokens: int
    wanted: tuple[Wanted, ...]


def what_to_ask(edit: Edit) -> tuple[tuple[Probe, ...], tuple[str, ...], list[tuple[str, str]]]:
    """The probes of an edit, the measure that each counts towards, and (prompt, target) of each text.

    The edited prompt is the first probe; with the old target, where the edit names one, it is also the last text.
    """
    rewrite = Probe(edit.prompt, edit.target_new, "rewrite", edit.target_new.strip())
    groups = ((rewrite,), edit.generality, edit.portability, edit.locality)
    probes = tuple(probe for group in groups for probe in group)
    measures = tuple(measure for measure, group in zip(MEASURES, groups, strict=True) for _ in group)
    pairs = [(probe.prompt, probe.target) for probe in probes]
    if edit.target_old:
        pairs.append((edit.prompt, edit.target_old))
    return probes, measures, pairs


def examine(model: Any, tokenizer: Any, edit: Edit) -> Examination:
    """Tokenise the probes of an edit and record the unedited model's predictions and completions.

    Args:
        model: the unedited model, in evaluation mode.
        tokenizer: its tokenizer.
        edit: what will be edited; the edited prompt is the first probe.
    """
    probes, measures, pairs = what_to_ask(edit)
    batch = encode_targets(tokenizer, pairs, model.device)
    # Room for the closing full stop and the end-of-sequence token: an answer that runs on is not an exact match.
    max_new_tokens = max(map(len, batch.targets)) + 2
    completions = complete(model, tokenizer, [probe.prompt for probe in probes], max_new_tokens)
    return Examination(
        probes=probes,
        measures=measures,
        batch=batch,
        unedited=teacher_forced(model, batch),
        max_new_tokens=max_new_tokens,
        wanted=tuple(
            want(tokenizer, probe.prompt, said, max_new_tokens)
            if measure == "loc"
            else want(tokenizer, probe.prompt, f"{probe.target.strip().rstrip('.')}.", max_new_tokens, probe)
            for probe, measure, said in zip(probes, measures, completions, strict=True)
        ),
    )


def score(model: Any, tokenizer: Any, examination: Examination, *, in_one_pass: bool = False) -> Scores:
    """Score an edited model: one teacher-forced pass, and what it says on its own after all probes of the edit.

    Args:
        model: the edited model, in evaluation mode.
        tokenizer: its tokenizer.
        examination: made by `examine` from the unedited model.
        in_one_pass: find most of what it says in one pass instead of generating it (`overtone.lab.score.exact`), with
            the same result where a prediction depends on nothing but the tokens before it. A method that treats the end
            of the prompt in its own way must generate.
    """
    forced, targets = teacher_forced(model, examination.batch), examination.batch.targets
    wanted, max_new_tokens = examination.wanted, examination.max_new_tokens
    if in_one_pass and is_plain(model):
        is_right = says(model, tokenizer, wanted, max_new_tokens)
    else:
        completions = complete(model, tokenizer, [one.prompt for one in wanted], max_new_tokens)
        is_right = [one.is_met(said) for one, said in zip(wanted, completions, strict=True)]
    accuracy: list[ProbeValue] = []
    exact_match: list[ProbeValue] = []
    divergence: list[ProbeValue] = []
    for row, (probe, measure) in enumerate(zip(examination.probes, examination.measures, strict=True)):
        log_probs, unedited = forced[row], examination.unedited[row]
        if measure == "loc":
            accuracy.append((measure, probe.kind, token_agreement(log_probs, unedited.argmax(dim=-1))))
            divergence.append((measure, probe.kind, kl_divergence(unedited, log_probs)))
        else:
            accuracy.append((measure, probe.kind, token_agreement(log_probs, targets[row])))
        exact_match.append((measure, probe.kind, float(is_right[row])))
    return Scores(
        accuracy=by_measure(accuracy),
        accuracy_by_kind=by_kind(accuracy),
        exact_match=by_measure(exact_match),
        p_new=sequence_probability(forced[0], targets[0]),
        p_old=sequence_probability(forced[-1], targets[-1]) if len(targets) > len(examination.probes) else None,
        kl=by_measure(divergence).get("loc"),
    )


@torch.no_grad()
def teacher_forced(model: Any, batch: TargetBatch) -> tuple[Tensor, ...]:
    """Log-probabilities (N, V) at the N target tokens of every text, given the true tokens before them."""
    logits, _ = target_logits(model, batch)
    lengths = [len(target) for target in batch.targets]
    log_probs: tuple[Tensor, ...] = logits.float().log_softmax(dim=-1).split(lengths)
    return log_probs


def token_agreement(log_probs: Tensor, tokens: Tensor) -> float:
    """The share of rows of (N, V) whose argmax is the token (N,)."""
    return (log_probs.argmax(dim=-1) == tokens).float().mean().item()


def sequence_probability(log_probs: Tensor, labels: Tensor) -> float:
    """The probability of labels (N,) in a row under log-probabilities (N, V)."""
    return log_probs.gather(1, labels[:, None]).sum().exp().item()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p || q) in nats, averaged over the rows of two tensors of log-probabilities (N, V)."""
    # A token that p rules out adds nothing, also where q rules it out too (0 * (-inf + inf) would be NaN).
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(dim=-1).mean().item()


def by_kind(values: Iterable[ProbeValue]) -> dict[str, float]:
    """ "measure.kind" to the mean over its probes."""
    kinds: dict[str, list[float]] = {}
    for measure, kind, value in values:
        kinds.setdefault(f"{measure}.{kind}", []).append(value)
    return {name: fmean(of_kind) for name, of_kind in kinds.items()}


def by_measure(values: Iterable[ProbeValue]) -> dict[str, float]:
    """Measure to the mean over its kinds of the mean over a kind's probes."""
    measures: dict[str, list[float]] = {}
    for name, mean in by_kind(values).items():
        measures.setdefault(name.partition(".")[0], []).append(mean)
    return {measure: fmean(means) for measure, means in measures.items()}
