"""The row functions as torch.compile fuses them: the same numbers, one compilation, and life without a compiler."""

import logging
import shutil

import pytest
import torch
from gradients import value_and_gradient

from overtone import closed_form, compiled, fused, linear_overtone_loss, overtone_loss, rows
from overtone.functional import reference_loss

SETTINGS = [
    {},
    {"n_sigma": None},
    {"check": False, "lam": 0.5},
    {"lam": 1.0, "epsilon": 0.0},
    {"lam": 0.0, "n_sigma": 1.0},
]


def draw_tokens(count, vocabulary, dtype):
    """Logits with every third row well predicted and one token banned, and labels with one ignored."""
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(count, vocabulary, generator=generator) * 3
    labels = torch.randint(1, vocabulary, (count,), generator=generator)
    logits[range(0, count, 3), labels[::3]] += 12
    logits[:, 0] = -torch.inf
    labels[1] = -100
    return logits.to(dtype), labels


@pytest.fixture
def always_compiled(monkeypatch):
    """Every call compiles, however small; the compiler starts anew."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "COMPILE_FROM", 0)
    monkeypatch.setattr(
        rows,
        "_fused",
        compiled.Fused(
            closed_form.kl_of_rows,
            closed_form.write_gradient_of_others,
            closed_form.become_gradient_of_others,
            for_few_rows=closed_form.fit_of_rows,
        ),
    )
    yield
    torch._dynamo.reset()


def new_graphs(run):
    """How many functions torch compiles meanwhile."""
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] - before


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
class TestFused:
    @pytest.fixture(autouse=True)
    def compiler_is_kept(self, always_compiled):
        """A recompilation that a test forbids is an error at which the functions run uncompiled from then on."""
        yield
        assert rows._fused._compiled

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_the_reference_and_compiles_once(self, dtype, always_compiled):
        """Any shape and setting gives the reference's numbers, and nothing but another precision compiles anew."""
        logits, labels = draw_tokens(9, 700, dtype)
        value_and_gradient(overtone_loss, logits, labels)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for count, vocabulary in ((9, 700), (17, 333)):
                logits, labels = draw_tokens(count, vocabulary, dtype)
                for settings in SETTINGS:
                    value, gradient = value_and_gradient(overtone_loss, logits, labels, **settings)
                    expected, expected_gradient = value_and_gradient(
                        reference_loss, logits.double(), labels, **settings
                    )
                    # A few roundings of float32, and for the gradient one of the logits' own precision.
                    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
                    epsilon = torch.finfo(dtype).eps
                    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2 * epsilon, atol=4e-7)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_gradient_worked_out_with_the_loss(self, dtype, reduction, always_compiled, monkeypatch):
        """A few rows that all count have it from the forward pass, once; it is the backward pass' own."""
        logits, labels = draw_tokens(9, 700, dtype)
        labels[1] = 5
        for settings in (*SETTINGS, {"epsilon": 0.5, "hold_correct": True}):
            results = []
            for is_at_once in (True, False):
                monkeypatch.setattr(fused, "is_one_call", rows.is_one_call if is_at_once else lambda *_: False)
                leaf = logits.clone().requires_grad_()
                loss = overtone_loss(leaf, labels, reduction=reduction, **settings)
                assert (loss.grad_fn.gradient is not None) == is_at_once
                own, again = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
                assert loss.grad_fn.gradient is None
                (half,) = torch.autograd.grad(loss, leaf, torch.tensor(0.5))
                results.append((loss.detach(), own, again, half))
            torch.testing.assert_close(results[0], results[1], rtol=2 * torch.finfo(dtype).eps, atol=4e-7)

    @pytest.mark.parametrize("is_retained", [False, True])
    def test_a_graph_of_the_gradient_worked_out_with_the_loss(self, is_retained, always_compiled):
        """It is there, and refuses a second derivative; so does that of a gradient worked out anew."""
        logits, labels = draw_tokens(9, 700, torch.float32)
        labels[1] = 5
        loss = overtone_loss(logits.requires_grad_(), labels)
        if is_retained:
            loss.backward(retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()

    def test_no_gradient_arrives(self, always_compiled):
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

        for loss_function in (overtone_loss, from_hidden, torch.nn.functional.cross_entropy):
            for count in (9, rows.FEW_ROWS + 1):
                logits, labels = torch.randn(count, 70, requires_grad=True), torch.arange(count) % 70
                Cut.apply(loss_function(logits, labels)).backward()
                assert logits.grad is weight.grad is None

    def test_few_rows_compile_for_a_vocabulary_and_then_for_any(self, always_compiled):
        """Another number of rows compiles nothing anew, a second vocabulary does, a third does not."""
        runs = (700, (9,)), (700, (5, 17)), (333, (9,)), (512, (9, 4))
        assert [new_graphs(lambda run=run: self.fit(*run)) for run in runs] == [1, 0, 1, 0]

    def test_labels_of_another_stride_compile_nothing_anew(self, always_compiled):
        """As they are where a batch's labels are a column, or shifted."""
        logits, labels = draw_tokens(9, 700, torch.float32)
        labels[1] = 5
        strided = labels.repeat_interleave(2)[::2]
        assert not strided.is_contiguous()
        value_and_gradient(overtone_loss, logits, labels)
        assert new_graphs(lambda: value_and_gradient(overtone_loss, logits, strided)) == 0

    def fit(self, vocabulary, counts):
        for count in counts:
            logits, labels = draw_tokens(count, vocabulary, torch.float32)
            labels[1] = 5
            assert rows.is_one_call(logits, labels, -100)
            value, gradient = value_and_gradient(overtone_loss, logits, labels)
            expected, expected_gradient = value_and_gradient(reference_loss, logits.double(), labels)
            torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-6, atol=4e-7)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_hard_rows_among_few(self, dtype, always_compiled):
        """Infinite, tied and missing logits, with the label on either side: the reference's loss and gradient."""
        generator = torch.Generator().manual_seed(3)
        plain = torch.randn(4, 60, generator=generator) * 2
        labels = torch.tensor([3, 7, 11, 13])
        tied, banned, alone = torch.zeros_like(plain), plain.clone(), torch.full_like(plain, -torch.inf)
        banned[:, 20:] = -torch.inf
        alone[range(4), labels] = 1.0
        # One kind of row at a time, or the mean over them hides what one of them gives.
        nan, infinite, infinite_label, impossible = (plain.clone() for _ in range(4))
        nan[1, 2], infinite[2, 5], infinite_label[3, 13], impossible[0, 3] = torch.nan, torch.inf, torch.inf, -torch.inf
        for logits in (tied, banned, alone, nan, infinite, infinite_label, impossible, plain[:1], plain * 500):
            own = labels[: len(logits)]
            assert rows.is_one_call(logits, own, -100)
            value, gradient = value_and_gradient(overtone_loss, logits.to(dtype), own)
            expected, expected_gradient = value_and_gradient(reference_loss, logits.to(dtype).double(), own)
            torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6, equal_nan=True)
            broken = expected_gradient.isnan().any(dim=1)
            assert torch.equal(gradient.isnan().any(dim=1), broken)
            epsilon = torch.finfo(dtype).eps
            torch.testing.assert_close(
                gradient[~broken].double(), expected_gradient[~broken], rtol=2 * epsilon + 2e-6, atol=4e-7
            )

    def test_another_default_device(self, always_compiled):
        """Everything that is made is made where the logits are."""
        logits, labels = draw_tokens(9, 700, torch.float32)
        labels[1] = 5
        expected = overtone_loss(logits.clone().requires_grad_(), labels).detach()
        leaf = logits.clone().requires_grad_()
        with torch.device("meta"):
            loss = overtone_loss(leaf, labels)
            loss.backward()
        assert torch.equal(loss, expected)
        assert leaf.grad.device == logits.device

    def test_a_loss_scale_saves_gradients_in_float16(self, always_compiled):
        """What the forward pass worked out has lost the smallest; under another upstream gradient it is not used."""
        logits, labels = torch.full((4, 2**15), -9.0, dtype=torch.float16), torch.zeros(4, dtype=torch.long)
        logits[:, 0] = 9
        leaf = logits.clone().requires_grad_()
        (overtone_loss(leaf, labels, epsilon=0, lam=1) * 2.0**15).backward()
        exact = logits.double().requires_grad_()
        (reference_loss(exact, labels, epsilon=0, lam=1) * 2.0**15).backward()
        assert exact.grad[0, 1] / 2**15 < torch.finfo(torch.float16).smallest_normal / 2**10  # lost without the scale
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2 * torch.finfo(torch.float16).eps, atol=1e-6)

    def test_many_rows_have_their_gradient_in_the_backward_pass(self, always_compiled):
        """To look at each label would take longer than the calls that are saved."""
        labels = torch.zeros(rows.FEW_ROWS + 1, dtype=torch.long)
        logits = torch.zeros(len(labels), 3)
        assert rows.is_one_call(logits[1:], labels[1:], -100)
        assert not rows.is_one_call(logits, labels, -100)

    def test_inside_linear(self, always_compiled):
        """`linear_overtone_loss` overwrites its chunks' logits with their gradient in the compiled function, too."""
        torch.manual_seed(0)
        hidden, weight = torch.randn(20, 8), torch.randn(300, 8)
        labels = torch.randint(300, (20,))
        results = []
        for loss in (
            lambda h, w: linear_overtone_loss(h, w, labels, chunk_size=6),
            lambda h, w: reference_loss(h @ w.t(), labels),
        ):
            leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            value = loss(*leaves)
            value.backward()
            results.append((value.detach(), *(leaf.grad for leaf in leaves)))
        for result, expected in zip(*results, strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)

    def test_every_way_to_a_function_compiles_it_once(self, always_compiled):
        """Rows that are a view, a copy, a graph's leaf or a chunk's logits are all the same to the compiler."""
        hidden, weight = torch.randn(40, 8), torch.randn(300, 8)
        logits, labels = hidden @ weight.t(), torch.randint(300, (40,))
        ignored = labels.where(torch.arange(40) % 3 == 0, -100)

        def every_way():
            overtone_loss(logits.clone().requires_grad_(), labels, epsilon=0).backward()
            overtone_loss(logits.clone().requires_grad_(), labels, epsilon=0, reduction="none").sum().backward()
            overtone_loss(logits.clone().requires_grad_(), ignored, epsilon=0, reduction="none").sum().backward()
            for rows_at_once in (17, 64):
                for frozen in (True, False):
                    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
                    linear_overtone_loss(*leaves, labels, chunk_size=rows_at_once).backward()
                    bfloat = [leaf.detach().bfloat16().requires_grad_(leaf.requires_grad) for leaf in leaves]
                    linear_overtone_loss(*bfloat, labels, chunk_size=rows_at_once).backward()

        counters = torch._dynamo.utils.counters
        counters.clear()
        every_way()
        # Forward, gradient and gradient in place in float32 and, of linear alone, without the second, in bfloat16; all
        # at once for the first call.
        assert counters["stats"]["unique_graphs"] == 3 + 2 + 1

    def test_slices_of_the_vocabulary(self, always_compiled):
        """In bfloat16 a trained weight's gradient is worked out by slices, here of 64 tokens and the last of 44."""
        torch.manual_seed(0)
        hidden, weight = torch.randn(40, 8).bfloat16(), torch.randn(300, 8).bfloat16()
        labels = torch.randint(300, (40,))
        gradients = []
        for loss, dtype in (
            (lambda h, w: linear_overtone_loss(h, w, labels, chunk_size=8), torch.bfloat16),
            (lambda h, w: overtone_loss(h @ w.t(), labels), torch.bfloat16),
            (lambda h, w: reference_loss(h @ w.t(), labels), torch.float64),
        ):
            leaf = weight.to(dtype, copy=True).requires_grad_()
            loss(hidden.to(dtype), leaf).backward()
            gradients.append(leaf.grad.double())
        sliced, yardstick, exact = gradients
        rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert (sliced - exact).abs().max() <= (yardstick - exact).abs().max() + rounding

    def test_inside_a_compiled_step(self, always_compiled):
        """A user's own compiled step holds the loss as whole nodes, in which the fused functions run."""
        logits, labels = draw_tokens(12, 200, torch.float32)
        step = torch.compile(overtone_loss, fullgraph=True)
        expected = value_and_gradient(reference_loss, logits, labels)
        for result, wanted in zip(value_and_gradient(step, logits, labels), expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=2e-6, atol=4e-7)


