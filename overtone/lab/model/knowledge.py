"""What a model knows of its corpus before it is edited: the share of questions that greedy generation answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from overtone.lab.data.corpus import Corpus
from overtone.lab.data.edit import Probe
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


def measure_knowledge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, *, ends_with_answer: bool = True
) -> Knowledge:
    """How much of its corpus a model tells word for word under greedy generation.

    Args:
        model: what is asked.
        tokenizer: its tokenizer.
        corpus: what it is asked.
        ends_with_answer: the full stop after the answer counts. A model that was not trained on the corpus may go on.
    """
    shares = {
        group: share_recalled(model, tokenizer, probes, ends_with_answer=ends_with_answer)
        for group, probes in corpus.knowledge_probes().items()
    }
    return Knowledge(shares, dict(corpus.knowledge_needed))


def share_recalled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    probes: Sequence[Probe],
    *,
    ends_with_answer: bool = True,
) -> float:
    """The share of probes that are `recalled`."""
    return fmean(recalled(model, tokenizer, probes, ends_with_answer=ends_with_answer))


@torch.no_grad()
def recalled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    probes: Sequence[Probe],
    *,
    ends_with_answer: bool = True,
    batch: int = 32,
) -> list[bool]:
    """Whether greedy generation tells each probe's whole target, and a full stop after it if that is asked for.

    It does if and only if each of their tokens is the most likely one after those before. So one forward pass over
    prompt and target decides, and nothing has to be generated.
    """
    texts = []
    for probe in probes:
        end = probe.target.rstrip(".") + "." if ends_with_answer else probe.target
        ids = torch.tensor(tokenizer(probe.prompt + end).input_ids)
        texts.append(Text(ids, torch.arange(len(tokenizer(probe.prompt).input_ids) - 1, len(ids) - 1)))
    order = sorted(range(len(texts)), key=lambda index: len(texts[index].ids))
    tells = [False] * len(texts)
    for start in range(0, len(texts), batch):
        rows = order[start : start + batch]
        said = logits_at(model, [texts[row] for row in rows]).argmax(-1).cpu()
        for row, tokens in zip(rows, said.split([len(texts[row].positions) for row in rows]), strict=True):
            tells[row] = bool((tokens == texts[row].ids[texts[row].positions + 1]).all())
    return tells
