"""What the model's tokenizer does, where it is on this machine."""

from __future__ import annotations

from typing import Any

from overtone.easyedit.traps.trap import Config


def load_tokenizer(config: Config) -> Any:
    """The model's tokenizer; None where it is not on this machine."""
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(config.get("model_name")), local_files_only=True)
    except (ImportError, OSError, ValueError):
        return None


def adds_bos(tokenizer: Any) -> bool:
    """Whether every text begins with its BOS token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
