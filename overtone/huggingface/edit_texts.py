"""An edit's own text, and those that the model wrote around it, as batches for an attached model with an anchor."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from overtone.huggingface.token_ids import check_prompt, check_text, padding_id, text_ids
from overtone.huggingface.written_texts import WrittenTexts

__all__ = ["EditTexts"]

PROMPT, NEIGHBOURS, ABOUT = 1, 2, 3
"""Groups of what must stay."""


@dataclass(frozen=True)
class Row:
    """One text, without padding.

    Attributes:
        ids: ``(T,)``.
        labels: ``(T,)``, the ids at the target, else -100.
        groups: ``(T,)``, whose predictions must stay as they were: one of the groups, else 0.
    """

    ids: Tensor
    labels: Tensor
    groups: Tensor


class EditTexts:
    """Batches of one edit: its own text in every step, and a few of those around it, drawn anew for each.

    The target is learned behind the edit's prompt, and behind a prefix and the prompt. What must stay is what the model
    said within the prompt, of other names, and of the subject: three groups, whose means are added.

    Attributes:
        rows: the edit's own text, and then the others, kind by kind. One that the tokenizer does not make of its parts
            token by token is left out.
    """

    def __init__(
        self, tokenizer: Any, prompt: str, target: str, written: WrittenTexts | None = None, *, draw: int | None = 1
    ) -> None:
        """Encode the texts.

        Args:
            tokenizer: of the model.
            prompt: of the edit, without a space at its end.
            target: what is to follow it, with its space.
            written: what `write_texts` gave for this edit; None for the edit's own text alone.
            draw: how many texts of each kind take part in a step, 1 or more; None for all of them.

        Raises:
            ValueError: for an empty prompt or target, a prompt that ends with a space, a target that does not continue
                it token by token, or draw below 1.
        """
        check_prompt(prompt)
        check_text("target", target)
        if _is_ascii_letter(prompt[-1]) and _is_ascii_letter(target[0]):
            raise ValueError(f"target must begin with a space after prompt {prompt!r}, got {target!r}")
        if draw is not None and (isinstance(draw, bool) or not isinstance(draw, int) or draw < 1):
            raise ValueError(f"draw must be a whole number, 1 or more, or None for all texts, got {draw!r}")
        written = WrittenTexts() if written is None else written
        own = _fitted(tokenizer, prompt, target, has_anchor=True)
        if own is None:
            raise ValueError(
                f"target {target!r} does not continue prompt {prompt!r} token by token: begin the target with a space "
                "and end the prompt without one"
            )
        kinds = [
            [_kept(tokenizer, *pair, NEIGHBOURS) for pair in written.neighbours],
            [_kept(tokenizer, *pair, ABOUT) for pair in written.about],
            [_fitted(tokenizer, prefix + prompt, target, has_anchor=False) for prefix in written.prefixes],
        ]
        self.rows = [own]
        self._places: list[range] = []
        for kind in kinds:
            found = [row for row in kind if row is not None]
            self._places.append(range(len(self.rows), len(self.rows) + len(found)))
            self.rows += found
        self._draw = draw
        self._padding = padding_id(tokenizer)

    def drawn(self, step: int) -> list[int]:
        """The places in `rows` of the texts that take part in a step, counted from 0; the same at every call."""
        chosen = [0]
        for number, places in enumerate(self._places):
            count = len(places) if self._draw is None else min(self._draw, len(places))
            chosen += sorted(Random(f"{number} {step}").sample(places, count))
        return chosen

    def batch(self, step: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What the model is called with in a step, padded on the right.

        Args:
            step: counted from 0.
            device: where the tensors go.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` and ``anchor_groups``, each ``(batch, sequence)``.
        """
        rows = [self.rows[place] for place in self.drawn(step)]

        def padded(parts: list[Tensor], filler: int) -> Tensor:
            return pad_sequence(parts, batch_first=True, padding_value=filler).to(device)

        return {
            "input_ids": padded([row.ids for row in rows], self._padding),
            "attention_mask": padded([torch.ones_like(row.ids) for row in rows], 0),
            "labels": padded([row.labels for row in rows], -100),
            "anchor_groups": padded([row.groups for row in rows], 0),
        }


def _is_ascii_letter(character: str) -> bool:
    return character.isascii() and character.isalnum()


def _encoded(tokenizer: Any, prompt: str, continuation: str) -> tuple[Tensor, int] | None:
    """The ids of a text and how many of them the prompt has, where the text's tokens begin with the prompt's."""
    before, ids = (text_ids(tokenizer, text) for text in (prompt, prompt + continuation))
    return (torch.tensor(ids), len(before)) if len(ids) > len(before) and ids[: len(before)] == before else None


def _fitted(tokenizer: Any, prompt: str, target: str, *, has_anchor: bool) -> Row | None:
    found = _encoded(tokenizer, prompt, target)
    if found is None:
        return None
    ids, length = found
    labels, groups = torch.full_like(ids, -100), torch.zeros_like(ids)
    labels[length:] = ids[length:]
    if has_anchor:
        # A BOS says nothing of the edit, and the prompt's last token predicts the target.
        groups[int(ids[0] == tokenizer.bos_token_id) : length - 1] = PROMPT
    return Row(ids, labels, groups)


def _kept(tokenizer: Any, prompt: str, continuation: str, group: int) -> Row | None:
    found = _encoded(tokenizer, prompt, continuation)
    if found is None:
        return None
    ids, length = found
    groups = torch.zeros_like(ids)
    groups[length - 1 : -1] = group
    return Row(ids, torch.full_like(ids, -100), groups)
