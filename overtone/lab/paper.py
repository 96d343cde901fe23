"""The numbers that the paper prints (OverTone, ICML 2025), for the rows that the bench has too.

Copied from its Tables 2 and 3 and from Tables 4 and 5, whose T = 1 is Table 1; in %, averages as printed, of which two
are not the mean of their row (`PaperRow.mean`). The paper gives no intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

LLAMA_2, LLAMA_3 = "LLaMA 2 7B chat", "LLaMA 3 8B instruct"

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
"""The bench's methods by the paper's names."""

WITHOUT_TOKEN_LOSS = ("rome", "memit")
"""The methods that the paper runs without OverTone."""

_ABLATION_NAMES = {
    "overtone:epsilon=0": "w/o clip",
    "overtone:dynamic=false": "w/o dyn",
    "overtone:check=false": "w/o chk",
    "overtone:n_sigma=none": "w/o flt",
}
"""Loss specs by their row in Table 3."""


@dataclass(frozen=True)
class PaperRow:
    """One row of a table of the paper.

    Attributes:
        model: the model that the paper edited.
        source: the table and the row.
        values: column to percent, as printed.
    """

    model: str
    source: str
    values: dict[str, float]

    @property
    def mean(self) -> float:
        """Of the columns other than the average."""
        return fmean(value for column, value in self.values.items() if column != "average")


def editing_rows(data: str, method: str, loss: str, length: int) -> list[PaperRow]:
    """The rows of Tables 1, 4, 5 with this data, method, loss and T; none where the paper has no such row."""
    tables, columns = {"zsre": (_ZSRE, _ZSRE_COLUMNS), "wikibio": (_WIKIBIO, _WIKIBIO_COLUMNS)}.get(data, ({}, ()))
    row = PAPER_METHODS.get(method, "")
    if method not in WITHOUT_TOKEN_LOSS:
        row = {"cross_entropy": row, "overtone": f"{row} + Ours"}.get(loss, "")
    found = []
    for model, lengths in tables.items():
        values = lengths.get(length, {}).get(row)
        if values is not None:
            table = 1 if length == 1 else 4 if model == LLAMA_2 else 5
            source = f"Table {table}, {model}, {row}, T = {length}"
            found.append(PaperRow(model, source, dict(zip(columns, values, strict=True))))
    return found


def mquake_rows(method: str, loss: str) -> list[PaperRow]:
    """The rows of Table 2 (MQuAKE, single edits) with this method and loss."""
    row = {"cross_entropy": "{}", "overtone": "{} + Ours"}.get(loss, "").format(PAPER_METHODS.get(method))
    return [
        PaperRow(model, f"Table 2, {model}, {row}", dict(zip(_MQUAKE_COLUMNS, rows[row], strict=True)))
        for model, rows in _MQUAKE.items()
        if row in rows
    ]


def ablation_rows(data: str, method: str, loss: str, length: int) -> list[PaperRow]:
    """The rows of Table 3, which is single edits of ZsRE with LoRA."""
    row = {"cross_entropy": "LoRA", "overtone": "+ Ours", **_ABLATION_NAMES}.get(loss)
    if row is None or data != "zsre" or length != 1 or PAPER_METHODS.get(method) != "LoRA":
        return []
    return [PaperRow(LLAMA_2, f"Table 3, {LLAMA_2}, {row}", dict(zip(_ZSRE_COLUMNS, _ABLATION[row], strict=True)))]


_ZSRE_COLUMNS = ("rel", "gen", "por", "loc", "average")
_WIKIBIO_COLUMNS = ("rel", "loc", "average")
_MQUAKE_COLUMNS = ("rel", "single-hop", "multi-hop", "average")

_ZSRE: dict[str, dict[int, dict[str, tuple[float, ...]]]] = {
    LLAMA_2: {  # Table 4, ZsRE
        1: {
            "ROME": (96.61, 83.91, 55.7, 96.96, 83.3),
            "MEMIT": (94.22, 88.2, 57.91, 98.28, 84.65),
            "FT-M": (99.75, 99.33, 54.32, 93.01, 86.6),
            "FT-M + Ours": (99.75, 96.8, 57.08, 96.54, 87.54),
            "LoRA": (100.0, 100.0, 23.34, 30.44, 63.45),
            "LoRA + Ours": (100.0, 94.31, 61.16, 87.2, 85.67),
            "MELO": (100.0, 96.77, 27.11, 92.35, 79.06),
            "MELO + Ours": (100.0, 93.31, 50.36, 97.2, 85.22),
            "WISE": (92.42, 70.86, 54.57, 100.0, 79.46),
            "WISE + Ours": (97.55, 76.09, 54.17, 100.0, 81.95),
        },
        10: {
            "ROME": (74.94, 69.67, 51.12, 71.72, 66.86),
            "MEMIT": (68.39, 66.26, 46.66, 84.22, 66.38),
            "FT-M": (89.14, 87.43, 47.13, 84.26, 76.99),
            "FT-M + Ours": (92.8, 88.21, 55.74, 91.06, 81.95),
            "LoRA": (29.25, 30.41, 19.83, 24.81, 26.07),
            "LoRA + Ours": (85.4, 81.5, 61.03, 74.41, 75.59),
            "MELO": (94.13, 83.06, 50.48, 96.5, 81.04),
            "MELO + Ours": (94.38, 81.89, 54.92, 98.41, 82.4),
            "WISE": (84.5, 73.81, 53.19, 100.0, 77.88),
            "WISE + Ours": (86.68, 77.24, 54.0, 100.0, 79.48),
        },
        100: {
            "ROME": (25.37, 22.68, 4.73, 5.1, 14.47),
            "MEMIT": (2.58, 2.88, 0.24, 2.5, 2.05),
            "FT-M": (88.36, 84.51, 41.76, 54.11, 67.19),
            "FT-M + Ours": (89.38, 82.13, 52.69, 72.39, 74.15),
            "LoRA": (0.67, 0.78, 1.0, 0.03, 0.62),
            "LoRA + Ours": (62.23, 58.06, 56.62, 59.57, 59.12),
            "MELO": (38.13, 36.12, 53.88, 98.08, 56.55),
            "MELO + Ours": (39.13, 37.28, 54.75, 98.58, 57.44),
            "WISE": (84.59, 71.59, 54.45, 100.0, 77.66),
            "WISE + Ours": (92.42, 84.22, 56.71, 100.0, 83.34),
        },
    },
    LLAMA_3: {  # Table 5, ZsRE
        1: {
            "ROME": (99.17, 97.91, 58.12, 95.9, 87.78),
            "MEMIT": (96.67, 92.46, 58.78, 98.23, 86.53),
            "FT-M": (100.0, 99.75, 40.43, 79.43, 79.9),
            "FT-M + Ours": (100.0, 99.75, 48.63, 94.78, 85.79),
            "LoRA": (100.0, 100.0, 26.55, 38.85, 66.35),
            "LoRA + Ours": (100.0, 98.5, 51.57, 93.13, 85.8),
            "MELO": (100.0, 96.84, 39.63, 98.8, 83.82),
            "MELO + Ours": (100.0, 95.77, 43.08, 98.8, 84.41),
            "WISE": (71.67, 51.29, 49.27, 100.0, 68.06),
            "WISE + Ours": (82.67, 62.34, 47.54, 100.0, 73.14),
        },
        10: {
            "ROME": (43.91, 40.14, 25.11, 31.7, 35.22),
            "MEMIT": (59.74, 58.36, 37.34, 71.06, 56.62),
            "FT-M": (79.54, 78.44, 25.03, 43.97, 56.75),
            "FT-M + Ours": (84.74, 81.41, 44.2, 75.67, 71.5),
            "LoRA": (18.54, 17.55, 6.63, 6.56, 12.32),
            "LoRA + Ours": (73.28, 72.39, 53.13, 69.36, 67.04),
            "MELO": (94.08, 80.47, 47.97, 98.8, 80.33),
            "MELO + Ours": (94.08, 80.94, 49.77, 98.8, 80.9),
            "WISE": (51.14, 43.36, 51.0, 100.0, 61.38),
            "WISE + Ours": (58.21, 53.22, 49.21, 100.0, 65.16),
        },
        100: {
            "ROME": (7.18, 6.02, 1.04, 2.24, 4.12),
            "MEMIT": (0.0, 0.0, 0.0, 0.0, 0.0),
            "FT-M": (78.79, 78.29, 13.7, 15.42, 46.55),
            "FT-M + Ours": (81.2, 77.87, 32.65, 44.66, 59.09),
            "LoRA": (1.75, 1.81, 1.29, 2.13, 1.74),
            "LoRA + Ours": (51.38, 50.3, 49.72, 35.83, 46.81),
            "MELO": (29.79, 28.83, 50.01, 98.8, 51.86),
            "MELO + Ours": (29.79, 28.73, 50.01, 98.8, 51.83),
            "WISE": (84.87, 74.87, 39.24, 100.0, 74.75),
            "WISE + Ours": (86.83, 77.54, 34.99, 100.0, 74.84),
        },
    },
}

_WIKIBIO: dict[str, dict[int, dict[str, tuple[float, ...]]]] = {
    LLAMA_2: {  # Table 4, WikiBio
        1: {
            "ROME": (96.41, 59.14, 77.78),
            "MEMIT": (93.78, 56.74, 75.26),
            "FT-M": (100.0, 90.04, 95.02),
            "FT-M + Ours": (100.0, 93.46, 96.73),
            "LoRA": (100.0, 48.84, 74.42),
            "LoRA + Ours": (97.68, 68.45, 83.06),
            "MELO": (99.97, 80.77, 90.37),
            "MELO + Ours": (99.68, 82.58, 91.13),
        },
        10: {
            "ROME": (40.55, 25.98, 33.27),
            "MEMIT": (52.2, 38.54, 45.37),
            "FT-M": (92.96, 77.69, 85.32),
            "FT-M + Ours": (95.26, 84.43, 89.84),
            "LoRA": (70.45, 46.82, 58.64),
            "LoRA + Ours": (74.74, 48.35, 61.55),
            "MELO": (95.44, 97.94, 96.69),
            "MELO + Ours": (95.24, 97.77, 96.5),
        },
        100: {
            "ROME": (2.63, 15.74, 9.18),
            "MEMIT": (0.0, 15.74, 7.87),
            "FT-M": (93.56, 67.51, 80.53),
            "FT-M + Ours": (95.35, 74.91, 85.13),
            "LoRA": (47.02, 27.06, 37.04),
            "LoRA + Ours": (52.96, 25.73, 39.34),
            "MELO": (48.88, 97.61, 48.88),
            "MELO + Ours": (52.17, 97.44, 74.81),
        },
    },
    LLAMA_3: {  # Table 5, WikiBio
        1: {
            "ROME": (92.43, 72.63, 82.53),
            "MEMIT": (96.26, 71.23, 83.75),
            "FT-M": (100.0, 92.96, 96.48),
            "FT-M + Ours": (99.99, 94.87, 97.43),
            "LoRA": (100.0, 59.77, 79.88),
            "LoRA + Ours": (98.16, 77.24, 87.7),
            "MELO": (100.0, 98.56, 99.28),
            "MELO + Ours": (99.98, 98.56, 99.27),
        },
        10: {
            "ROME": (4.01, 7.58, 5.79),
            "MEMIT": (5.4, 1.61, 3.5),
            "FT-M": (95.59, 87.45, 91.52),
            "FT-M + Ours": (96.81, 91.17, 93.99),
            "LoRA": (51.09, 44.45, 47.77),
            "LoRA + Ours": (64.26, 55.11, 59.69),
            "MELO": (94.77, 98.56, 96.67),
            "MELO + Ours": (94.91, 98.56, 96.74),
        },
        100: {
            "ROME": (0.88, 7.47, 4.18),
            "MEMIT": (0.01, 23.44, 11.73),
            "FT-M": (93.65, 85.83, 89.74),
            "FT-M + Ours": (94.23, 85.83, 94.23),
            "LoRA": (15.88, 17.61, 16.74),
            "LoRA + Ours": (19.03, 10.9, 14.96),
            "MELO": (52.19, 98.56, 75.37),
            "MELO + Ours": (52.15, 98.56, 75.36),
        },
    },
}

_MQUAKE: dict[str, dict[str, tuple[float, ...]]] = {
    LLAMA_2: {
        "FT-M": (100.0, 83.0, 30.0, 71.0),
        "FT-M + Ours": (99.86, 89.0, 37.0, 75.29),
        "LoRA": (100.0, 95.0, 39.0, 78.0),
        "LoRA + Ours": (99.75, 93.0, 48.0, 80.25),
    },
    LLAMA_3: {
        "FT-M": (100.0, 82.0, 24.0, 68.67),
        "FT-M + Ours": (100.0, 85.0, 30.0, 71.67),
        "LoRA": (100.0, 98.0, 35.0, 77.67),
        "LoRA + Ours": (100.0, 95.0, 40.0, 78.33),
    },
}

_ABLATION: dict[str, tuple[float, ...]] = {
    "LoRA": (100.0, 100.0, 23.34, 30.44, 63.45),
    "w/o clip": (100.0, 99.75, 26.6, 41.08, 66.86),
    "w/o dyn": (99.18, 97.67, 36.32, 51.57, 71.18),
    "w/o chk": (95.35, 86.51, 57.92, 90.08, 82.47),
    "w/o flt": (100.0, 83.93, 58.2, 90.36, 83.12),
    "+ Ours": (100.0, 94.31, 61.16, 87.2, 85.67),
}
