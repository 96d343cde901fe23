"""The paper's two prompts for MQuAKE (B.2), each with one worked example before the question.

The paper prints them without line breaks; where these stand is ours.
"""

from __future__ import annotations

from collections.abc import Iterable

_EXAMPLE = "Who is the spouse of the head of state in United States of America?"


def short_answer(question: str) -> str:
    """A question up to where its answer begins."""
    return f"Question: {question} Answer:"


def chain_of_thought(hops: Iterable[tuple[str, str]], answer: str) -> str:
    """A question's answer by subquestions, each answered in a sentence.

    Args:
        hops: subquestion and the sentence that answers it, without its full stop.
        answer: the final answer.
    """
    steps = "".join(f" Subquestion: {question} Answer: {sentence}." for question, sentence in hops)
    return f"{steps} Final answer: {answer}"


SINGLE_HOP_PROMPT = (
    "You are a helpful AI assistant. Answer questions directly. Always format your response as: "
    "Final answer: [concise and direct final answer]\n"
    f"{short_answer(_EXAMPLE)} Jill Biden\n"
)
"""Before a single-hop question."""

MULTI_HOP_PROMPT = (
    "You are a helpful AI assistant. For each question: 1. Break it down into simpler subquestions "
    "2. Answer each subquestion step by step. 3. Use your answers to provide a final answer after "
    '"Final answer: " Always format your response as: Subquestion: [your subquestion] '
    "Generated answer: [your answer] Final answer: [concise and direct final answer]\n"
    f"Question: {_EXAMPLE}"
    + chain_of_thought(
        [
            (
                "Who is the head of state in United States of America?",
                "The head of state in United States of America is Joe Biden",
            ),
            ("Who is the spouse of Joe Biden?", "The spouse of Joe Biden is Jill Biden"),
        ],
        "Jill Biden",
    )
    + "\n"
)
"""Before a multi-hop question."""
