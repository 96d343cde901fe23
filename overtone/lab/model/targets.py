"""Prompts with targets as padded tensors, and a causal language model's logits at the target tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class TargetBatch:
    """B texts of prompt + target, right-padded to T tokens.

    Attributes:
        input_ids: token ids, (B, T).
        attention_mask: 1 at tokens, 0 at padding, (B, T).
        labels: the token ids at the target tokens and -100 everywhere else, (B, T).
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def targets(self) -> tuple[Tensor, ...]:
        """The target tokens of each text."""
        is_target = self.labels != IGNORE_INDEX
        targets: tuple[Tensor, ...] = self.labels[is_target].split(is_target.sum(dim=1).tolist())
        return targets


def encode_targets(tokenizer: Any, pairs: Sequence[tuple[str, str]], device: torch.device | str = "cpu") -> TargetBatch:
    """Tokenise (prompt, target) pairs; the target tokens are those that the prompt alone does not have.

    Args:
        tokenizer: a Hugging Face tokenizer with a pad token.
        pairs: (prompt, target); the text is prompt + target, so a target begins with its own space.
        device: where the tensors go.

    Raises:
        ValueError: no pairs; a target that adds no token, or that changes how the prompt is tokenised (its first token
            would then hold a piece of the prompt).
    """
    if not pairs:
        raise ValueError("pairs is empty: nothing to encode")
    texts = [tokenizer(prompt + target).input_ids for prompt, target in pairs]
    prompts = [tokenizer(prompt).input_ids for prompt, _ in pairs]
    length = max(map(len, texts))
    input_ids = torch.full((len(pairs), length), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, (pair, text, prompt) in enumerate(zip(pairs, texts, prompts, strict=True)):
        if len(text) <= len(prompt) or text[: len(prompt)] != prompt:
            raise ValueError(
                f"target {pair[1]!r} does not continue prompt {pair[0]!r} token by token: "
                "begin the target with a space and end the prompt without one"
            )
        tokens = torch.tensor(text)
        input_ids[row, : len(text)] = tokens
        attention_mask[row, : len(text)] = 1
        labels[row, len(prompt) : len(text)] = tokens[len(prompt) :]
    return TargetBatch(input_ids.to(device), attention_mask.to(device), labels.to(device))


def target_logits(model: Any, batch: TargetBatch) -> tuple[Tensor, Tensor]:
    """The logits that predict the target tokens, and these tokens, text after text.

    Only positions from the first target token of any text on go through the output layer, so an edit with a long
    prompt never makes the prompt's logits.

    Args:
        model: a Hugging Face causal language model.
        batch: N target tokens in all.

    Returns:
        Logits (N, V) and labels (N,).
    """
    is_target = batch.labels != IGNORE_INDEX
    first = int(is_target.any(dim=0).int().argmax())
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=batch.input_ids.shape[1] - first + 1,
        use_cache=False,
    ).logits
    # The logits at one position predict the token at the next: the last one predicts nothing that we have.
    return logits[:, :-1][is_target[:, first:]], batch.labels[is_target]
