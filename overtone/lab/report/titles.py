"""What reports and figures call corpora, methods, losses and sequence lengths."""

from __future__ import annotations

from overtone.lab.data.corpora import CORPORA
from overtone.lab.edit.methods import METHODS
from overtone.lab.report.paper import PAPER_METHODS
from overtone.token_loss import parse


def data_title(name: str) -> str:
    """Of a corpus."""
    return CORPORA[name].title if name in CORPORA else name


def method_title(name: str) -> str:
    """Of an editing method; EasyEdit's are told from the lab's own."""
    if name in METHODS:
        return METHODS[name].title
    return f"{PAPER_METHODS[name]} (EasyEdit)" if name in PAPER_METHODS else name


def loss_title(spec: str) -> str:
    """Of a loss; the spec itself where this version of overtone does not know it."""
    try:
        return parse(spec).title
    except ValueError:
        return spec


def length_title(length: int) -> str:
    """Of a sequence length."""
    return "Single edits (T = 1)" if length == 1 else f"{length} edits in a row (T = {length})"
