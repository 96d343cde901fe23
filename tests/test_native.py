"""The closed form in C++: the same tests as the one in PyTorch, and what is its own."""

import logging
import shutil
import sys

import pytest
import test_overtone_loss
import torch
from gradients import value_and_gradient
from hypothesis import given, settings
from test_hold import TestDecision, TestHoldCorrect  # noqa: F401 - tests that are run here again
from test_overtone_loss import (  # noqa: F401 - tests that are run here again
    FLOATS,
    TestBadInput,
    TestMemory,
    TestPrecision,
    TestTheory,
    assert_equal_to_the_reference,
    draw_tokens,
    problems,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from overtone import linear_overtone_loss, native, overtone_loss
from overtone import loss as loss_module
from overtone.functional import reference_loss

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")

SETTINGS = [
    {},
    {"n_sigma": None},
    {"check": False, "lam": 0.5},
    {"lam": 1.0, "epsilon": 0.0},
    {"lam": 0.0, "n_sigma": 1.0},
]


@pytest.fixture(autouse=True, scope="module")
def every_call_is_native():
    """However small. A module's fixture, since hypothesis allows no function's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "BUILD_FROM", 0)
        assert native.native_for(torch.zeros(1, 1)) is not None
        yield


class TestAgainstTheReference(test_overtone_loss.TestAgainstTheReference):
    @settings(max_examples=400, deadline=None)
    @given(problems())
    def test_equal_to_1e_12(self, problem):
        """A test of its own, since hypothesis allows no two to share one."""
        assert_equal_to_the_reference(*problem)


class TestEdges(test_overtone_loss.TestEdges):
    def test_non_contiguous_logits(self):
        """Rows may lie anywhere; where their entries do not lie one after the other, PyTorch works them through."""
        logits, labels = draw_tokens(12, 9)
        value, gradient = value_and_gradient(overtone_loss, logits, labels)
        views = {
            "cut off": (torch.cat([logits, logits], dim=1)[:, :9], True),
            "transposed": (logits.t().contiguous().t(), False),
            "every second": (torch.stack([logits, logits], dim=2)[..., 0], False),
            "negated": (torch._neg_view(-logits), False),
        }
        for view, is_native in views.values():
            assert (native.native_for(view) is not None) == is_native
            leaf = view.detach().requires_grad_()
            loss = overtone_loss(leaf, labels)
            loss.backward()
            torch.testing.assert_close(loss.detach(), value, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=1e-12)
        repeated = logits[:1].expand(12, 9)
        assert repeated.stride(0) == 0
        torch.testing.assert_close(overtone_loss(repeated, labels), overtone_loss(repeated.contiguous(), labels))

    def test_changed_logits_are_noticed(self, monkeypatch):
        """Where the gradient comes in the backward pass; one that was worked out with the loss is right anyway."""
        logits, labels = draw_tokens(12, 9)
        expected = value_and_gradient(overtone_loss, logits, labels)[1]
        scores = logits.requires_grad_() * 1
        loss = overtone_loss(scores, labels)
        scores.detach().add_(1)
        loss.backward()
        assert torch.equal(logits.grad, expected)
        monkeypatch.setattr(loss_module, "GRADIENT_UP_TO", 0)
        super().test_changed_logits_are_noticed()


class TestSizes:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("vocabulary", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 1023, 1024, 1025, 5000, 300_001])
    def test_equals_the_reference(self, dtype, vocabulary):
        """Vectors, pairs of them and chunks that a row fills, does not fill, or goes beyond; all settings."""
        logits, labels = draw_tokens(7, vocabulary, dtype=dtype)
        labels[4] = -100
        for arguments in SETTINGS if vocabulary < 10_000 else SETTINGS[:2]:
            value, gradient = value_and_gradient(overtone_loss, logits, labels, **arguments)
            expected, expected_gradient = value_and_gradient(reference_loss, logits.double(), labels, **arguments)
            # A few roundings of float32, and for the gradient one of the logits' own precision.
            torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
            epsilon = torch.finfo(dtype).eps
            torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2 * epsilon + 2e-6, atol=4e-7)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_hard_rows(self, dtype, reduction):
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
                value, gradient = value_and_gradient(overtone_loss, logits.to(dtype), own, **arguments)
                exact = logits.to(dtype).double()
                expected, expected_gradient = value_and_gradient(reference_loss, exact, own, **arguments)
                torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6, equal_nan=True)
                broken = expected_gradient.isnan().any(dim=1)
                assert torch.equal(gradient.isnan().any(dim=1), broken)
                epsilon = torch.finfo(dtype).eps
                torch.testing.assert_close(
                    gradient[~broken].double(), expected_gradient[~broken], rtol=2 * epsilon + 4e-6, atol=4e-7
                )

    def test_threads_change_nothing(self):
        """Not a bit, in however many parts the rows are shared out."""
        logits, labels = draw_tokens(50, 900, dtype=torch.float32)
        threads = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                results.append(value_and_gradient(overtone_loss, logits, labels))
        finally:
            torch.set_num_threads(threads)
        for value, gradient in results[1:]:
            assert torch.equal(value, results[0][0])
            assert torch.equal(gradient, results[0][1])


class TestCompile:
    test_operators_are_well_defined = test_overtone_loss.TestCompile.test_operators_are_well_defined

    def test_one_graph(self):
        """A user's compiled step has the loss as nodes of its one graph, in which the C++ code runs."""
        logits, labels = draw_tokens(24, 33)
        labels[::4] = -100
        step = torch.compile(overtone_loss, fullgraph=True, backend="aot_eager")
        value, gradient = value_and_gradient(step, logits, labels)
        expected, expected_gradient = value_and_gradient(overtone_loss, logits, labels)
        torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-14, atol=0)


