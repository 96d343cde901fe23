"""Token ids of single texts, from any tokenizer."""

from __future__ import annotations

from typing import Any


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that may go on, so without an end-of-sequence token that the tokenizer puts after it."""
    ids: list[int] = list(tokenizer(text).input_ids)
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def padding_id(tokenizer: Any) -> int:
    """What to pad with where the attention mask is 0: any token does, if the tokenizer has none for it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def check_prompt(prompt: object) -> None:
    """Raise a ValueError unless it is a text that can go on with a space."""
    check_text("prompt", prompt)
    if str(prompt)[-1].isspace():
        raise ValueError(f"prompt must not end with a space, got {prompt!r}: the target begins with it")


def check_text(name: str, value: object) -> None:
    """Raise a ValueError that names the argument, unless it is a text with something in it."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text, got {value!r}")
