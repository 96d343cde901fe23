"""What every kernel guarantees: one suite over all of them, against the literal reference and against torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from gradients import value_and_gradient
from hypothesis import assume, example, given, settings
from kernel_cases import (
    FLOATS,
    KERNELS,
    SETTINGS,
    draw_tokens,
    every_kernel,
    loss_by,
    margin_to_a_decision,
    problems,
)

from overtone import linear, linear_overtone_loss, overtone_loss
from overtone import loss as loss_module
from overtone.functional import reference_loss
from overtone.kernels import Clip, Target
from overtone.kernels import torch as torch_kernel

BELOW_ZERO = (
    torch.tensor([[-math.inf, 0.0, 1.0, -1.0]], dtype=torch.float64),
    torch.tensor([1]),
    {"epsilon": 0.0, "n_sigma": None, "lam": 1e-9, "check": False, "reduction": "none"},
)
"""A KL that the literal loss rounds to a little below 0, with a gradient that is not 0."""


class TestAgainstTheReference:
    @settings(max_examples=500, deadline=None)
    @given(problems())
    @example(BELOW_ZERO)
    def test_value_and_gradient_are_equal_to_1e_12(self, problem):
        """Wherever rounding does not decide a branch, for any settings, ties, banned tokens and ignored rows."""
        logits, labels, arguments = problem
        assume(margin_to_a_decision(logits, labels, arguments) > 1e-9)
        expected, expected_gradient = value_and_gradient(reference_loss, logits, labels, **arguments)
        for name, kernel in KERNELS.items():
            value, gradient = value_and_gradient(loss_by(kernel), logits, labels, **arguments)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, msg=name)
            torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12, msg=name)

    @every_kernel
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("vocabulary", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 252, 1023, 1024, 1025, 5000])
    def test_odd_sizes(self, loss, dtype, vocabulary):
        """Vectors, pairs of them and chunks that a row fills, does not fill, or goes beyond.

        Each in all settings and all reductions; a setting and a reduction meet in some of the sizes.
        """
        logits, labels = draw_tokens(7, vocabulary, dtype=dtype)
        labels[4] = -100
        for number, own in enumerate(SETTINGS):
            arguments = {**own, "reduction": ("none", "mean", "sum")[(vocabulary + number) % 3]}
            value, gradient = value_and_gradient(loss, logits, labels, **arguments)
            expected, expected_gradient = value_and_gradient(reference_loss, logits.double(), labels, **arguments)
            # A few roundings of float32, and for the gradient one of the logits' own precision.
            torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
            epsilon = torch.finfo(dtype).eps
            torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2 * epsilon + 2e-6, atol=4e-7)

    @every_kernel
    @pytest.mark.parametrize(("rows", "vocabulary"), [(40, 20_011), (3, 600_000)])
    def test_long_rows(self, loss, rows, vocabulary):
        """Rows that fill many blocks, or more than one each."""
        logits, labels = draw_tokens(rows, vocabulary)
        expected, expected_gradient = value_and_gradient(reference_loss, logits, labels, reduction="none")
        value, gradient = value_and_gradient(loss, logits, labels, reduction="none")
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)

    @every_kernel
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_hard_rows(self, loss, dtype, reduction):
        """Infinite, tied and missing logits, with the label on either side, in the first chunk of a row or the second.

        Of reduction "none" the gradient comes in the backward pass.
        """
        generator = torch.Generator().manual_seed(3)
        plain = torch.randn(4, 1500, generator=generator) * 2
        labels = torch.tensor([3, 7, 1100, 1300])
        tied, banned, alone = torch.zeros_like(plain), plain.clone(), torch.full_like(plain, -torch.inf)
        banned[:, 2:1100:3] = -torch.inf
        alone[range(4), labels] = 1.0
        tops = plain.clone()
        tops[:, [7, 1200]] = 12.0
        # One kind of row at a time, or the mean over them hides what one of them gives.
        nan, infinite, infinite_label, impossible = (plain.clone() for _ in range(4))
        nan[1, 2], infinite[2, 5], infinite_label[3, 1300], impossible[0, 3] = (
            torch.nan,
            torch.inf,
            torch.inf,
            -torch.inf,
        )
        huge = plain * (500 if dtype == torch.float16 else 1e4)
        for logits in (tied, tops, banned, alone, nan, infinite, infinite_label, impossible, plain[:1], huge):
            own = labels[: len(logits)]
            for own_settings in SETTINGS:
                arguments = {**own_settings, "reduction": reduction}
                value, gradient = value_and_gradient(loss, logits.to(dtype), own, **arguments)
                exact = logits.to(dtype).double()
                expected, expected_gradient = value_and_gradient(reference_loss, exact, own, **arguments)
                torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6, equal_nan=True)
                broken = expected_gradient.isnan().any(dim=1)
                assert torch.equal(gradient.isnan().any(dim=1), broken)
                epsilon = torch.finfo(dtype).eps
                torch.testing.assert_close(
                    gradient[~broken].double(), expected_gradient[~broken], rtol=2 * epsilon + 4e-6, atol=4e-7
                )


class TestDecisions:
    @every_kernel
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ban", [-math.inf, -1e4, -1e9, "finfo.min"])
    def test_finite_bans_are_bans(self, loss, dtype, ban):
        """Tokens that are banned with a number widen the filter no more than those at -inf."""
        logits = (torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
        labels = logits[:, :56].argmax(dim=1)
        logits[:, 56:] = torch.finfo(dtype).min if ban == "finfo.min" else ban
        value, gradient = value_and_gradient(loss, logits, labels)
        without, without_gradient = value_and_gradient(loss, logits[:, :56], labels)
        literal = value_and_gradient(reference_loss, logits.double(), labels)
        torch.testing.assert_close(value, without, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient[:, :56], without_gradient, rtol=1e-5, atol=1e-7)
        assert not gradient[:, 56:].any()
        torch.testing.assert_close(value.double(), literal[0], rtol=2e-6, atol=0)
        assert value > 0.05

    @every_kernel
    def test_what_is_just_probable_enough_takes_part(self, loss):
        """87 below the top a logit widens the filter, 88 below it does not: the border is that of float32, 87.33."""
        for distance, kept in ((87.0, 2), (88.0, 1)):
            logits = torch.tensor([[0.0, -20.0, -distance]])
            gradient = value_and_gradient(loss, logits, torch.tensor([0]), epsilon=0, n_sigma=0.5)[1]
            # A kept token's share in the target is taken off its gradient.
            p = logits.double().softmax(dim=1)[0, 1].item()
            assert gradient[0, 1].item() == pytest.approx(0.1 * p if kept == 2 else p, rel=1e-4)

    @every_kernel
    def test_settled_tokens_are_let_go(self, loss):
        """A settled token's gradient is exactly zero and its value exactly epsilon; the others are as without clip."""
        logits, labels = draw_tokens(60, 40)
        value, gradient = value_and_gradient(loss, logits, labels, epsilon=0.05, reduction="none")
        free_value, free_gradient = value_and_gradient(loss, logits, labels, epsilon=0, reduction="none")
        settled = free_value < 0.05
        assert 0 < settled.sum() < 60
        assert (value[settled] == 0.05).all()
        assert (gradient[settled] == 0).all()
        assert torch.equal(value[~settled], free_value[~settled])
        assert torch.equal(gradient[~settled], free_gradient[~settled])

    @every_kernel
    def test_a_logit_on_the_border_is_dropped(self, loss):
        """At the top less n_sigma standard deviations, here 1 - 1 * 1 exactly, it is noise, as in Algorithm 1."""
        logits, labels = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0])
        arguments = {"n_sigma": 1.0, "epsilon": 0.0}
        value, gradient = value_and_gradient(loss, logits, labels, **arguments)
        expected, expected_gradient = value_and_gradient(reference_loss, logits, labels, **arguments)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, expected_gradient)
        assert gradient[0, 1] == pytest.approx(logits[0].softmax(dim=0)[1].item())

    @every_kernel
    @pytest.mark.parametrize("banned", [1, 2, 4])
    def test_mean_over_labels_that_are_banned_with_a_number(self, loss, banned):
        """Each costs as much as float32 can hold; their mean is no more than that."""
        logits, labels = draw_tokens(4, 7, dtype=torch.float32)
        logits[range(banned), labels[:banned]] = torch.finfo(torch.float32).min
        value, gradient = value_and_gradient(loss, logits, labels)
        expected, expected_gradient = value_and_gradient(reference_loss, logits.double(), labels)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)


