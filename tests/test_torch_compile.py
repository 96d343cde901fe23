"""The kernel of PyTorch operations as torch.compile compiles it on a GPU, here on the CPU."""

import logging
import shutil

import pytest
import torch
from gradients import value_and_gradient
from kernel_cases import SETTINGS

from overtone import kernels, linear_overtone_loss, overtone_loss
from overtone.functional import reference_loss
from overtone.kernels import torch as torch_kernel


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
    """Every call compiles, however small, and on the CPU too; the compiler starts anew."""
    torch._dynamo.reset()
    monkeypatch.setattr(kernels.CPU, "serves", lambda logits: False)
    monkeypatch.setattr(kernels.TORCH, "compiled", torch_kernel.CompiledFunctions())
    monkeypatch.setattr(torch_kernel.CompiledFunctions, "is_worthwhile", lambda self, logits: not self.is_broken)
    yield
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
class TestCompiled:
    @pytest.fixture(autouse=True)
    def compiler_is_kept(self, always_compiled):
        """A recompilation that a test forbids is an error at which the functions run uncompiled from then on."""
        yield
        assert kernels.TORCH.compiled._compiled
        assert not kernels.TORCH.compiled.is_broken

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
        # Forward, gradient and gradient in place in float32 and, of linear alone, without the second, in bfloat16.
        assert counters["stats"]["unique_graphs"] == 3 + 2

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
        """A user's own compiled step holds the loss as whole nodes, in which the compiled functions run."""
        logits, labels = draw_tokens(12, 200, torch.float32)
        step = torch.compile(overtone_loss, fullgraph=True)
        expected = value_and_gradient(reference_loss, logits, labels)
        for result, wanted in zip(value_and_gradient(step, logits, labels), expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=2e-6, atol=4e-7)


class TestWithoutCompiler:
    def test_runs_and_says_so_once(self, always_compiled, monkeypatch, caplog):
        """A compiler that fails leaves a warning and the functions as they stand."""

        def broken(*arguments):
            raise torch._dynamo.exc.TorchDynamoException("no compiler in sight")

        monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
        logits, labels = draw_tokens(9, 70, torch.float32)
        with caplog.at_level(logging.WARNING):
            result = value_and_gradient(overtone_loss, logits, labels)
            value_and_gradient(overtone_loss, logits, labels)
        expected = value_and_gradient(reference_loss, logits, labels)
        for found, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-6, atol=4e-7)
        assert [record.message for record in caplog.records if "no compiler in sight" in record.message] == [
            "torch.compile does not work here, so the loss runs without it, slower: no compiler in sight"
        ]

    def test_the_cpu_never_compiles(self, monkeypatch):
        """Neither a small call nor one of any size on the CPU reaches the compiler."""

        def forbidden(*arguments):
            raise AssertionError("compiled")

        monkeypatch.setattr(kernels.CPU, "serves", lambda logits: False)
        monkeypatch.setattr(torch, "compile", forbidden)
        for vocabulary in (70, torch_kernel.COMPILE_FROM):
            value_and_gradient(overtone_loss, *draw_tokens(9, vocabulary, torch.float32))
        assert not kernels.TORCH.compiled.is_worthwhile(torch.empty(9, 70, device="meta"))
        assert kernels.TORCH.compiled.is_worthwhile(torch.empty(9, torch_kernel.COMPILE_FROM, device="meta"))
