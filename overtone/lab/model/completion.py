"""What a model says on its own, and whether that is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from overtone.lab.data.edit import Probe
from overtone.lab.model.answers import is_decided

MORE_TOKENS = 4
"""For an article, a quotation mark, or an answer in other tokens than the tokenizer's."""


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    temperature: float | None = None,
    answers: Sequence[Sequence[str]] | None = None,
) -> list[str]:
    """Completions up to the end-of-sequence token, without the prompt and special tokens, stripped.

    Greedy without a temperature, else sampled from the whole vocabulary with torch's global random state. The
    tokenizer's padding side is put back afterwards.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        prompts: what to complete.
        max_new_tokens: how far completions go.
        temperature: of the sampling.
        answers: of each prompt; its completion also ends once it is decided whether it begins with one of them.
    """
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    finally:
        tokenizer.padding_side = side
    decoding: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        decoding = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    prompt_length = inputs["input_ids"].shape[1]
    stops = [] if answers is None else [_Decided(tokenizer, prompt_length, answers)]
    generated = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        **decoding,
        stopping_criteria=StoppingCriteriaList(stops),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return [text.strip() for text in tokenizer.batch_decode(generated[:, prompt_length:], skip_special_tokens=True)]


class _Decided(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, tokenizer: Any, prompt_length: int, answers: Sequence[Sequence[str]]) -> None:
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        self._answers = answers

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        said = self._tokenizer.batch_decode(input_ids[:, self._prompt_length :], skip_special_tokens=True)
        return torch.tensor(list(map(is_decided, said, self._answers)), device=input_ids.device)


def complete_for(model: Any, tokenizer: Any, probes: Sequence[Probe]) -> list[str]:
    """Greedy completions of the probes' prompts, as far as it takes to see whether they begin with an answer.

    There is room for a few tokens more than the longest answer takes.
    """
    answers = [probe.answers for probe in probes]
    longest = max(len(tokenizer(answer, add_special_tokens=False).input_ids) for own in answers for answer in own)
    prompts = [probe.prompt for probe in probes]
    return complete(model, tokenizer, prompts, longest + MORE_TOKENS, answers=answers)


def is_exact_match(completion: str, probe: Probe) -> bool:
    """Whether a completion gives the probe's answer and nothing after it; one closing full stop is free.

    Where the target is a chain of thought, only the answer at the chain's end is compared.
    """
    said = completion.strip().removesuffix(".")
    answer = probe.answer.removesuffix(".")
    is_chain = probe.target.strip().removesuffix(".") != answer
    return said == answer or (is_chain and said.endswith(" " + answer))
