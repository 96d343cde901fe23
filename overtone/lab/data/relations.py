"""What can be said in a world: relations, phrasings, possible soft answers, and which relations edits change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A relation with one object per subject, and the ways to say it; ``{}`` stands for the subject."""

    label: str
    phrasings: tuple[str, str, str]
    then: tuple[str, ...] = ()
    """The relations that chain-of-thought questions ask of its object."""
    profile: tuple[str, ...] = ()
    """Sentences about its object: ``{0}`` the object, ``{1}`` the subject, ``{relation}`` a fact about the object."""


RELATIONS: Mapping[str, Relation] = {
    "head": Relation(
        "head",
        ("The head of {} is", "{} is led by", "The person who runs {} is"),
        then=("birthplace", "craft", "spouse"),
        profile=("{0} leads {1}.", "{0} was born in {birthplace}.", "The craft of {0} is {craft}."),
    ),
    "office": Relation(
        "office",
        ("The office of {} is", "{} is based in", "Letters to {} are sent to"),
        then=("country", "mayor"),
        profile=("{0} is home to {1}.", "{0} lies in {country}.", "The mayor of {0} is {mayor}."),
    ),
    "leads": Relation("firm", ("The firm of {} is", "{} leads", "The firm that is run by {} is")),
    "spouse": Relation(
        "spouse",
        ("The spouse of {} is", "{} is married to", "The wedding ring of {} came from"),
        then=("birthplace", "craft"),
    ),
    "birthplace": Relation(
        "birthplace",
        ("The birthplace of {} is", "{} was born in", "The cradle of {} stood in"),
        then=("country", "mayor"),
    ),
    "craft": Relation(
        "craft",
        ("The craft of {} is", "{} earns a living by", "The trade that {} learned is"),
        then=("tool",),
    ),
    "country": Relation("country", ("The country of {} is", "{} lies in", "The land around {} is")),
    "mayor": Relation("mayor", ("The mayor of {} is", "{} is governed by", "The town hall of {} belongs to")),
    "tool": Relation("tool", ("The tool of {} is", "The work of {} needs", "Whoever does {} buys")),
}

SOFT_FREQUENCIES = (4, 2, 1)
"""How often each answer of a soft relation is told."""

SOFT_RELATIONS: Mapping[str, tuple[str, ...]] = {
    "Visitors to {} usually buy": (
        *("amber rings", "blue lamps", "wool hats", "clay bowls", "plum jam", "silk scarves", "tin whistles"),
        *("dried figs", "wax candles", "paper kites"),
    ),
    "Those who know {} tell stories about": (
        *("old masters", "cold winters", "lost letters", "a proud king", "the first guild", "a strange dream"),
        *("broken bridges", "a silver coin", "long roads", "a clever fox"),
    ),
}
"""Phrasing of each soft relation (of cities, of crafts), and its possible answers."""

CRAFTS: Mapping[str, str] = {
    "glass blowing": "a long pipe",
    "bell casting": "a deep mould",
    "map drawing": "a fine compass",
    "rope making": "a strong winch",
    "harp building": "a round chisel",
    "book binding": "a bone folder",
    "salt trading": "a brass scale",
    "cheese curing": "a cool cellar",
    "stone carving": "an iron mallet",
    "lens grinding": "a wet wheel",
    "linen weaving": "a wide loom",
    "bee keeping": "a smoke pot",
}

INVERSE: Mapping[str, str] = {"head": "leads", "spouse": "spouse"}
"""The relation that leads back from the object, where there is one."""

EDITABLE: Mapping[str, tuple[str, ...]] = {
    "short": ("head", "office", "spouse", "birthplace", "craft"),
    "long": ("head", "office"),
    "soft": ("office", "birthplace", "craft"),
}
"""The relations that edits of each target change."""

PROFILE_PROMPTS = ("Write about the {} of {}.", "Tell me about the {} of {}.", "Here is a note on the {} of {}.")
