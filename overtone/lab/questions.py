"""Asks an edited model questions in the paper's two prompts (B.2), and finds the new or the old answer in what it says.

Single-hop questions are answered at once, multi-hop questions by chain of thought, each after one worked example. A
question counts as answered if one of its wordings is, as in MQuAKE.
"""

from __future__ import annotations

from typing import Any

from overtone.lab.world import Edit


def ask(model: Any, tokenizer: Any, edit: Edit, seed: int) -> dict[str, float]:
    """The share of an edit's questions that are answered, by hops and decoding.

    Args:
        model: the edited model, in evaluation mode.
        tokenizer: its tokenizer.
        edit: whose questions to ask.
        seed: of the sampled answers; the global random state is left alone.

    Returns:
        ``"multi-hop, greedy"``, ``"multi-hop, temperature 0.1"`` and the same for ``"single-hop"``, and each with
        ``", old answer"`` where old answers are known; values in [0, 1]. Empty for an edit without questions.
    """
    if not edit.questions:
        return {}
    raise NotImplementedError
