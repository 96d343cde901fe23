"""Whether what a model says begins with an answer.

A base model does not end after a short answer, so what it goes on to say must not count against it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable


def normalised(text: str) -> str:
    """The words of a text: small letters without accents and punctuation, single spaces between them."""
    plain = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return " ".join(re.findall(r"\w+", plain.casefold()))


def begins_with(completion: str, answers: Iterable[str]) -> bool:
    """Whether the words of a completion begin with all words of one of the answers.

    An article before the completion or the answer is free, as in SQuAD's measure.

    Raises:
        ValueError: an answer has no word.
    """
    said = _without_article(normalised(completion)) + " "
    for answer in answers:
        words = _without_article(normalised(answer))
        if not words:
            raise ValueError(f"answer {answer!r} has no word that a completion could begin with")
        if said.startswith(words + " "):
            return True
    return False


def _without_article(words: str) -> str:
    return re.sub(r"^(a|an|the) (?=.)", "", words)
