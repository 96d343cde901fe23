"""What a model itself writes around an edit before it is made, from nothing but the edit's prompt and its subject.

Texts to learn the target behind, as ROME's context templates are (Meng et al., 2022, arXiv 2202.05262), and texts that
must stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn

from overtone.huggingface.reference import evaluating
from overtone.huggingface.token_ids import check_prompt, check_text, padding_id, text_ids

__all__ = ["WrittenTexts", "write_texts"]

OPENINGS = ("The", "Therefore", "Because")
NAME_TOKENS = 8
ANSWER_TOKENS = 3
TEXT_TOKENS = 10
PLAIN: Mapping[str, Any] = {
    **{"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
    **dict.fromkeys(("min_p", "guidance_scale", "min_new_tokens", "suppress_tokens", "stop_strings")),
    "return_dict_in_generate": False,
}
"""Generation by the model's distribution alone, whatever its generation_config has."""


@dataclass(frozen=True)
class WrittenTexts:
    """What `write_texts` found; any of the three may be empty.

    Attributes:
        prefixes: sentences that have nothing to do with the edit, each with a space at its end.
        neighbours: the edit's prompt asked of other names, each with the model's own answer.
        about: the subject, each time with what the model says next.
    """

    prefixes: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()
    about: tuple[tuple[str, str], ...] = ()


def write_texts(
    model: nn.Module, tokenizer: Any, prompt: str, subject: str, *, count: int = 16, seed: int = 0
) -> WrittenTexts:
    """Let a model write texts around an edit that is not made yet.

    Names are those with which it goes on after a list that begins with the subject. There are fewer neighbours than
    `count` where it repeats itself or has no answer; where there are none, a warning says so.

    Args:
        model: a Hugging Face causal language model, as it is before the edit; run in evaluation mode.
        tokenizer: of the model.
        prompt: of the edit, without a space at its end.
        subject: whom the edit is about, as the prompt spells it.
        count: texts of each kind at most, 1 or more.
        seed: of the sampling, 0 or more; torch's global random state is put back afterwards.

    Raises:
        ValueError: an empty prompt or subject, a prompt that ends with a space, a count below 1, or a seed that is no
            whole number.
    """
    check_prompt(prompt)
    check_text("subject", subject)
    for name, value, least in (("count", count, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}")
    writer = _Writer(model, tokenizer)
    openings = list(islice(cycle(OPENINGS), count))
    with evaluating(model):
        # Each kind from the seed on, so that the prefixes are the same for all edits.
        with _seeded(seed, writer.device):
            said = writer.continuations(openings, TEXT_TOKENS)
        with _seeded(seed, writer.device):
            neighbours = _neighbours(writer, prompt, subject, count)
        with _seeded(seed, writer.device):
            about = writer.continuations([subject] * count, TEXT_TOKENS)
    if not neighbours:
        why = "the model goes on with no other names" if subject in prompt else f"prompt {prompt!r} does not contain it"
        warnings.warn(f"no neighbours were written for subject {subject!r}: {why}", stacklevel=2)
    return WrittenTexts(
        tuple(f"{opening}{rest.rstrip(' .')}. " for opening, rest in zip(openings, said, strict=True) if rest),
        neighbours,
        tuple((subject, rest) for rest in about if rest),
    )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        # Not torch.manual_seed, which seeds every device, those too whose state is not put back.
        torch.default_generator.manual_seed(seed)
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


class _Writer:
    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def continuations(self, texts: Sequence[str], tokens: int, *, greedy: bool = False) -> list[str]:
        """What the model puts after each text: its first line with words; empty if there is none."""
        ids = [text_ids(self._tokenizer, text) for text in texts]
        width = max(map(len, ids))
        filler = padding_id(self._tokenizer)
        # Generation goes on at the right end, so the padding is on the left, whatever the tokenizer's own side.
        generated = self._model.generate(  # type: ignore[operator]
            input_ids=torch.tensor([[filler] * (width - len(own)) + own for own in ids], device=self.device),
            attention_mask=torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in ids], device=self.device),
            max_new_tokens=tokens,
            pad_token_id=filler,
            **PLAIN,
            **({"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}),
        )
        return [self._said_after(own, new) for own, new in zip(ids, generated[:, width:].tolist(), strict=True)]

    def _said_after(self, ids: list[int], new: list[int]) -> str:
        # Not decoded alone: some tokenizers leave out the space before the first token.
        before, after = (self._tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids + new))
        said = after[len(before) :].rstrip()
        if not said.split("\n")[0].strip():
            said = f" {said.strip()}" if said.strip() else ""  # a question is often answered on the next line
        said = said.split("\n")[0].rstrip()
        return "" if "\ufffd" in said else said  # the end of a token that is a part of a character


def _neighbours(writer: _Writer, prompt: str, subject: str, count: int) -> tuple[tuple[str, str], ...]:
    if subject not in prompt:
        return ()
    # Twice as many as wanted, since it repeats itself.
    said = writer.continuations([f"1. {subject}\n2."] * (2 * count), NAME_TOKENS)
    names = [
        name for name in dict.fromkeys(rest.strip(" .,;:") for rest in said) if name and not _overlap(name, subject)
    ]
    prompts = [prompt.replace(subject, name) for name in names[:count]]
    answers = writer.continuations(prompts, ANSWER_TOKENS, greedy=True) if prompts else []
    return tuple((asked, answer) for asked, answer in zip(prompts, answers, strict=True) if answer)


def _overlap(name: str, subject: str) -> bool:
    """Whether the name may mean the subject, of which it would keep what the edit is to change."""
    one, other = name.casefold(), subject.casefold()
    return one in other or other in one