class TestGradientWithTheLoss:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_is_the_backward_pass_own(self, dtype, reduction, monkeypatch):
        """Worked out at once, and given out once; bit for bit what the backward pass would have worked out."""
        logits, labels = draw_tokens(9, 700, dtype=dtype)
        labels[1] = -100
        for arguments in (*SETTINGS, {"epsilon": 0.5, "hold_correct": True}):
            results = []
            for limit in (loss_module.GRADIENT_UP_TO, 0):
                monkeypatch.setattr(loss_module, "GRADIENT_UP_TO", limit)
                leaf = logits.clone().requires_grad_()
                loss = overtone_loss(leaf, labels, reduction=reduction, **arguments)
                assert (loss.grad_fn.gradient is None) == (limit == 0)
                own, again = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
                assert loss.grad_fn.gradient is None
                (half,) = torch.autograd.grad(loss, leaf, torch.tensor(0.5, dtype=loss.dtype))
                results.append((loss.detach(), own, again, half))
            for at_once, later in zip(*results, strict=True):
                assert torch.equal(at_once, later)

    @pytest.mark.parametrize("is_retained", [False, True])
    def test_a_graph_of_it(self, is_retained):
        """It is there, and refuses a second derivative; so does that of a gradient worked out anew."""
        logits, labels = draw_tokens(9, 700, dtype=torch.float32)
        loss = overtone_loss(logits.requires_grad_(), labels)
        if is_retained:
            loss.backward(retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()

    @pytest.mark.parametrize("limit", [loss.GRADIENT_UP_TO, 0])
    def test_no_gradient_arrives(self, limit, monkeypatch):
        """A function on the way that sends nothing back: nothing goes on, rather than zeros, as from torch's losses."""

        class Cut(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value):
                return value.clone()

            @staticmethod
            def backward(ctx, gradient):
                return None

        weight = torch.eye(70, requires_grad=True)

        def from_hidden(hidden, labels):
            return linear_overtone_loss(hidden, weight, labels)

        monkeypatch.setattr(loss_module, "GRADIENT_UP_TO", limit)
        for loss_function in (overtone_loss, from_hidden, torch.nn.functional.cross_entropy):
            logits, labels = torch.randn(9, 70, requires_grad=True), torch.arange(9)
            Cut.apply(loss_function(logits, labels)).backward()
            assert logits.grad is weight.grad is None

    def test_a_loss_scale_saves_gradients_in_float16(self):
        """What the forward pass worked out has lost the smallest; under another upstream gradient it is not used."""
        logits, labels = torch.full((4, 2**15), -9.0, dtype=torch.float16), torch.zeros(4, dtype=torch.long)
        logits[:, 0] = 9
        leaf = logits.clone().requires_grad_()
        (overtone_loss(leaf, labels, epsilon=0, lam=1) * 2.0**15).backward()
        exact = logits.double().requires_grad_()
        (reference_loss(exact, labels, epsilon=0, lam=1) * 2.0**15).backward()
        assert exact.grad[0, 1] / 2**15 < torch.finfo(torch.float16).smallest_normal / 2**10  # lost without the scale
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2 * torch.finfo(torch.float16).eps, atol=1e-6)

    def test_another_default_device(self):
        """Everything that is made is made where the logits are."""
        logits, labels = draw_tokens(9, 700, dtype=torch.float32)
        expected = overtone_loss(logits, labels)
        leaf = logits.clone().requires_grad_()
        with torch.device("meta"):
            loss = overtone_loss(leaf, labels)
            loss.backward()
        assert torch.equal(loss, expected)
        assert leaf.grad.device == logits.device


class TestFromHiddenStates:
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


