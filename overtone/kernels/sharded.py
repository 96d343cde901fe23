"""The kernel for logits whose vocabulary is spread over ranks: each sums up its own part, and the sums are exchanged.

A row takes three exchanges of a few numbers in the forward pass, whatever the size of the vocabulary, and none in the
backward pass: the maximum; the moments for the standard deviation with the sums that need nothing else; and the sum
over what the filter keeps, which is known only then.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from overtone.checks import Reduction, check_labels, working_dtype
from overtone.kernels.closed_form import RowSums, TargetTensors, filter_threshold, fit_sums
from overtone.kernels.kernel import Clip, Fit, KernelOfParts, Target
from overtone.kernels.torch import reduced_fit, target_tensors, without_autocast

if TYPE_CHECKING:
    from overtone.shard import VocabularyShard


class ShardedKernel:
    """`overtone.kernels.kernel.Kernel` for this rank's part ``(N, V_local)`` of the logits.

    Labels are those of the whole vocabulary and the same on all ranks, as are the results but for the gradient.

    Args:
        shard: where the part lies.
        own: the kernel for the part by itself, which gives its gradient.
    """

    gradient_with_fit_up_to = 0

    def __init__(self, shard: VocabularyShard, own: KernelOfParts) -> None:
        self._shard = shard
        self._own = own

    def fit(
        self,
        logits: Tensor,
        labels: Tensor,
        target: Target,
        clip: Clip,
        *,
        reduction: Reduction,
        ignore_index: int,
        scale: float = 1.0,
        gradient: Tensor | None = None,
    ) -> Fit:
        """As `overtone.kernels.kernel.Kernel.fit`, and in it three exchanges with the other ranks."""
        if logits.device.type == "cpu":
            check_labels(labels, self._shard.size, ignore_index)
        tensors = target_tensors(target, logits)
        with without_autocast(logits):
            kl, coefficients = fit_sums(self._sums(logits, labels, tensors), tensors)
        counted = labels != ignore_index
        kl, coefficients = kl.where(counted, 0), coefficients.where(counted, 0)
        fit = reduced_fit(kl, coefficients, counted, clip, reduction, scale)
        if gradient is not None:
            self.gradient(fit.row_weights, logits, labels, coefficients, out=gradient)
        return fit

    def gradient(self, grad_kl: Tensor, logits: Tensor, labels: Tensor, coefficients: Tensor, *, out: Tensor) -> None:
        """As `overtone.kernels.kernel.Kernel.gradient`, of this rank's part, by itself."""
        if logits.shape[1]:
            self._own.gradient(grad_kl, logits, labels - self._shard.start, coefficients, out=out)

    def _sums(self, logits: Tensor, labels: Tensor, target: TargetTensors) -> RowSums:
        dtype = working_dtype(logits)
        rows, width = logits.shape
        top = self._own.highest(logits) if width else logits.new_full((rows,), -math.inf, dtype=dtype)
        self._shard.maximum(top)

        # One column more than rows: where the part lies.
        place = top.new_tensor([self._shard.start, width, 0, 0, 0, 0])
        own = top.new_zeros(6, rows)
        own[5] = -math.inf  # the label's logit where it is here
        if width:
            own[:5] = self._own.sums(logits, top)
            position = labels - self._shard.start
            label = logits.gather(1, position.clamp(0, width - 1).unsqueeze(1)).squeeze(1).to(dtype)
            own[5] = torch.where((position >= 0) & (position < width), label, own[5])
        parts = self._shard.gathered(torch.cat([own, place.unsqueeze(1)], dim=1))
        if logits.device.type == "cpu":
            self._shard.require_tiles(parts[:, :2, -1])
        parts = parts[..., :-1]
        count, mean, squares = parts[0, :3]
        for other_count, other_mean, other_squares in parts[1:, :3]:
            count, mean, squares = _merged(count, mean, squares, other_count, other_mean, other_squares)
        standard_deviation = (squares / (count - 1).clamp(min=1)).sqrt()
        below, on_top = parts[:, 3].sum(dim=0), parts[:, 4].sum(dim=0)
        label = parts[:, 5].amax(dim=0)
        threshold = filter_threshold(top, standard_deviation, target)

        kept_below = self._own.kept(logits, top, threshold) if width else torch.zeros_like(top)
        self._shard.total(kept_below)
        return RowSums(top, label, threshold, below, kept_below, on_top + (top - top))


def _merged(
    count: Tensor, mean: Tensor, squares: Tensor, other_count: Tensor, other_mean: Tensor, other_squares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of two parts together, from theirs (Chan, Golub and LeVeque 1979): no digits cancel."""
    total = count + other_count
    share = other_count / total.clamp(min=1)
    difference = other_mean - mean
    return total, mean + difference * share, squares + other_squares + difference.square() * count * share
