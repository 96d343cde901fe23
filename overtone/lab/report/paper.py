"""The numbers that the paper prints (OverTone, ICML 2025), for the rows that a report has too.

paper.csv is copied from its Tables 2 and 3 and from Tables 4 and 5, whose T = 1 is Table 1; in %, averages as printed,
of which two are not the mean of their row. The paper gives no intervals.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

PAPER_METHODS = {
    "ft-m": "FT-M",
    "easyedit-ft": "FT-M",
    "lora": "LoRA",
    "easyedit-lora": "LoRA",
    "easyedit-melo": "MELO",
    "easyedit-wise": "WISE",
    "rome": "ROME",
    "memit": "MEMIT",
}
"""The lab's methods by the paper's names."""

WITHOUT_TOKEN_LOSS = ("rome", "memit")
"""The methods that the paper runs without OverTone."""

ABLATION_ROWS = {
    "cross_entropy": "LoRA",
    "overtone:epsilon=0": "w/o clip",
    "overtone:dynamic=false": "w/o dyn",
    "overtone:check=false": "w/o chk",
    "overtone:n_sigma=none": "w/o flt",
    "overtone": "+ Ours",
}
"""Loss specs by their row in Table 3."""

_MEASURES = ("rel", "gen", "por", "loc", "single-hop", "multi-hop", "average")

PaperRow = dict[str, Any]
"""The numbers of a printed row by the column of paper.csv, and its ``source``."""

PaperRows = Callable[[str, int, str, str], list[PaperRow]]
"""The paper's rows beside data, T, method and loss; none where it has no such row."""


@cache
def printed() -> list[dict[str, str]]:
    """The lines of paper.csv."""
    with files(__package__).joinpath("paper.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def editing_rows(data: str, length: int, method: str, loss: str) -> list[PaperRow]:
    """The rows of Tables 1, 4 and 5."""
    row = PAPER_METHODS.get(method, "")
    if method not in WITHOUT_TOKEN_LOSS:
        row = {"cross_entropy": row, "overtone": f"{row} + Ours"}.get(loss, "")
    return _rows("145", data, length, row, f", T = {length}")


def question_rows(data: str, length: int, method: str, loss: str) -> list[PaperRow]:
    """The rows of Table 2 (MQuAKE, single edits)."""
    row = {"cross_entropy": "{}", "overtone": "{} + Ours"}.get(loss, "").format(PAPER_METHODS.get(method))
    return _rows("2", data, length, row)


def ablation_rows(data: str, length: int, method: str, loss: str) -> list[PaperRow]:
    """The rows of Table 3 (ZsRE, single edits, LoRA)."""
    row = ABLATION_ROWS.get(loss, "") if PAPER_METHODS.get(method) == "LoRA" else ""
    return _rows("3", data, length, row)


def _rows(tables: str, data: str, length: int, row: str, ending: str = "") -> list[PaperRow]:
    return [
        {
            "source": f"Table {line['table']}, {line['model']}, {row}{ending}",
            **{name: float(line[name]) for name in _MEASURES if line[name]},
        }
        for line in printed()
        if line["table"] in tables and (line["data"], line["length"], line["row"]) == (data, str(length), row)
    ]
