"""The loss of logits whose vocabulary is spread over ranks, against gathering them and torch's own cross-entropy.

    torchrun --nproc-per-node 2 examples/benchmark_sharded.py --sizes 64x151936 512x32000

One forward and backward pass on each rank; all contenders take turns, and the ratios are those of a round. Memory is
the peak of rank 0 in units of its part of the logits.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from benchmark import peak_bytes, run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F

from overtone import overtone_loss

Context = Callable[[], AbstractContextManager[None]]
Loss = Callable[[Tensor, Tensor], Tensor]


def of_all_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Gathered on every rank."""
    return overtone_loss(logits.full_tensor(), labels)  # type: ignore[attr-defined]


YARDSTICK = "loss_parallel cross-entropy"
CONTENDERS: dict[str, tuple[Context, Loss]] = {
    YARDSTICK: (loss_parallel, F.cross_entropy),
    "overtone_loss": (nullcontext, overtone_loss),
    "overtone_loss, gathered": (nullcontext, of_all_logits),
}


def measure(tokens: int, vocabulary: int, dtype: str, rounds: int) -> list[dict[str, object]]:
    """A row for each contender; the first round is not counted."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    part = (3 * torch.randn(tokens, vocabulary // ranks)).to(getattr(torch, dtype))
    logits: Tensor = DTensor.from_local(part, mesh, [Shard(1)]).requires_grad_()
    labels = torch.arange(tokens)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds + 1):
        for name, (context, loss) in CONTENDERS.items():
            logits.grad = None
            dist.barrier()
            with context():
                times[name].append(run(loss, [logits, labels]))
    rows: list[dict[str, object]] = []
    for name, (context, loss) in CONTENDERS.items():
        ratios = [own / other for own, other in zip(times[name][1:], times[YARDSTICK][1:], strict=True)]
        with context():
            peak = peak_bytes(loss, [logits, labels])
        rows.append(
            {
                "ranks": ranks,
                "size": f"{tokens}x{vocabulary}",
                "dtype": dtype,
                "contender": name,
                "ms": f"{statistics.median(times[name][1:]):.1f}",
                "ratio": f"{statistics.median(ratios):.2f}",
                "memory": f"{peak / part.nbytes:.2f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="The loss of a vocabulary that is spread over ranks.")
    parser.add_argument("--sizes", nargs="+", default=["64x151936", "512x32000"], help="tokens x vocabulary")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--csv", type=Path, help="file to append to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows: list[dict[str, object]] = []
    for size in arguments.sizes:
        tokens, vocabulary = map(int, size.split("x"))
        for dtype in arguments.dtypes:
            rows += measure(tokens, vocabulary, dtype, arguments.rounds)
    if dist.get_rank() == 0:
        is_new = arguments.csv is None or not arguments.csv.exists()
        with arguments.csv.open("a") if arguments.csv else sys.stdout as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            if is_new:
                writer.writeheader()
            writer.writerows(rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
