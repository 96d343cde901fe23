"""What the loss costs: on logits, on hidden states, and in whole edits.

    python examples/benchmark.py --csv benchmark.csv
    python examples/benchmark.py --tables logits --against ../overtone-before    # another tree's loss beside it

Times are of one forward and backward: medians of rounds in which all contenders take turns, after one that builds;
ratios, medians of each round's ratio to the first. Memory is the most held beyond the inputs ("-": too little to see),
also in units of the logits' gradient or, of hidden states, beyond the gradients as a share of the logits.
"""

import argparse
import contextlib
import csv
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from resource import getpagesize

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import overtone

Loss = Callable[..., Tensor]
Row = dict[str, str]
SECONDS_A_CASE = 12  # after which a case makes no further rounds
MMAP_THRESHOLD = -3  # mallopt's name for the size from which on freed memory goes back to the system at once
COLUMNS = ["table", "case", "contender", "ms", "p20", "p80", "ratio", "MiB", "memory", "steps"]
LOGITS_LOSSES: dict[str, Loss] = {"F.cross_entropy": F.cross_entropy, "overtone_loss": overtone.overtone_loss}
with contextlib.suppress(ImportError):
    LOGITS_LOSSES["Liger"] = import_module("liger_kernel.transformers").LigerCrossEntropyLoss()
LOGITS_LOSSES["literal reference"] = overtone.functional.reference_loss


def hidden_losses() -> dict[str, Loss]:
    """Cross-entropy of hidden states (N, H), weight (V, H) and labels (N,) by every library that is here; ours last."""
    losses: dict[str, Loss] = {"F.linear, F.cross_entropy": lambda h, w, y: F.cross_entropy(F.linear(h, w), y)}
    if hasattr(F, "linear_cross_entropy"):
        chunked = torch.nn.LinearCrossEntropyOptions()
        losses["F.linear_cross_entropy"] = lambda h, w, y: F.linear_cross_entropy(h, w, y, options=chunked)
    with contextlib.suppress(ImportError):
        liger = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
        losses["Liger"] = lambda h, w, y: liger(w, h, y)
    with contextlib.suppress(ImportError):
        losses["cut-cross-entropy"] = import_module("cut_cross_entropy").linear_cross_entropy
    with contextlib.suppress(ImportError, AttributeError):
        log_probs = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction.apply
        chunk = import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
        losses["TRL's fused head"] = lambda h, w, y: -log_probs(h, w, None, y, 1.0, chunk, None, 1.0, ())[0].mean()
    return {**losses, "linear_overtone_loss": overtone.linear_overtone_loss}


def loss_of_tree(folder: Path) -> Loss:
    """overtone_loss as another checkout has it, whose modules are then out of the way again."""
    own = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "overtone"}
    sys.path.insert(0, str(folder))
    try:
        loss: Loss = import_module("overtone").overtone_loss
        for dtype in (torch.float32, torch.bfloat16):  # what it imports at its first call is found now
            loss(torch.zeros(2, 2**16, dtype=dtype, requires_grad=True), torch.zeros(2, dtype=torch.long)).backward()
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "overtone"]:
            del sys.modules[name]
        sys.modules.update(own)
    return loss


def run(loss: Loss, inputs: list[Tensor]) -> float:
    """Milliseconds of one forward and backward."""
    inputs[0].grad = inputs[1].grad = None
    if inputs[0].is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss(*inputs).backward()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    before = time.perf_counter()
    loss(*inputs).backward()
    return (time.perf_counter() - before) * 1e3


def peak_bytes(loss: Loss, inputs: list[Tensor]) -> float:
    """Held at most beyond the inputs in one forward and backward, on CUDA or Linux."""
    inputs[0].grad = inputs[1].grad = None
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run(loss, inputs)
        return torch.cuda.max_memory_allocated() - held
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be used without being seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    held = int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()
    run(loss, inputs)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**25)
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 - held


def measure(case: str, losses: dict[str, Loss], inputs: list[Tensor], rounds: int) -> Iterator[tuple[Row, float]]:
    """A row for each loss, and its peak bytes; Liger, which overwrites its logits, has its own."""
    times: dict[str, list[float]] = {name: [] for name in losses}
    failures: dict[str, str] = {}
    own = {name: [inputs[0].detach().clone().requires_grad_(), *inputs[1:]] for name in losses if name == "Liger"}
    end = time.perf_counter() + SECONDS_A_CASE
    while len(baseline := next(iter(times.values()))) < 2 or (len(baseline) <= rounds and time.perf_counter() < end):
        for name in [name for name in losses if name not in failures]:
            try:
                times[name].append(run(losses[name], own.get(name, inputs)))
            except Exception as error:  # whatever another library's kernel raises on a device that it is not made for
                failures[name] = "needs a GPU" if "active driver" in str(error) else type(error).__name__
    for name, loss in losses.items():
        row, peak = {"case": case, "contender": name, **dict.fromkeys(COLUMNS[3:8], "-")}, float("nan")
        if name in failures:
            row["ms"] = failures[name]
        else:
            quantiles = torch.tensor(times[name][1:]).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
            row |= zip(("ms", "p20", "p80"), (f"{value:.4g}" for value in quantiles), strict=True)
            ratios = (time / first for time, first in zip(times[name][1:], baseline[1:], strict=True))
            peak = peak_bytes(loss, own.get(name, inputs))
            row |= {"ratio": f"{statistics.median(ratios):.2f}", "MiB": f"{peak / 2**20:.1f}"}
        yield row, peak


