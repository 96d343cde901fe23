"""Probes of many edited models in padded passes, with logits only where something is measured.

Rel, Gen, Por and Loc are those of `overtone.lab.score.scores`. Beside them stands the share of answers that greedy
generation would begin with. That needs no generation: it does so exactly where every token of the answer is the argmax
given the true tokens before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overtone.lab.data.edit import Edit, Probe
from overtone.lab.edit.many import OpenedWeights, target_texts
from overtone.lab.model.answers import normalised
from overtone.lab.model.positions import Capture, Text, logits_at
from overtone.lab.model.targets import encode_targets
from overtone.lab.score.scores import Scores, by_kind, by_measure, kl_divergence, sequence_probability, what_to_ask


@dataclass(frozen=True)
class ProbeScore:
    """What an edited model makes of one probe.

    Attributes:
        measure: which of `MEASURES` the probe counts towards.
        kind: of the probe.
        accuracy: the share of target tokens that are the argmax, given the true tokens before them; for locality, the
            share of positions whose argmax is the unedited model's.
        begins: all of them are, so greedy generation begins with the target (for locality: agrees with the unedited
            model as far as the target goes).
        is_new_target: the probe's answer is the edit's own new target, as normalised text.
        kl: KL(unedited || edited) in nats, mean over the target tokens of a locality probe; None elsewhere.
    """

    measure: str
    kind: str
    accuracy: float
    begins: bool
    is_new_target: bool
    kl: float | None


@dataclass(frozen=True)
class EditScores:
    """One edit, scored.

    Attributes:
        probes: in the order of the exam.
        p_new: probability of the whole new target after the edited prompt.
        p_old: probability of the whole old target after the edited prompt; None where the edit names none.
    """

    probes: tuple[ProbeScore, ...]
    p_new: float
    p_old: float | None

    def accuracy(self, *, without_new_target: bool = False) -> dict[str, float]:
        """Measure to accuracy: the mean over its kinds of probes of the mean over a kind's probes.

        Args:
            without_new_target: leave out portability probes whose answer is the edit's own target, which a model that
                says the target everywhere gets right.
        """
        return self._means(lambda probe: probe.accuracy, without_new_target)

    def begins(self, *, without_new_target: bool = False) -> dict[str, float]:
        """Measure to the share of probes whose answer generation begins with, averaged in the same way."""
        return self._means(lambda probe: float(probe.begins), without_new_target)

    @property
    def kl(self) -> float | None:
        """KL on locality in nats, averaged in the same way; None without locality probes."""
        divergences = ((probe.measure, probe.kind, probe.kl) for probe in self.probes if probe.kl is not None)
        return by_measure(divergences).get("loc")

    def summary(self) -> Scores:
        """The scores as results have them; what needs a generation is empty."""
        return Scores(
            accuracy=self.accuracy(),
            accuracy_by_kind=by_kind((probe.measure, probe.kind, probe.accuracy) for probe in self.probes),
            exact_match={},
            p_new=self.p_new,
            p_old=self.p_old,
            kl=self.kl,
            begins=self.begins(),
            por_of_others=self.accuracy(without_new_target=True).get("por"),
        )

    def _means(self, value: Callable[[ProbeScore], float], without_new_target: bool) -> dict[str, float]:
        return by_measure(
            (probe.measure, probe.kind, value(probe))
            for probe in self.probes
            if not (without_new_target and probe.measure == "por" and probe.is_new_target)
        )


@dataclass(frozen=True)
class Exam:
    """An edit's probes, tokenised once, with what does not change from one edited model to the next.

    Attributes:
        probes: the edited prompt first, then generality, portability and locality.
        measures: which of `MEASURES` a probe counts towards.
        is_new_target: whether a probe's answer is the edit's own.
        texts: the probes' texts, and after them the edited prompt with the old target, where the edit names one.
        labels: the target tokens of each text.
        prepared: for each text, what the opened weights prepare.
        unedited: (M, D), the unedited model's inputs of the output layer at the M locality positions, which hold its
            predictions in a hundredth of the space of its logits.
    """

    probes: tuple[Probe, ...]
    measures: tuple[str, ...]
    is_new_target: tuple[bool, ...]
    texts: tuple[Text, ...]
    labels: tuple[Tensor, ...]
    prepared: tuple[Any, ...]
    unedited: Tensor

    @property
    def tokens(self) -> int:
        """Of its texts, padded to the longest."""
        return len(self.texts) * max(len(text.ids) for text in self.texts)


@torch.no_grad()
def examine_many(model: Any, tokenizer: Any, opened: OpenedWeights, edits: Iterable[Edit]) -> list[Exam]:
    """Tokenise the probes of edits and record what the unedited model makes of their locality probes.

    Args:
        model: the unedited model, in evaluation mode.
        tokenizer: its tokenizer.
        opened: the weights that will be edited.
        edits: what will be edited.
    """
    return [_examine(model, tokenizer, opened, edit) for edit in edits]


def _examine(model: Any, tokenizer: Any, opened: OpenedWeights, edit: Edit) -> Exam:
    probes, measures, pairs = what_to_ask(edit)
    batch = encode_targets(tokenizer, pairs, model.device)
    texts = tuple(target_texts(batch))
    kept = [text for text, measure in zip(texts, measures, strict=False) if measure == "loc"]
    capture = Capture()
    if kept:
        logits_at(model, kept, capture=capture)
    return Exam(
        probes=probes,
        measures=measures,
        is_new_target=tuple(normalised(probe.answer) == normalised(edit.target_new) for probe in probes),
        texts=texts,
        labels=batch.targets,
        prepared=tuple(opened.prepare(texts)),
        unedited=torch.cat(capture.hidden) if kept else torch.empty(0, model.config.hidden_size, device=model.device),
    )


@torch.no_grad()
def score_many(
    model: Any,
    opened: OpenedWeights,
    examined: Sequence[tuple[Exam, Tensor]],
    *,
    tokens_at_once: int = 2048,
) -> list[EditScores]:
    """Score edited weights, several edits in a pass.

    Args:
        model: the unedited model, in evaluation mode.
        opened: the weights that were edited.
        examined: (exam, weights) of each edit; the same exam may stand there with many weights.
        tokens_at_once: how many tokens, padding included, a pass has at most; an exam with more has one of its own.
    """
    scores: list[EditScores] = []
    for group in passes(examined, tokens_at_once):
        texts = [text for exam, _ in group for text in exam.texts]
        rows = [len(exam.texts) for exam, _ in group]
        prepared = [part for exam, _ in group for part in exam.prepared]
        unedited = torch.cat([exam.unedited for exam, _ in group])
        with opened.applied([weights for _, weights in group], rows, prepared):
            logits = logits_at(model, texts, further_hidden=unedited)
        parts = iter(logits.split([len(labels) for exam, _ in group for labels in exam.labels] + [len(unedited)]))
        own = [[next(parts) for _ in exam.texts] for exam, _ in group]
        kept = iter(next(parts).split([len(exam.unedited) for exam, _ in group]))
        scores += [_score(exam, forced, next(kept)) for (exam, _), forced in zip(group, own, strict=True)]
    return scores


def passes(examined: Sequence[tuple[Exam, Tensor]], tokens_at_once: int) -> Iterator[list[tuple[Exam, Tensor]]]:
    """Neighbours in groups, each as large as one pass may be (see `score_many`)."""
    group: list[tuple[Exam, Tensor]] = []
    for item in examined:
        rows = sum(len(exam.texts) for exam, _ in (*group, item))
        longest = max(len(text.ids) for exam, _ in (*group, item) for text in exam.texts)
        if group and rows * longest > tokens_at_once:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _score(exam: Exam, forced: Sequence[Tensor], unedited: Tensor) -> EditScores:
    own_unedited = iter(
        unedited.split([len(labels) for labels, m in zip(exam.labels, exam.measures, strict=False) if m == "loc"])
    )
    probes = []
    for row, (probe, measure) in enumerate(zip(exam.probes, exam.measures, strict=True)):
        divergence, wanted = None, exam.labels[row]
        if measure == "loc":
            before = next(own_unedited)
            wanted = before.argmax(dim=-1)
            divergence = kl_divergence(before.float().log_softmax(dim=-1), forced[row].float().log_softmax(dim=-1))
        hits = forced[row].argmax(dim=-1) == wanted
        probes.append(
            ProbeScore(
                measure, probe.kind, hits.float().mean().item(), bool(hits.all()), exam.is_new_target[row], divergence
            )
        )
    p_old = _probability(forced[-1], exam.labels[-1]) if len(forced) > len(probes) else None
    return EditScores(tuple(probes), _probability(forced[0], exam.labels[0]), p_old)


def _probability(logits: Tensor, labels: Tensor) -> float:
    return sequence_probability(logits.float().log_softmax(dim=-1), labels)