class TestPrecision:
    @every_kernel
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_gradient_is_as_good_as_cross_entropy(self, loss, dtype):
        """The error against float64 is no larger than that of F.cross_entropy in the same precision, plus 1e-3."""
        logits, labels = draw_tokens(200, 503, dtype=dtype)
        exact = value_and_gradient(reference_loss, logits.double(), labels, reduction="sum")[1]
        gradient = value_and_gradient(loss, logits, labels, reduction="sum")[1]
        yardstick_exact = value_and_gradient(F.cross_entropy, logits.double(), labels, reduction="sum")[1]
        yardstick = value_and_gradient(F.cross_entropy, logits, labels, reduction="sum")[1]
        error = (gradient.double() - exact).abs().max()
        assert gradient.dtype == dtype
        assert error <= (yardstick.double() - yardstick_exact).abs().max() + 1e-3

    @every_kernel
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("lam", [0.1, 1.0])
    def test_confident_tokens_keep_their_gradient(self, loss, dtype, lam):
        """With p_y from 0.9 to 1 - 1e-6 the true token's gradient is within 1%; p - 1 in low precision loses it all."""
        leads = torch.linspace(math.log(9), math.log(1e6), 40)
        logits = torch.zeros(40, 1000).to(dtype)
        logits[:, 0] = (leads + math.log(999)).to(dtype)
        labels = torch.zeros(40, dtype=torch.long)
        arguments = {"epsilon": 0.0, "lam": lam, "reduction": "sum"}
        exact = value_and_gradient(reference_loss, logits.double(), labels, **arguments)[1][:, 0]
        gradient = value_and_gradient(loss, logits, labels, **arguments)[1][:, 0].double()
        assert ((gradient - exact).abs() <= 0.01 * exact.abs()).all()

    @every_kernel
    @pytest.mark.parametrize(("dtype", "lead"), [(torch.float32, 20.0), (torch.float32, 60.0), (torch.float64, 40.0)])
    def test_confident_tokens_keep_their_value(self, loss, dtype, lead):
        """With lam 1 the loss of p_y near 1 is -log p_y to 1e-6 of itself, not a rounding of 1."""
        logits = torch.tensor([[lead, 0.0, 0.0]], dtype=dtype)
        value = loss(logits, torch.tensor([0]), epsilon=0.0, lam=1.0)
        assert value.item() == pytest.approx(math.log1p(2 * math.exp(-lead)), rel=1e-6, abs=0)

    @every_kernel
    def test_never_below_zero(self, loss):
        """A KL whose terms cancel is rounded to 0 at the lowest."""
        logits = torch.randn(500, 40, generator=torch.Generator().manual_seed(0)) * 0.01
        values = loss(logits, logits.argmax(dim=1), epsilon=0.0, n_sigma=None, lam=0.0, reduction="none")
        assert (values >= 0).all()

    @every_kernel
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_dtypes(self, loss, dtype):
        """The loss comes back in float32, for float64 in float64; the gradient in the logits' own precision."""
        logits, labels = draw_tokens(9, 11, dtype=dtype)
        value, gradient = value_and_gradient(loss, logits, labels)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gradient.dtype == dtype
        expected = reference_loss(logits.double(), labels)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)

    @every_kernel
    def test_large_offset_does_not_matter(self, loss):
        """Logits far from zero give the same loss: the spread is measured around the mean."""
        logits, labels = draw_tokens(30, 200, dtype=torch.float32)
        shifted = logits + 1000
        torch.testing.assert_close(loss(shifted, labels), reference_loss(shifted.double(), labels).float())


