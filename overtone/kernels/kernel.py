"""What every kernel offers: the fit of a call's tokens, and the gradient of their logits."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from overtone.checks import Reduction


class Target(NamedTuple):
    """What decides the target of a token; as in `overtone.overtone_loss`."""

    n_sigma: float | None
    lam: float
    check: bool


class Clip(NamedTuple):
    """What decides whether a token is settled: `overtone.hold.is_settled`."""

    epsilon: float
    correct_only: bool


class Fit(NamedTuple):
    """What a call says of its tokens.

    Attributes:
        loss: ``()``, or ``(N,)`` for reduction "none": the clipped KLs, reduced.
        kl: ``(N,)``, before the clip, in nats; 0 where ignored.
        coefficients: ``(5, N)``, what the gradient needs, as `overtone.kernels.closed_form.fit_rows` has them; the last
            is 1 where the label is strictly the most probable token.
        row_weights: ``(N,)``, what the gradient of each KL is multiplied by: 0 where settled or ignored.
    """

    loss: Tensor
    kl: Tensor
    coefficients: Tensor
    row_weights: Tensor


class Kernel(Protocol):
    """One way to work the loss out.

    Attributes:
        gradient_with_fit_up_to: logits of a call up to which it pays to work the gradient out in the fit, while they
            are at hand, though the backward pass may want another.
    """

    gradient_with_fit_up_to: int

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
        """KL(target || softmax(logits)) of each row, and the loss.

        Args:
            logits: ``(N, V)``.
            labels: ``(N,)``, int64.
            target, clip: the settings of the loss.
            reduction: "mean", "sum" or "none".
            ignore_index: label of rows that do not count.
            scale: what the loss is multiplied by.
            gradient: ``(N, V)``, to write the loss's gradient to: the logits themselves or a tensor that shares no
                memory with them. None where it is not wanted.

        Raises:
            ValueError: for a label out of range, on the CPU; elsewhere looking would cost a synchronisation.
        """

    def gradient(self, grad_kl: Tensor, logits: Tensor, labels: Tensor, coefficients: Tensor, *, out: Tensor) -> None:
        """Write ``grad_kl * dKL/dlogits`` into out; exact zeros where grad_kl is 0.

        Args:
            grad_kl: ``(N,)``.
            logits: ``(N, V)`` as of `fit`, or a slice of their vocabulary.
            labels: ``(N,)``, counted from the beginning of the slice; one that is not in it is no part of its row.
            coefficients: ``(5, N)``, of `fit`.
            out: like logits, in whose place it may be.
        """


class KernelOfParts(Kernel, Protocol):
    """A kernel that also sums up a slice of the vocabulary of rows whose rest is elsewhere."""

    def highest(self, logits: Tensor) -> Tensor:
        """The maximum ``(N,)`` of each row of a slice of the vocabulary; infinity where a logit is NaN."""

    def sums(self, logits: Tensor, top: Tensor) -> Tensor:
        """Sums ``(5, N)`` over a slice of rows of which the whole's top ``(N,)`` is known.

        Count, mean and sum of squared deviations of the logits that count for the standard deviation; the sum of
        exp(logit - top) below the top; and how many logits are at the top.
        """

    def kept(self, logits: Tensor, top: Tensor, threshold: Tensor) -> Tensor:
        """Sum ``(N,)`` of exp(logit - top) over what the filter keeps below the top, in a slice of the rows."""
