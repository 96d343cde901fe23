"""Every kernel of this machine, and what they are tried on."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from overtone import loss as loss_module
from overtone import overtone_loss
from overtone.functional import finite_std, reference_loss
from overtone.kernels.cpu import CpuKernel, library
from overtone.kernels.torch import TorchKernel

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SETTINGS = (
    {},
    {"n_sigma": None},
    {"check": False, "lam": 0.5},
    {"lam": 1.0, "epsilon": 0.0},
    {"lam": 0.0, "n_sigma": 1.0},
)
VARIANTS = [] if library() is None else library().VARIANTS
KERNELS = {"torch": TorchKernel(), **{f"cpu {name}": CpuKernel(index) for index, name in enumerate(VARIANTS)}}


def loss_by(kernel):
    """overtone_loss for which this kernel is chosen, whatever the logits."""

    def loss(logits, labels, **arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss_module, "choose", lambda logits, shard: kernel)
            return overtone_loss(logits, labels, **arguments)

    return loss


every_kernel = pytest.mark.parametrize("loss", [loss_by(kernel) for kernel in KERNELS.values()], ids=KERNELS)


def draw_tokens(rows, vocabulary, seed=0, spread=3.0, dtype=torch.float64):
    """Logits (rows, vocabulary) and labels of which the first third is well predicted."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * spread
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    confident = range(0, rows, 3)
    logits[confident, labels[::3]] += 4 * spread
    return logits.to(dtype), labels


@st.composite
def problems(draw):
    """Logits with ties, banned tokens and ignored rows, and any setting of the loss."""
    rows, vocabulary = draw(st.integers(0, 6)), draw(st.integers(1, 9))
    # The numbers come from a seed: to draw each by itself would take ten times as long as the losses do.
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    whole, real = (torch.rand(2, rows, vocabulary, generator=generator, dtype=torch.float64) - 0.5) * 40
    kind = torch.randint(3, (rows, vocabulary), generator=generator)
    kind[kind == 1] = draw(st.integers(0, 1))  # whole numbers alone have ties at their top
    labels = torch.randint(vocabulary, (rows, 1), generator=generator)
    kind.scatter_(1, labels, kind.gather(1, labels).clamp(max=1))  # a label is not banned
    logits = torch.where(kind == 0, (whole / 9).round(), torch.where(kind == 1, real, -math.inf))
    labels = labels.squeeze(1).masked_fill(torch.rand(rows, generator=generator) < 0.25, -100)
    share = st.one_of(st.sampled_from([0.0, 1e-18, 0.1, 0.5, 1.0]), st.floats(0, 1))
    arguments = {
        "epsilon": draw(st.one_of(st.just(0.0), st.floats(0, 2))),
        "n_sigma": draw(st.one_of(st.none(), st.floats(0.01, 4))),
        "lam": draw(share),
        "check": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
    }
    return logits, labels, arguments


def margin_to_a_decision(logits, labels, arguments):
    """How near the row comes to a filter border, a tie in the check or the clip, where rounding may decide."""
    counted = labels != -100
    s, y = logits[counted], labels[counted].unsqueeze(1)
    margins = [math.inf]
    top = s.amax(dim=1, keepdim=True)
    kept = torch.ones_like(s, dtype=torch.bool)
    if arguments["n_sigma"] is not None:
        border = (s - (top - arguments["n_sigma"] * finite_std(s))).abs()
        margins += border[(s < top) & s.isfinite()].tolist()
        kept = (s > top - arguments["n_sigma"] * finite_std(s)) | (s == top)
    filtered = s.masked_fill(~kept, -math.inf).softmax(dim=1)
    lam = arguments["lam"]
    candidate = (1 - lam) * filtered + lam * F.one_hot(y.squeeze(1), s.shape[1])
    rival = candidate.scatter(1, y, -math.inf).amax(dim=1, keepdim=True)
    lead = (candidate.gather(1, y) - rival).abs()
    tied = s.gather(1, y) == s.scatter(1, y, -math.inf).amax(dim=1, keepdim=True)
    margins += lead[~tied].tolist()
    kl = reference_loss(logits, labels, **{**arguments, "epsilon": 0.0, "reduction": "none"})[counted]
    margins += (kl - arguments["epsilon"]).abs()[kl > 0].tolist() if arguments["epsilon"] > 0 else []
    return min(margins)