def logits_table(arguments: argparse.Namespace) -> Iterator[Row]:
    """Random logits, every second row's label well predicted."""
    for size, dtype in product(arguments.sizes, arguments.dtypes):
        rows, vocabulary = map(int, size.split("x"))
        generator = torch.Generator().manual_seed(0)
        random, labels = torch.randn(rows, vocabulary, generator=generator) * 2, torch.arange(rows) * 7 % vocabulary
        random[torch.arange(0, rows, 2), labels[::2]] += 16
        logits = random.to(arguments.device, getattr(torch, dtype)).requires_grad_()
        inputs = [logits, labels.to(logits.device)]
        losses = {name: loss for name, loss in LOGITS_LOSSES.items() if name in (arguments.only or [name])}
        for row, peak in measure(f"{size} {dtype}", losses, inputs, arguments.rounds):
            is_seen = row["ratio"] != "-" and (logits.is_cuda or logits.nbytes > 2**24)
            yield row | ({"memory": f"{peak / logits.nbytes:.2f}"} if is_seen else {"MiB": "-", "memory": "-"})


def hidden_table(arguments: argparse.Namespace) -> Iterator[Row]:
    """Random hidden states and an output layer, frozen or trained."""
    for size, dtype, is_trained in product(arguments.hidden_sizes, arguments.dtypes, (False, True)):
        rows, vocabulary, width = map(int, size.split("x"))
        generator, where = torch.Generator().manual_seed(0), (arguments.device, getattr(torch, dtype))
        hidden = torch.randn(rows, width, generator=generator).to(*where).requires_grad_()
        weight = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).to(*where)
        inputs = [hidden, weight.requires_grad_(is_trained), torch.arange(rows, device=hidden.device) * 7 % vocabulary]
        gradients = hidden.nbytes + is_trained * weight.nbytes
        case = f"{size} {dtype}, {'trained' if is_trained else 'frozen'} weight"
        losses = {name: loss for name, loss in hidden_losses().items() if name in (arguments.only or [name])}
        for row, peak in measure(case, losses, inputs, arguments.rounds):
            share = max(0, peak - gradients) / (rows * vocabulary * hidden.element_size())
            yield {**row, "memory": "-" if row["ratio"] == "-" else f"{share:.1%}"}


def edits_table(arguments: argparse.Namespace) -> Iterator[Row]:
    """Edits of the lab's model on one thread, with the lab's methods and, with EASYEDIT_ROOT set, EasyEdit's."""
    from overtone.lab.data.corpora import open_corpus
    from overtone.lab.edit.sessions import open_session
    from overtone.lab.model.pretrain import load_or_train
    from overtone.lab.model.workplace import Workplace
    from overtone.lab.run.workers import one_thread
    from overtone.token_loss import parse

    lab_model = load_or_train(world := open_corpus("short", seed=0))
    workplace, edits = Workplace(lab_model.model, lab_model.tokenizer), world.edits(10, seed=0)
    losses = [parse(spec) for spec in ("cross_entropy", "overtone", "overtone:hold=settled", "overtone_recommended")]
    for method in ("ft-m", "lora", "easyedit-ft", "easyedit-lora"):
        try:
            with open_session(workplace, method, None, 0):
                pass
        except (ImportError, ValueError) as error:
            Console().print(f"left out: {error}")
            continue
        traces: dict[str, list[tuple[float, int]]] = {loss.title: [] for loss in losses}
        for (index, edit), loss in product(enumerate(edits), losses):
            with one_thread(), open_session(workplace, method, None, index) as session:
                trace = session.apply(edit, loss)
                traces[loss.title].append((trace.seconds * 1e3, trace.steps))
        for title, own in traces.items():
            ratio = statistics.median(a / b for (a, _), (b, _) in zip(own, traces[losses[0].title], strict=True))
            ms, steps = (f"{statistics.mean(values):.4g}" for values in zip(*own, strict=True))
            yield {"case": method, "contender": title, "ms": ms, "ratio": f"{ratio:.2f}", "steps": steps}


def main() -> None:
    tables = {"logits": logits_table, "hidden": hidden_table, "edits": edits_table}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=list(tables), choices=list(tables))
    parser.add_argument("--sizes", nargs="+", default=["8x600", "8x32000", "8x128256", "2048x32000", "512x128256"])
    parser.add_argument("--hidden-sizes", nargs="+", default=["4096x32000x128"], metavar="NxVxH")
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help="of logits or hidden states, by name")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, whose overtone_loss runs too")
    parser.add_argument("--csv", type=Path, help="also write every row here")
    arguments = parser.parse_args()
    if arguments.against:
        LOGITS_LOSSES["overtone_loss of --against"] = loss_of_tree(arguments.against)
    written: list[Row] = []
    for name in arguments.tables:
        rows = list(tables[name](arguments))
        table = Table(*rows[0], title=f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        for row in rows:
            table.add_row(*row.values())
        Console().print(table)
        written += [{"table": name, **row} for row in rows]
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerows([dict(zip(COLUMNS, COLUMNS, strict=True)), *written])


if __name__ == "__main__":
    main()
