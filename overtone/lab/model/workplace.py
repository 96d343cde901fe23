"""A model with its tokenizer, edited and restored again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from overtone.lab.model.fingerprint import fingerprint
from overtone.lab.model.gguf import is_gguf, load_gguf


class NotRestoredError(RuntimeError):
    """A model did not come back bit for bit after an edit: no edit after it could be trusted."""


class Workplace:
    """A model that is edited and restored again and again."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Take a model in evaluation mode, and its tokenizer."""
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint(model)

    @classmethod
    def load(cls, name: str | Path, device: str = "cpu", *, dtype: str | None = None) -> Workplace:
        """Load a model and its tokenizer.

        Args:
            name: a causal language model of the Hugging Face hub, a folder that `save_pretrained` wrote, or a .gguf
                file, whose weights are dequantised.
            device: where to.
            dtype: of the weights, a floating type of torch's by name; None: on the CPU float32, elsewhere the precision
                in which the model is stored.

        Raises:
            ValueError: dtype is no such type, or the tokenizer has neither a pad token nor an end-of-sequence token to
                pad with.
            OSError: there is no such model.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        chosen = getattr(torch, dtype, None) if dtype is not None else torch.float32 if device == "cpu" else None
        if dtype is not None and not (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
            raise ValueError(f"dtype must be float32, bfloat16 or another floating type of torch's, got {dtype!r}")
        if is_gguf(name):
            model, tokenizer = load_gguf(Path(name))
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto")
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError(f"the tokenizer of {str(name)!r} has neither a pad token nor an end-of-sequence token")
            tokenizer.pad_token = tokenizer.eos_token
        return cls(model.to(device=device, dtype=chosen).eval(), tokenizer)

    def require_restored(self, whose: str) -> None:
        """Refuse to go on with another model than at the beginning.

        Raises:
            NotRestoredError: the model is not what it was, bit for bit.
        """
        if fingerprint(self.model) != self.fingerprint:
            raise NotRestoredError(f"{whose} did not restore the model: no edit after this one could be trusted")