class TestEdges:
    @every_kernel
    @pytest.mark.parametrize("lam", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("check", [True, False])
    @pytest.mark.parametrize("broken_logit", [math.nan, math.inf])
    def test_nan_is_not_hidden(self, loss, lam, check, broken_logit):
        """A NaN or infinite logit makes its row's loss NaN and no other's."""
        logits, labels = draw_tokens(3, 5)
        logits[1, 2] = broken_logit
        values = loss(logits, labels, lam=lam, check=check, reduction="none")
        assert values.isnan().tolist() == [False, True, False]

    @every_kernel
    def test_minus_infinity_has_no_part(self, loss):
        """Padding the vocabulary with banned tokens changes neither the loss nor the other gradients."""
        logits, labels = draw_tokens(30, 20)
        padded = torch.cat([logits, torch.full((30, 5), -math.inf, dtype=logits.dtype)], dim=1)
        value, gradient = value_and_gradient(loss, logits, labels)
        padded_value, padded_gradient = value_and_gradient(loss, padded, labels)
        torch.testing.assert_close(value, padded_value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(padded_gradient[:, :20], gradient, rtol=0, atol=1e-12)
        assert (padded_gradient[:, 20:] == 0).all()

    @every_kernel
    def test_banned_label_is_infinitely_wrong(self, loss):
        """A true token at -inf costs infinity, as in F.cross_entropy."""
        logits = torch.tensor([[0.0, -math.inf]])
        assert loss(logits, torch.tensor([1])).item() == math.inf == F.cross_entropy(logits, torch.tensor([1]))

    @every_kernel
    def test_nothing_wanted_of_nan_is_zero(self, loss):
        """A loss that is multiplied by 0 asks for no gradient, of a NaN row either."""
        logits, labels = draw_tokens(3, 5)
        logits[1, 2] = math.nan
        (loss(logits.requires_grad_(), labels) * 0).backward()
        assert torch.equal(logits.grad, torch.zeros(3, 5, dtype=logits.dtype))

    @every_kernel
    def test_ignored_nan_is_hidden(self, loss):
        """A NaN in a row that does not count reaches neither loss nor gradient."""
        logits, labels = draw_tokens(3, 5)
        logits[1, 2], labels[1] = math.nan, -100
        value, gradient = value_and_gradient(loss, logits, labels)
        assert value.isfinite()
        assert gradient.isfinite().all()

    @every_kernel
    @pytest.mark.parametrize("ignore_index", [-100, 3, -1])
    def test_ignored_rows(self, loss, ignore_index):
        """Ignored rows have loss and gradient 0 and leave the mean over the others."""
        logits, labels = draw_tokens(12, 9)
        labels[labels == ignore_index] = 4
        full = labels.clone()
        labels[::3] = ignore_index
        kept = labels != ignore_index
        value, gradient = value_and_gradient(loss, logits, labels, ignore_index=ignore_index)
        expected, expected_gradient = value_and_gradient(loss, logits[kept], full[kept])
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient[kept], expected_gradient)
        assert (gradient[~kept] == 0).all()
        each = loss(logits, labels, ignore_index=ignore_index, reduction="none")
        assert (each[~kept] == 0).all()

    @every_kernel
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize("rows", [0, 4])
    def test_nothing_counted_is_zero_with_a_graph(self, loss, rows, reduction):
        """No rows, or none that counts: 0 and not NaN, and backward works."""
        logits = torch.randn(rows, 5, requires_grad=True)
        value = loss(logits, torch.full((rows,), -100), reduction=reduction)
        assert value.shape == ((rows,) if reduction == "none" else ())
        assert (value == 0).all()
        value.sum().backward()
        assert torch.equal(logits.grad, torch.zeros(rows, 5))

    @every_kernel
    @pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 2)])
    def test_leading_dimensions(self, loss, shape):
        """Logits (..., V) with labels (...), down to a single token, equal the flattened call."""
        logits = torch.randn(*shape, 7)
        labels = torch.randint(7, shape)
        flat = loss(logits.reshape(-1, 7), labels.reshape(-1), reduction="none")
        assert torch.equal(loss(logits, labels, reduction="none"), flat.reshape(shape))
        torch.testing.assert_close(loss(logits, labels), flat.mean())

    @every_kernel
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("ignored", [False, True])
    def test_caller_logits_are_untouched(self, loss, dtype, ignored):
        """Neither pass writes to the logits or the labels."""
        logits, labels = draw_tokens(12, 9, dtype=dtype)
        if ignored:
            labels[1] = -100
        before = logits.clone(), labels.clone()
        loss(logits.requires_grad_(), labels).backward()
        assert torch.equal(logits, before[0])
        assert torch.equal(labels, before[1])

    @every_kernel
    def test_second_backward(self, loss):
        """With retain_graph a second backward adds the same gradient again; without, torch's own error."""
        logits, labels = draw_tokens(12, 9)
        logits.requires_grad_()
        value = loss(logits, labels)
        value.backward(retain_graph=True)
        once = logits.grad.clone()
        value.backward()
        assert torch.equal(logits.grad, once + once)
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()

    @every_kernel
    def test_denormal_numbers_flushed(self, loss):
        """A row without spread at 0 keeps all of its tokens, though what is just below 0 is 0 then."""
        logits, labels = torch.zeros(3, 7), torch.arange(3)
        expected = value_and_gradient(reference_loss, logits.double(), labels, epsilon=0)
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor does not flush denormal numbers")
        try:
            value, gradient = value_and_gradient(loss, logits, labels, epsilon=0)
        finally:
            torch.set_flush_denormal(False)
        torch.testing.assert_close((value.double(), gradient.double()), expected)

    @every_kernel
    def test_second_derivatives_raise(self, loss):
        """The target's own derivative is left out by design, so there is no second one to ask for."""
        logits, labels = draw_tokens(3, 5)
        value = loss(logits.requires_grad_(), labels)
        (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()

    @every_kernel
    def test_upstream_gradient(self, loss):
        """Weights on single tokens reach each row."""
        logits, labels = draw_tokens(12, 9)
        weights = torch.arange(12, dtype=torch.float64)
        leaf = logits.clone().requires_grad_()
        (loss(leaf, labels, reduction="none") * weights).sum().backward()
        each = value_and_gradient(loss, logits, labels, reduction="sum")[1]
        torch.testing.assert_close(leaf.grad, weights.unsqueeze(1) * each)

    @every_kernel
    def test_no_grad(self, loss):
        """Under no_grad and inference_mode the value is the same and has no graph."""
        logits, labels = draw_tokens(12, 9)
        expected = loss(logits, labels)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                value = loss(logits, labels)
            assert not value.requires_grad
            assert torch.equal(value, expected)


class LargestResult(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the most elements of any storage that an operation made."""

    new_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [
            tensor for tensor in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)
        ]
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.new_elements = max(self.new_elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


class TestMemory:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ignored", [False, True])
    @pytest.mark.parametrize("name", KERNELS)
    def test_no_target_tensor(self, name, dtype, ignored, monkeypatch):
        """Beside the logits and the gradient that is asked for, nothing is larger than a block of rows."""
        monkeypatch.setattr(torch_kernel, "BLOCK_ELEMENTS", 2000)
        logits, labels = draw_tokens(100, 1000, dtype=dtype)
        if ignored:
            labels[::3] = -100
        gradient, kernel = torch.empty_like(logits), KERNELS[name]
        with LargestResult() as largest:
            fit = kernel.fit(
                logits, labels, Target(0.5, 0.1, True), Clip(0.05, False), reduction="mean", ignore_index=-100
            )
            kernel.gradient(fit.row_weights, logits, labels, fit.coefficients, out=gradient)
        assert largest.new_elements <= 2000 < 100 * 1000 // 10


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
class TestFromHiddenStates:
    @pytest.fixture(autouse=True)
    def is_chosen(self, kernel, monkeypatch):
        for module in (linear, loss_module):
            monkeypatch.setattr(module, "choose", lambda logits, shard: kernel)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("chunk_size", [6, 64])
    def test_equals_two_steps(self, dtype, chunk_size):
        """Chunks become their gradient in place; a trained bfloat16 weight's comes from slices, 64 tokens and 44."""
        torch.manual_seed(0)
        hidden, weight = torch.randn(40, 8).to(dtype), torch.randn(300, 8).to(dtype)
        labels = torch.randint(300, (40,))
        labels[::5] = -100
        gradients = []
        for loss, own_dtype in (
            (lambda h, w: linear_overtone_loss(h, w, labels, chunk_size=chunk_size), dtype),
            (lambda h, w: overtone_loss(h @ w.t(), labels), dtype),
            (lambda h, w: reference_loss(h @ w.t(), labels), torch.float64),
        ):
            leaves = [tensor.to(own_dtype, copy=True).requires_grad_() for tensor in (hidden, weight)]
            loss(*leaves).backward()
            gradients.append([leaf.grad.double() for leaf in leaves])
        for own, yardstick, exact in zip(*gradients, strict=True):
            rounding = torch.finfo(dtype).eps * exact.abs().max()
            assert (own - exact).abs().max() <= (yardstick - exact).abs().max() + rounding

    def test_all_settled(self):
        """Zeros, in what was made without them: under deterministic algorithms torch fills that with NaN."""
        hidden, weight = 50 * torch.eye(8).repeat(5, 1), torch.eye(300, 8)
        hidden, weight = (tensor.bfloat16().requires_grad_() for tensor in (hidden, weight))
        labels = torch.arange(8).repeat(5)
        torch.use_deterministic_algorithms(True)
        try:
            loss = linear_overtone_loss(hidden, weight, labels, chunk_size=8)
        finally:
            torch.use_deterministic_algorithms(False)
        loss.backward()
        assert loss.item() == pytest.approx(0.05)
        assert not hidden.grad.any()
        assert not weight.grad.any()


class TestPartsOfRows:
    """What a rank sums up of its part of the vocabulary, which tests/test_distributed.py puts together."""

    @pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("vocabulary", [1, 7, 33, 1025])
    def test_sums_are_the_literal_ones(self, kernel, dtype, vocabulary):
        """With a top that may lie in another part, banned tokens and infinities."""
        logits, _ = draw_tokens(6, vocabulary, dtype=dtype)
        logits[1, : vocabulary // 2] = -math.inf
        logits[2, : vocabulary // 2] = -1e4
        logits[3] = -math.inf
        scores = logits.double()
        top = scores.amax(dim=1) + torch.tensor([0.0, 0.0, 0.0, 4.0, 1.0, 200.0])
        top[3] = 4.0
        threshold = top - 1.5
        distance = scores - top.unsqueeze(1)
        counted = distance >= math.log(torch.finfo(torch.float32).tiny)
        count = counted.sum(dim=1)
        mean = scores.where(counted, 0).sum(dim=1) / count.clamp(min=1)
        squares = (scores - mean.unsqueeze(1)).where(counted, 0).square().sum(dim=1)
        weights = distance.exp()
        below, on_top = weights.where(distance < 0, 0).sum(dim=1), (distance == 0).sum(dim=1)
        kept = weights.where((scores > threshold.unsqueeze(1)) & (distance < 0), 0).sum(dim=1)
        expected = torch.stack([count, mean, squares, below, on_top])

        working = torch.float64 if dtype == torch.float64 else torch.float32
        of_rows = top.to(working), threshold.to(working)
        yardstick = {"rtol": 1e-12 if dtype == torch.float64 else 3e-6, "atol": 1e-6}
        torch.testing.assert_close(kernel.highest(logits).double(), scores.amax(dim=1), **yardstick)
        torch.testing.assert_close(kernel.sums(logits, of_rows[0]).double(), expected, **yardstick)
        torch.testing.assert_close(kernel.kept(logits, *of_rows).double(), kept, **yardstick)

    @pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
    def test_nan_is_not_lost(self, kernel):
        """In a maximum over ranks it might be, so it is infinity, which ends as NaN."""
        logits = torch.randn(2, 100)
        logits[1, 37] = math.nan
        assert kernel.highest(logits)[1] == math.inf
