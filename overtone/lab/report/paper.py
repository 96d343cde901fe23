"""The numbers that the paper prints (OverTone, ICML 2025), for the rows that a report has too.

paper.csv is copied from its Tables 2 and 3 and from Tables 4 and 5, whose T = 1 is Table 1; in %, averages as printed,
of which two are not the mean of their row. The paper gives no intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files

import pandas as pd

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

PaperRows = Callable[[str, int, str, str], pd.DataFrame]
"""The paper's rows beside data, T, method and loss: the columns of paper.csv that have a number, and ``source``."""


@lru_cache
def printed() -> pd.DataFrame:
    """All of paper.csv."""
    with files(__package__).joinpath("paper.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)


def editing_rows(data: str, length: int, method: str, loss: str) -> pd.DataFrame:
    """The rows of Tables 1, 4 and 5."""
    row = PAPER_METHODS.get(method, "")
    if method not in WITHOUT_TOKEN_LOSS:
        row = {"cross_entropy": row, "overtone": f"{row} + Ours"}.get(loss, "")
    return _rows((1, 4, 5), data, length, row, f", T = {length}")


def question_rows(data: str, length: int, method: str, loss: str) -> pd.DataFrame:
    """The rows of Table 2 (MQuAKE, single edits)."""
    row = {"cross_entropy": "{}", "overtone": "{} + Ours"}.get(loss, "").format(PAPER_METHODS.get(method))
    return _rows((2,), data, length, row)


def ablation_rows(data: str, length: int, method: str, loss: str) -> pd.DataFrame:
    """The rows of Table 3 (ZsRE, single edits, LoRA)."""
    row = ABLATION_ROWS.get(loss, "") if PAPER_METHODS.get(method) == "LoRA" else ""
    return _rows((3,), data, length, row)


def _rows(tables: tuple[int, ...], data: str, length: int, row: str, ending: str = "") -> pd.DataFrame:
    every = printed()
    is_asked = every["table"].isin(tables) & (every["row"] == row)
    found = every[is_asked & (every["data"] == data) & (every["length"] == length)].dropna(axis="columns")
    sources = "Table " + found["table"].astype(str) + ", " + found["model"] + ", " + found["row"] + ending
    return found.assign(source=sources).drop(columns=["table", "model", "data", "length", "row"])
