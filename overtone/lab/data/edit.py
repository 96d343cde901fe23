"""An edit of what a model knows, and what it is judged by: the types that every loader makes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """A prompt and how it should go on; ``prompt + target`` is the text, ``target`` begins with a space."""

    prompt: str
    target: str
    kind: str
    answer: str
    """What free-running generation is checked for: the target, or the end of its chain of thought."""
    aliases: tuple[str, ...] = ()
    """Other names of the answer, which generation may give instead."""

    @property
    def answers(self) -> tuple[str, ...]:
        """What a generation may begin with: the target, the answer, and its aliases."""
        return tuple(dict.fromkeys((self.target.strip(), self.answer, *self.aliases)))

    @property
    def text(self) -> str:
        """Both together as a sentence, with one full stop, as a model is told it."""
        return f"{self.prompt}{self.target.rstrip('.')}."


@dataclass(frozen=True)
class Question:
    """A question in one or more wordings, answered if any wording is answered with any of the answers."""

    hops: str
    """``"single-hop"`` or ``"multi-hop"``, which decides how it is asked."""
    wordings: tuple[str, ...]
    answers: tuple[str, ...]
    """The answer after the edit, and its aliases."""
    old_answers: tuple[str, ...]
    """The answer before the edit, and its aliases; none where the edit does not change the answer."""


@dataclass(frozen=True)
class Edit:
    """A counterfactual edit and the probes that judge it.

    ``portability`` targets are right in the edited world, ``locality`` targets in the unedited one; no probe depends on
    any other edit of the same list, so that the list can also be made in a row. ``target_old`` is empty where nobody
    says what the fact was before. ``also`` holds further (prompt, target) pairs that are part of the edit, and
    ``questions`` what is asked of the edited model in its own words.
    """

    subject: str
    prompt: str
    target_new: str
    target_old: str
    generality: tuple[Probe, ...]
    portability: tuple[Probe, ...]
    locality: tuple[Probe, ...]
    also: tuple[tuple[str, str], ...] = ()
    questions: tuple[Question, ...] = ()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The (prompt, target) pairs that the edit fits."""
        return [(self.prompt, self.target_new), *self.also]
