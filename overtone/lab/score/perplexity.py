"""Perplexity, the yardstick of what a model can do beyond the facts that an edit's own probes ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from overtone.lab.model.targets import IGNORE_INDEX


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], *, batch: int = 32) -> float:
    """exp of the mean negative log-likelihood in nats of every token but the first of each text; inf if that overflows.

    Args:
        model: a Hugging Face causal language model, in evaluation mode.
        tokenizer: its tokenizer, with a pad token.
        texts: read one by one, each from its beginning.
        batch: texts at once.

    Raises:
        ValueError: no text has a second token.
    """
    rows = sorted((tokenizer(text).input_ids for text in texts), key=len)
    tokens = sum(max(0, len(row) - 1) for row in rows)
    if not tokens:
        raise ValueError(f"texts are {len(rows)} without a token that another precedes: nothing to predict")
    nats = 0.0
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        width = len(chunk[-1])
        if width < 2:
            continue
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in chunk])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chunk])
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = ids.masked_fill(mask == 0, IGNORE_INDEX)[:, 1:]
        nats += F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        ).item()
    try:
        return math.exp(nats / tokens)
    except OverflowError:
        return math.inf