class TestWhichLogits:
    def test_few_build_nothing(self, monkeypatch):
        """A call below the size from which it pays does not even look for a compiler."""

        def forbidden():
            raise AssertionError("built")

        monkeypatch.setattr(native, "_load", forbidden)
        monkeypatch.setattr(native, "BUILD_FROM", 700 * 9 + 1)
        value_and_gradient(overtone_loss, *draw_tokens(9, 700))
        with pytest.raises(AssertionError, match="built"):
            overtone_loss(*draw_tokens(10, 700))

    def test_others_than_plain_ones_are_left_alone(self):
        """A subclass may have no memory, and another device or type not what the code reads."""

        class Other(torch.Tensor):
            pass

        plain = torch.zeros(3, 4)
        assert native.native_for(plain) is native.native_for(torch.nn.Parameter(plain)) is not None
        for logits in (plain.as_subclass(Other), plain.to("meta"), plain.to(torch.float8_e5m2), plain.to_sparse()):
            assert native.native_for(logits) is None

    def test_strided_labels(self):
        """As they are where a batch's labels are a column, or shifted."""
        logits, labels = draw_tokens(9, 700)
        strided = labels.repeat_interleave(2)[::2]
        assert not strided.is_contiguous()
        for reduction in ("mean", "none"):
            result = value_and_gradient(overtone_loss, logits, strided, reduction=reduction)
            expected = value_and_gradient(overtone_loss, logits, labels, reduction=reduction)
            assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))

    @pytest.mark.parametrize("limit", [loss.GRADIENT_UP_TO, 0])
    def test_tensors_without_memory_or_with_other_bits(self, limit, monkeypatch):
        """Zeros that are nowhere, negated labels, freed storage: PyTorch's own values and errors, and no crash."""
        monkeypatch.setattr(loss_module, "GRADIENT_UP_TO", limit)
        logits, labels = draw_tokens(9, 700)
        nowhere = torch._efficientzerotensor((9, 700))
        torch.testing.assert_close(overtone_loss(nowhere, labels), overtone_loss(torch.zeros(9, 700), labels))
        assert torch.equal(overtone_loss(logits, torch._neg_view(-labels)), overtone_loss(logits, labels))
        for reduction, shape in (("none", (9,)), ("mean", ())):
            leaf = logits.clone().requires_grad_()
            zeros = torch._efficientzerotensor(shape, dtype=torch.float64)
            overtone_loss(leaf, labels, reduction=reduction).backward(zeros)
            assert torch.equal(leaf.grad, torch.zeros_like(logits))
        logits.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError):
            overtone_loss(logits, labels)

    def test_traced(self):
        """While a graph is recorded, or there are no values, nothing is worked out that would not be seen."""
        logits = draw_tokens(9, 700)[0]
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert native.native_for(logits) is None
        seen = []
        make_fx(lambda values: seen.append(native.native_for(logits)) or values * 2)(torch.zeros(2))
        assert seen == [None]

    @pytest.mark.parametrize("wrong", [700, -1, 2**40])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_labels_out_of_range(self, wrong, reduction):
        """Refused before a row is looked at."""
        logits, labels = draw_tokens(9, 700)
        labels[5] = wrong
        with pytest.raises(ValueError, match=rf"labels must lie in \[0, 700\) .* got {wrong}"):
            overtone_loss(logits, labels, reduction=reduction)

    def test_labels_that_were_mended_meanwhile(self, monkeypatch):
        """By another thread, after the C++ code refused them: what it never wrote is not returned."""
        monkeypatch.setattr(native, "check_labels", lambda *arguments: None)
        with pytest.raises(RuntimeError, match="labels were changed"):
            overtone_loss(torch.zeros(2, 5), torch.tensor([0, 5]))


class TestLoading:
    @pytest.fixture(autouse=True)
    def nothing_is_loaded(self):
        native._load.cache_clear()
        yield
        native._load.cache_clear()

    @pytest.mark.parametrize("is_flushed", [False, True])
    def test_denormal_numbers_stay_as_they_were(self, is_flushed, monkeypatch):
        """Code that torch 2.4 builds has them flushed from then on, in all of the process."""
        codecache = pytest.importorskip("torch._inductor.codecache")
        load = codecache.CppCodeCache.load

        def load_and_flush(source):
            torch.set_flush_denormal(True)
            return load(source)

        monkeypatch.setattr(codecache.CppCodeCache, "load", load_and_flush)
        if not torch.set_flush_denormal(is_flushed):
            pytest.skip("this processor flushes no denormal numbers")
        try:
            assert native.native_for(torch.zeros(1, 1)) is not None
            assert (sys.float_info.min / 2 == 0) == is_flushed
        finally:
            torch.set_flush_denormal(False)

    def test_runs_and_says_so_once(self, monkeypatch, caplog):
        """A compiler that fails leaves a warning and the functions in PyTorch."""
        codecache = pytest.importorskip("torch._inductor.codecache")

        def broken(source):
            raise RuntimeError("no compiler in sight\nand a thousand lines more")

        monkeypatch.setattr(codecache.CppCodeCache, "load", broken)
        logits, labels = draw_tokens(9, 70)
        with caplog.at_level(logging.WARNING):
            result = value_and_gradient(overtone_loss, logits, labels)
            value_and_gradient(overtone_loss, logits, labels)
        expected = value_and_gradient(reference_loss, logits, labels)
        for found, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert [record.message for record in caplog.records] == [
            "the C++ code could not be built, so the loss runs without it, slower: no compiler in sight"
        ]

    def test_switched_off(self, monkeypatch):
        """By torch's own switch."""
        monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
        assert native.native_for(torch.zeros(3, 4)) is None
