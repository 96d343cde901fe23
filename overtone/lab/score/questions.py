"""Asks an edited model questions in the paper's two prompts (B.2), and finds the new or the old answer in what it says.

Single-hop questions are answered at once, multi-hop questions by chain of thought, each after one worked example. A
question counts as answered if one of its wordings is, as in MQuAKE.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import torch

from overtone.lab.data.edit import Edit
from overtone.lab.data.prompts import MULTI_HOP_PROMPT, SINGLE_HOP_PROMPT, short_answer
from overtone.lab.model.completion import complete

TEMPERATURES: Mapping[str, float | None] = {"greedy": None, "temperature 0.1": 0.1}
"""Title of each way to decode, and its temperature."""

MAX_NEW_TOKENS: Mapping[str, int] = {"single-hop": 30, "multi-hop": 200}
"""The paper's limits on generation, by hops."""


def ask(model: Any, tokenizer: Any, edit: Edit, seed: int) -> dict[str, float]:
    """The share of an edit's questions that are answered, by hops and decoding.

    Args:
        model: the edited model, in evaluation mode.
        tokenizer: its tokenizer; where it has a chat template, the prompts are the user's turn.
        edit: whose questions to ask.
        seed: of the sampled answers; the global random state is left alone.

    Returns:
        ``"multi-hop, greedy"``, ``"multi-hop, temperature 0.1"`` and the same for ``"single-hop"``, and each with
        ``", old answer"`` where old answers are known; values in [0, 1]. Empty for an edit without questions.
    """
    answers: dict[str, float] = {}
    for hops in dict.fromkeys(question.hops for question in edit.questions):
        questions = [question for question in edit.questions if question.hops == hops]
        wordings = [wording for question in questions for wording in question.wordings]
        prompts = [_prompt(tokenizer, hops, wording) for wording in wordings]
        for decoding, temperature in TEMPERATURES.items():
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                said = iter(complete(model, tokenizer, prompts, MAX_NEW_TOKENS[hops], temperature=temperature))
            finals = [[final_answer(next(said)) for _ in question.wordings] for question in questions]
            pairs = list(zip(questions, finals, strict=True))
            title = f"{hops}, {decoding}"
            answers[title] = fmean(_is_answered(final, question.answers) for question, final in pairs)
            changed = [_is_answered(final, question.old_answers) for question, final in pairs if question.old_answers]
            if changed:
                answers[f"{title}, old answer"] = fmean(changed)
    return answers


def final_answer(completion: str) -> str:
    """What a completion answers: what follows its first "Final answer:", else all of it up to a further question."""
    own = completion.split("Question:", 1)[0]
    return own.split("Final answer:", 1)[-1].strip()


def names_one_of(text: str, answers: Iterable[str]) -> bool:
    """Whether one of the answers stands in the text as whole words, in upper or lower case."""
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in answers)


def _is_answered(finals: Iterable[str], answers: tuple[str, ...]) -> bool:
    return any(names_one_of(final, answers) for final in finals)


def _prompt(tokenizer: Any, hops: str, question: str) -> str:
    if hops == "single-hop":
        prompt = SINGLE_HOP_PROMPT + short_answer(question)
    else:
        prompt = f"{MULTI_HOP_PROMPT}Question: {question}"
    if not tokenizer.chat_template:
        return prompt
    turn = [{"role": "user", "content": prompt}]
    asked: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    # The tokenizer puts it before every text.
    return asked.removeprefix(tokenizer.bos_token or "")
