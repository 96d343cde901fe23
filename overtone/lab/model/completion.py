"""What a model says on its own, and whether that is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from overtone.lab.data.edit import Probe

MORE_TOKENS = 4
"""For an article, a quotation mark, or an answer in other tokens than the tokenizer's."""


@torch.no_grad()
def complete(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, *, temperature: float | None = None
) -> list[str]:
    """Completions up to the end-of-sequence token, without the prompt and special tokens, stripped.

    Greedy without a temperature, else sampled from the whole vocabulary with torch's global random state. The
    tokenizer's padding side is put back afterwards.
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
    generated = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        **decoding,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    new_tokens = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def complete_for(model: Any, tokenizer: Any, probes: Sequence[Probe]) -> list[str]:
    """Greedy completions of the probes' prompts, with room for a few tokens more than the longest answer takes."""
    answers = [tokenizer(answer, add_special_tokens=False).input_ids for probe in probes for answer in probe.answers]
    return complete(model, tokenizer, [probe.prompt for probe in probes], max(map(len, answers)) + MORE_TOKENS)


def is_exact_match(completion: str, probe: Probe) -> bool:
    """Whether a completion gives the probe's answer and nothing after it; one closing full stop is free.

    Where the target is a chain of thought, only the answer at the chain's end is compared.
    """
    said = completion.strip().removesuffix(".")
    answer = probe.answer.removesuffix(".")
    is_chain = probe.target.strip().removesuffix(".") != answer
    return said == answer or (is_chain and said.endswith(" " + answer))
