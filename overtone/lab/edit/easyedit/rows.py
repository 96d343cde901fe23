"""A model whose layers decide once for a whole batch, made to decide for each text.

WISE averages over the batch, padding included, before it chooses a weight; MELO looks at the last position, which in a
padded batch may be padding. EasyEdit scores text by text. So does this wrapper, behind the interface of a model.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class RowByRow:
    """Runs a Hugging Face causal language model on one unpadded text at a time."""

    def __init__(self, model: Any) -> None:
        """Wrap a model."""
        self._model = model

    def __getattr__(self, name: str) -> Any:
        """Everything but calls and generation is the model's own."""
        return getattr(self._model, name)

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0, **kwargs: Any
    ) -> SimpleNamespace:
        """Logits ``(B, T or logits_to_keep, V)``, 0 at padding, as the attribute ``logits``."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits: Tensor | None = None
        for row, (ids, is_token) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            said = self._model(input_ids=ids[is_token][None], **kwargs).logits[0]
            if logits is None:
                logits = said.new_zeros(*input_ids.shape, said.shape[-1])
            logits[row, is_token] = said
        assert logits is not None
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, pad_token_id: int, **kwargs: Any
    ) -> Tensor:
        """The texts ``(B, T)`` with what the model says after each, padded on the right to the longest."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        said = []
        for ids, is_token in zip(input_ids, mask.bool(), strict=True):
            prompt = ids[is_token][None]
            text = self._model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), pad_token_id=pad_token_id, **kwargs
            )[0]
            said.append(torch.cat([ids, text[prompt.shape[1] :]]))
        return torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=pad_token_id)
