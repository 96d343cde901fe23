"""Whether what a model says begins with an answer.

A base model does not end after a short answer, so what it goes on to say must not count against it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_ARTICLES = ("a", "an", "the")


def normalised(text: str) -> str:
    """The words of a text: small letters without accents and punctuation, single spaces between them."""
    plain = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return " ".join(re.findall(r"\w+", plain.casefold()))


def begins_with(completion: str, answers: Iterable[str]) -> bool:
    """Whether the words of a completion begin with all words of one of the answers.

    An article before the completion or the answer is free, as in SQuAD's measure. An answer without a word, such as a
    flag among the aliases of a country, is no way to answer.

    Raises:
        ValueError: no answer has a word.
    """
    given = list(answers)
    known = [words for answer in given if (words := _without_article(normalised(answer)))]
    if not known:
        raise ValueError(f"answers must have a word that a completion could begin with, got {given}")
    said = _without_article(normalised(completion)) + " "
    return any(said.startswith(words + " ") for words in known)


def is_decided(completion: str, answers: Iterable[str]) -> bool:
    """Whether `begins_with` says the same of every completion that goes on from this one."""
    said = _without_article(normalised(completion))
    if any(article.startswith(said) for article in _ARTICLES):
        return False
    return not any(_without_article(normalised(answer)).startswith(said) for answer in answers)


def _without_article(words: str) -> str:
    return re.sub(rf"^({'|'.join(_ARTICLES)}) (?=.)", "", words)
