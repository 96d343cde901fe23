"""A model with its tokenizer, edited and restored again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overtone.lab.model.fingerprint import fingerprint


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
    def load(cls, name: str | Path, device: str = "cpu") -> Workplace:
        """Load a model and its tokenizer.

        Args:
            name: a causal language model of the Hugging Face hub, or a folder that `save_pretrained` wrote.
            device: where to; on the CPU in float32, elsewhere in the precision in which the model is stored.

        Raises:
            ValueError: the tokenizer has neither a pad token nor an end-of-sequence token to pad with.
            OSError: there is no such model.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError(f"the tokenizer of {str(name)!r} has neither a pad token nor an end-of-sequence token")
            tokenizer.pad_token = tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto")
        model = model.float() if device == "cpu" else model.to(device)
        return cls(model.eval(), tokenizer)

    def require_restored(self, whose: str) -> None:
        """Refuse to go on with another model than at the beginning.

        Raises:
            NotRestoredError: the model is not what it was, bit for bit.
        """
        if fingerprint(self.model) != self.fingerprint:
            raise NotRestoredError(f"{whose} did not restore the model: no edit after this one could be trusted")