class TestWithoutCompiler:
    @pytest.mark.parametrize("ignored", [True, False])
    def test_runs_and_says_so_once(self, ignored, always_compiled, monkeypatch, caplog):
        """A compiler that fails leaves a warning and the functions as they stand."""

        def broken(*arguments):
            raise torch._dynamo.exc.TorchDynamoException("no compiler in sight")

        monkeypatch.setattr(rows._fused, "_compiled", dict.fromkeys(rows._fused._compiled, broken))
        logits, labels = draw_tokens(9, 70, torch.float32)
        labels[1] = -100 if ignored else 7
        with caplog.at_level(logging.WARNING):
            result = value_and_gradient(overtone_loss, logits, labels)
            value_and_gradient(overtone_loss, logits, labels)
        expected = value_and_gradient(reference_loss, logits, labels)
        for found, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-6, atol=4e-7)
        assert [record.message for record in caplog.records if "no compiler in sight" in record.message] == [
            "torch.compile does not work here, so the loss runs without it, slower: no compiler in sight"
        ]

    def test_small_calls_never_compile(self, monkeypatch):
        """A call below the size from which compiling pays does not even reach the compiler."""

        def forbidden(*arguments):
            raise AssertionError("compiled")

        monkeypatch.setattr(rows._fused, "_compiled", dict.fromkeys(rows._fused._compiled, forbidden))
        logits, labels = draw_tokens(9, 70, torch.float32)
        value_and_gradient(overtone_loss, logits, labels)
        assert rows._fused._compiled
