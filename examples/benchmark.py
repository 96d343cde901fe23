"""Time and memory of the loss against F.cross_entropy, forward and backward, on the same logits.

    python examples/benchmark.py
    python examples/benchmark.py --sizes 8x128256 512x128256 --dtypes float32 bfloat16 --csv benchmark.csv

Times are medians of rounds in which every loss runs once after the other, and ratios are medians of each round's ratio,
so that what else the machine does falls on all of them. Peak memory is what the process held at most beyond the logits,
in units of one gradient buffer, each measured in a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import overtone

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.cross_entropy": F.cross_entropy,
    "overtone_loss": overtone.overtone_loss,
    "literal reference": overtone.functional.reference_loss,
}
BASELINE = "F.cross_entropy"


def make_tokens(size: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random logits (N, V) and labels (N,), every second one well predicted."""
    rows, vocabulary = (int(number) for number in size.split("x"))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator).mul_(2)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    logits[torch.arange(0, rows, 2), labels[::2]] += 16
    return logits.to(dtype).requires_grad_(), labels


def step(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> float:
    """Milliseconds of one forward and backward."""
    logits.grad = None
    start = time.perf_counter()
    loss(logits, labels).backward()
    return (time.perf_counter() - start) * 1e3


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def peak_buffers(name: str, size: str, dtype: torch.dtype) -> float:
    """Peak memory beyond the logits, in gradient buffers. Runs in a process of its own."""
    logits, labels = make_tokens(size, dtype)
    warm_logits, warm_labels = make_tokens("2x1000", dtype)
    step(LOSSES[name], warm_logits, warm_labels)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mib("VmRSS")
    step(LOSSES[name], logits, labels)
    return (resident_mib("VmHWM") - before) * 2**20 / (logits.numel() * logits.element_size())


def measure(size: str, dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    """One row a loss: median milliseconds, ratio to cross-entropy, peak memory."""
    logits, labels = make_tokens(size, dtype)
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(rounds + 1):
        for name, loss in LOSSES.items():
            times[name].append(step(loss, logits, labels))
    rows: list[dict[str, object]] = []
    for name in LOSSES:
        own, base = times[name][1:], times[BASELINE][1:]
        peak = "-"
        if sys.platform == "linux":
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                peak = f"{pool.submit(peak_buffers, name, size, dtype).result():.2f}"
        rows.append(
            {
                "size": size,
                "dtype": str(dtype).removeprefix("torch."),
                "loss": name,
                "ms": f"{statistics.median(own):.2f}",
                "times cross-entropy": f"{statistics.median(a / b for a, b in zip(own, base, strict=True)):.2f}",
                "peak gradient buffers": peak,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8x32000", "512x32000"], metavar="NxV")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    grid = [(size, getattr(torch, dtype)) for size in arguments.sizes for dtype in arguments.dtypes]
    rows = [row for size, dtype in track(grid, "measuring") for row in measure(size, dtype, arguments.rounds)]
    table = Table(*rows[0], title=f"forward + backward, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
