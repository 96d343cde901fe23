"""Whether a model says exactly what is wanted: one pass over the wanted answers decides it for nearly every prompt.

Greedy generation says a text if and only if each of its tokens is the most likely one after those before. So a wanted
answer is laid before the model as a guess, and only where it goes another way that may still spell the same answer does
it have to generate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from overtone.lab.data.edit import Probe
from overtone.lab.model.completion import complete, is_exact_match
from overtone.lab.model.positions import Text, logits_at


@dataclass(frozen=True)
class Wanted:
    """What is to be said after a prompt.

    Attributes:
        prompt: what the model goes on from.
        probe: whose answer is wanted; None where the text itself is.
        text: what is wanted, without the spaces around it.
        guess: the prompt with the text as the tokenizer spells it, and the positions that predict it.
    """

    prompt: str
    probe: Probe | None
    text: str
    guess: Text

    def is_met(self, said: str) -> bool:
        """Whether a whole completion is what is wanted."""
        return said == self.text if self.probe is None else is_exact_match(said, self.probe)

    def may_be_met(self, said: str) -> bool:
        """Whether a completion that begins so can be: True in doubt."""
        # A chain of thought is right by its end, so that any beginning may lead there.
        if self.probe is not None and self.probe.target.strip().removesuffix(".") != self.text:
            return True
        # A decoder may change the spaces, or not know yet what its last bytes stand for.
        return _squeezed(self.text + ("" if self.probe is None else ".")).startswith(_squeezed(said).rstrip("\ufffd"))


def want(tokenizer: Any, prompt: str, text: str, max_new_tokens: int, probe: Probe | None = None) -> Wanted:
    """What is wanted after a prompt, tokenised.

    Args:
        tokenizer: of the model that will be asked.
        prompt: what the model goes on from.
        text: what is wanted, or for a probe what the model would say if it knew the answer.
        max_new_tokens: how far completions go.
        probe: whose answer decides; None: the text does.
    """
    given = tokenizer(prompt).input_ids
    spelt = tokenizer(f"{prompt} {text}".rstrip()).input_ids[len(given) :]
    if tokenizer.eos_token_id is not None:
        spelt = [*spelt, tokenizer.eos_token_id]
    ids = torch.tensor([*given, *spelt[:max_new_tokens]])
    wanted = text if probe is None else probe.answer.removesuffix(".")
    return Wanted(prompt, probe, wanted, Text(ids, torch.arange(len(given) - 1, len(ids) - 1)))


@torch.no_grad()
def says(model: Any, tokenizer: Any, wanted: Sequence[Wanted], max_new_tokens: int) -> list[bool]:
    """Whether greedy generation after each prompt says what is wanted.

    Args:
        model: a Hugging Face causal language model whose predictions depend on the tokens before them alone, and whose
            generation is plain (see `is_plain`).
        tokenizer: its tokenizer.
        wanted: from `want`.
        max_new_tokens: how far completions go; the same as for `want`.
    """
    predicted = logits_at(model, [one.guess for one in wanted]).argmax(dim=-1).cpu()
    verdicts: list[bool | None] = []
    for one, tokens in zip(wanted, predicted.split([len(one.guess.positions) for one in wanted]), strict=True):
        differs = tokens != one.guess.ids[one.guess.positions + 1]
        # Behind the first token that differs the model was given what it did not say.
        said = tokens[: int(differs.int().argmax()) + 1 if differs.any() else None].tolist()
        if tokenizer.eos_token_id in said:
            said = said[: said.index(tokenizer.eos_token_id) + 1]
        text = tokenizer.decode(said, skip_special_tokens=True).strip()
        has_ended = len(said) == max_new_tokens or said[-1:] == [tokenizer.eos_token_id]
        verdicts.append(one.is_met(text) if has_ended else None if one.may_be_met(text) else False)
    open_ones = [one for one, verdict in zip(wanted, verdicts, strict=True) if verdict is None]
    if not open_ones:
        return [bool(verdict) for verdict in verdicts]
    completions = complete(model, tokenizer, [one.prompt for one in open_ones], max_new_tokens)
    late = iter([one.is_met(said) for one, said in zip(open_ones, completions, strict=True)])
    return [next(late) if verdict is None else verdict for verdict in verdicts]


_CHOOSES_NO_TOKEN = {
    *("do_sample", "temperature", "top_k", "top_p", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("transformers_version", "_from_model_config"),
}
"""Settings of transformers' GenerationConfig without a bearing on which token greedy generation takes."""


def is_plain(model: Any) -> bool:
    """Whether the model's own settings leave greedy generation the most likely token at every place."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return False
    return {name for name, value in config.to_diff_dict().items() if value not in (None, False)} <= _CHOOSES_NO_TOKEN


def _squeezed(text: str) -> str:
    return "".join(text.split())
