"""What a model knows of its corpus before it is edited: the share of questions that greedy generation answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from overtone.lab.data.corpus import Corpus
from overtone.lab.data.edit import Probe


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
    """How much of its corpus a model tells word for word, up to the full stop, under greedy generation."""
    return Knowledge(
        {group: share_recalled(model, tokenizer, probes) for group, probes in corpus.knowledge_probes().items()},
        dict(corpus.knowledge_needed),
    )


@torch.no_grad()
def share_recalled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, probes: Sequence[Probe], batch: int = 128
) -> float:
    """The share of probes whose whole target and full stop greedy generation tells.

    It does if and only if each of their tokens is the most likely one after those before. So one forward pass over
    prompt and target decides, and nothing has to be generated.
    """
    rows = []
    for probe in probes:
        prompt = tokenizer(probe.prompt).input_ids
        rows.append((len(prompt), tokenizer(probe.prompt + probe.target.rstrip(".") + ".").input_ids))
    rows.sort(key=lambda row: len(row[1]))
    recalled = 0
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        width = len(chunk[-1][1])
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for _, row in chunk])
        ids = ids.to(model.device)
        logits = model(ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits
        hits = logits[:, :-1].argmax(-1) == ids[:, 1:]
        recalled += sum(
            bool(hit[begin - 1 : len(row) - 1].all()) for hit, (begin, row) in zip(hits, chunk, strict=True)
        )
    return recalled / len(rows)
