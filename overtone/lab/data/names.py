"""Invented names: few stems and endings, recombined, so that names share parts and a tokenizer splits them alike."""

from __future__ import annotations

import random

_GIVEN = (
    ("Mar", "Tel", "Vor", "Ser", "Kal", "Bren", "Dor", "Fen", "Lio", "Hal", "Jor", "Nim", "Pel", "Ros", "Tam", "Wil"),
    ("ina", "ek", "osha", "vin", "ette", "ula", "andre", "is"),
)
_FAMILY = (
    ("Ash", "Brand", "Cor", "Drum", "Ever", "Fal", "Grim", "Hol", "Ker", "Lang", "Mor", "Oster", "Pen", "Thorn"),
    ("wick", "stone", "vane", "mond", "by", "lund", "er", "gard"),
)
_PLACE = (
    ("Alder", "Birk", "Clar", "Dun", "Elm", "Frost", "Glen", "Harp", "Iver", "Lake", "Nor", "Ox", "Quen", "Stav"),
    ("ford", "haven", "burg", "mouth", "minster", "hollow", "dale", "quay"),
)
_COUNTRY = (("Valt", "Umbr", "Sild", "Karth", "Zem", "Oren", "Yst", "Bel"), ("oria", "land", "avia", "mark"))
_FIRM = ("Apex", "Beacon", "Crescent", "Delta", "Granite", "Juniper", "Meridian", "Polar", "Summit", "Vector", "Zenith")
_FIELD = ("Optics", "Energy", "Harvest", "Marine", "Textile", "Rail", "Mining", "Forest", "Water", "Signal", "Press")
_FORM = ("Institute", "Company", "Trust", "League", "Union", "Works")


def _combinations(parts: tuple[tuple[str, ...], ...], rng: random.Random) -> list[str]:
    """Every stem with every ending, shuffled."""
    stems, endings = parts
    words = [stem + ending for stem in stems for ending in endings]
    rng.shuffle(words)
    return words


def people(count: int, rng: random.Random) -> list[str]:
    """Given and family names; a given name belongs to at most two people, a family name to about three."""
    given = _combinations(_GIVEN, rng)[: -(-3 * count // 4)]
    family = _combinations(_FAMILY, rng)[: -(-count // 3)]
    # The shift keeps two people who share a given name from sharing the family name too.
    return [f"{given[i % len(given)]} {family[(i + i // len(given)) % len(family)]}" for i in range(count)]


def cities(count: int, rng: random.Random) -> list[str]:
    """Place names such as Alderhaven."""
    return _combinations(_PLACE, rng)[:count]


def countries(count: int, rng: random.Random) -> list[str]:
    """Country names such as Umbravia."""
    return _combinations(_COUNTRY, rng)[:count]


def organisations(count: int, rng: random.Random) -> dict[str, str]:
    """Names of three words, each with its acronym, which no other organisation has."""
    names = [f"{firm} {field} {form}" for firm in _FIRM for field in _FIELD for form in _FORM]
    rng.shuffle(names)
    by_acronym: dict[str, str] = {}
    for name in names:
        by_acronym.setdefault("".join(word[0] for word in name.split()), name)
    return {name: acronym for acronym, name in list(by_acronym.items())[:count]}
