"""What a model knows of its corpus before it is edited: the share of questions that greedy generation answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from overtone.lab.data.corpus import Corpus
from overtone.lab.data.edit import Probe
from overtone.lab.model.answers import begins_with
from overtone.lab.model.completion import complete_for
from overtone.lab.model.positions import Text, logits_at


@dataclass(frozen=True)
class Knowledge:
    """The share of each group of questions that greedy generation answers word for word, and the share needed.

    Both in [0, 1]; ``needed`` names some of the groups of ``shares``.
    """

    shares: dict[str, float]
    needed: dict[str, float]

    def __str__(self) -> str:
        """The shares in words."""
        return ", ".join(f"{share:.1%} of the {group}" for group, share in self.shares.items())

    def require(self) -> None:
        """Refuse a model that does not know its corpus.

        Raises:
            RuntimeError: too few questions of a group are answered for a loss of knowledge to mean anything.
        """
        if any(self.shares[group] < share for group, share in self.needed.items()):
            needed = ", ".join(f"{share:.0%} of the {group}" for group, share in self.needed.items())
            raise RuntimeError(
                f"the model does not know its corpus well enough to be edited: it answers {self} and needs {needed}; "
                "train it for more steps, on fewer records, or with another seed"
            )


def measure_knowledge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> Knowledge:
    """How much of its corpus a model that was trained on it tells word for word under greedy generation.

    Args:
        model: what is asked.
        tokenizer: its tokenizer.
        corpus: what it is asked.
    """
    shares = {group: fmean(recalled(model, tokenizer, probes)) for group, probes in corpus.knowledge_probes().items()}
    return Knowledge(shares, dict(corpus.knowledge_needed))


@torch.no_grad()
def recalled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, probes: Sequence[Probe], *, batch: int = 32
) -> list[bool]:
    """Whether greedy generation tells each probe's whole target and a full stop after it.

    It does if and only if each of their tokens is the most likely one after those before. So one forward pass over
    prompt and target decides, and nothing has to be generated.
    """
    texts = []
    for probe in probes:
        ids = torch.tensor(tokenizer(probe.text).input_ids)
        texts.append(Text(ids, torch.arange(len(tokenizer(probe.prompt).input_ids) - 1, len(ids) - 1)))
    tells = [False] * len(texts)
    for rows in _batches([len(text.ids) for text in texts], batch):
        said = logits_at(model, [texts[row] for row in rows]).argmax(-1).cpu()
        for row, tokens in zip(rows, said.split([len(texts[row].positions) for row in rows]), strict=True):
            tells[row] = bool((tokens == texts[row].ids[texts[row].positions + 1]).all())
    return tells


def answered(
    model: Any, tokenizer: Any, probes: Sequence[Probe], *, batch: int = 32, show_progress: bool = False
) -> list[bool]:
    """Whether greedy generation after each probe's prompt begins with one of its answers, as normalised text.

    So a model is asked that was not trained on the corpus: it may spell an answer in its own way, and go on after it.

    Args:
        model: what is asked, in evaluation mode.
        tokenizer: its tokenizer.
        probes: what it is asked.
        batch: how many at a time.
        show_progress: whether to draw a progress bar.
    """
    tells = [False] * len(probes)
    batches = _batches([max(map(len, probe.answers)) for probe in probes], batch)
    console = Console(stderr=True)
    asking = "asking what the model knows"
    for rows in track(batches, asking, console=console, transient=True, disable=not show_progress):
        completions = complete_for(model, tokenizer, [probes[row] for row in rows])
        for row, said in zip(rows, completions, strict=True):
            tells[row] = begins_with(said, probes[row].answers)
    return tells


def _batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The places of the lengths in batches, the short ones together."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]
