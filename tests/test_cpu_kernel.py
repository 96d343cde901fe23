"""The kernel in C++: which logits it is chosen for, its threads, and an installation without it."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradients import value_and_gradient
from kernel_cases import KERNELS, draw_tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from overtone import kernels, overtone_loss
from overtone.functional import reference_loss
from overtone.kernels import cpu, eager

needs_the_library = pytest.mark.skipif(cpu.library() is None, reason="the C++ kernel was not built")


@needs_the_library
class TestChoice:
    def test_plain_logits_of_any_size_have_the_fastest_kernel(self):
        assert kernels.CPU is kernels.choose(torch.zeros(1, 1)) is kernels.choose(torch.nn.Parameter(torch.zeros(3, 4)))
        assert len(KERNELS) > 2
        assert [name.removeprefix("cpu ") for name in KERNELS][1:] == list(cpu.library().VARIANTS)

    def test_others_than_plain_ones_are_left_alone(self):
        """A subclass may have no memory, and another device or type not what the code reads."""

        class Other(torch.Tensor):
            pass

        plain = torch.zeros(3, 4)
        for logits in (plain.as_subclass(Other), plain.to("meta"), plain.to(torch.float8_e5m2), plain.to_sparse()):
            assert kernels.choose(logits) is kernels.TORCH

    def test_non_contiguous_logits(self):
        """Rows may lie anywhere; where their entries do not lie one after the other, PyTorch works them through."""
        logits, labels = draw_tokens(12, 9)
        value, gradient = value_and_gradient(overtone_loss, logits, labels)
        views = {
            "cut off": (torch.cat([logits, logits], dim=1)[:, :9], kernels.CPU),
            "transposed": (logits.t().contiguous().t(), kernels.TORCH),
            "every second": (torch.stack([logits, logits], dim=2)[..., 0], kernels.TORCH),
            "negated": (torch._neg_view(-logits), kernels.TORCH),
        }
        for view, kernel in views.values():
            assert kernels.choose(view) is kernel
            leaf = view.detach().requires_grad_()
            loss = overtone_loss(leaf, labels)
            loss.backward()
            torch.testing.assert_close(loss.detach(), value, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=1e-12)
        repeated = logits[:1].expand(12, 9)
        assert repeated.stride(0) == 0
        torch.testing.assert_close(overtone_loss(repeated, labels), overtone_loss(repeated.contiguous(), labels))

    def test_strided_labels(self):
        """As they are where a batch's labels are a column, or shifted."""
        logits, labels = draw_tokens(9, 700)
        strided = labels.repeat_interleave(2)[::2]
        assert not strided.is_contiguous()
        for reduction in ("mean", "none"):
            result = value_and_gradient(overtone_loss, logits, strided, reduction=reduction)
            expected = value_and_gradient(overtone_loss, logits, labels, reduction=reduction)
            assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))

    @pytest.mark.parametrize("limit", [kernels.CPU.gradient_with_fit_up_to, 0])
    def test_tensors_without_memory_or_with_other_bits(self, limit, monkeypatch):
        """Zeros that are nowhere, negated labels, freed storage: PyTorch's own values and errors, and no crash."""
        monkeypatch.setattr(kernels.CPU, "gradient_with_fit_up_to", limit)
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
            assert kernels.choose(logits) is kernels.TORCH
        seen = []
        make_fx(lambda values: seen.append(kernels.choose(logits)) or values * 2)(torch.zeros(2))
        assert seen == [kernels.TORCH]

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
        monkeypatch.setattr(cpu, "check_labels", lambda *arguments: None)
        with pytest.raises(RuntimeError, match="labels were changed"):
            overtone_loss(torch.zeros(2, 5), torch.tensor([0, 5]))


@needs_the_library
class TestThreads:
    def test_threads_change_nothing(self):
        """Not a bit, in however many parts the rows are shared out."""
        logits, labels = draw_tokens(50, 9000, dtype=torch.float32)
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

    def test_one_openmp_runtime(self):
        """A large call maps no second one into the process: two pools of threads cost more than they give."""
        if not Path("/proc/self/maps").exists():
            pytest.skip("what is mapped is read from Linux's /proc")
        code = """
import torch, overtone
from pathlib import Path
from overtone import kernels
torch.set_num_threads(4)
def mapped():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if any(name in line for name in ("libgomp", "libomp", "libiomp"))}
def threads():
    return len(list(Path("/proc/self/task").iterdir()))
torch.mm(torch.randn(900, 900), torch.randn(900, 900)).softmax(dim=0)
before = mapped(), threads()
logits = torch.randn(64, 32000)
assert kernels.choose(logits) is kernels.CPU
overtone.overtone_loss(logits, torch.zeros(64, dtype=torch.long))
assert (mapped(), threads()) == before, (before, mapped(), threads())
assert len(before[0]) == 1, before
"""
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


@needs_the_library
class TestHalfPrecision:
    @pytest.mark.parametrize(
        ("dtype", "is_flushed"), [(torch.float16, False), (torch.float16, True), (torch.bfloat16, False)]
    )
    @pytest.mark.parametrize("variant", range(len(KERNELS) - 1))
    def test_every_number_is_read_and_written_exactly(self, dtype, is_flushed, variant):
        """All that are finite, as a logit and as a gradient, as torch converts them.

        Where denormal numbers are flushed, float16's too, which are normal ones in float32.
        """
        numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        numbers = numbers[numbers.isfinite()]
        kernel, zeros = cpu.CpuKernel(variant), torch.zeros(len(numbers), dtype=torch.long)
        coefficients = torch.zeros(5, len(numbers))
        coefficients[3] = numbers.float() * 1.0001  # the gradient of a label that is the only token
        out = torch.empty(len(numbers), 1, dtype=dtype)
        plain = torch.stack([numbers, torch.full_like(numbers, -torch.inf)], dim=1)
        torch.set_flush_denormal(is_flushed)
        try:
            kernel.gradient(torch.ones(len(numbers)), numbers.unsqueeze(1), zeros, coefficients, out=out)
            fit = kernel.fit(
                plain,
                zeros,
                kernels.Target(None, 1.0, True),
                kernels.Clip(0.0, False),
                reduction="sum",
                ignore_index=-100,
            )
        finally:
            torch.set_flush_denormal(False)
        expected = (numbers.float() * 1.0001).to(dtype)
        assert torch.equal(out[:, 0], expected)
        assert torch.equal(fit.coefficients[0], numbers.float())


class TestInstallationWithoutIt:
    @pytest.fixture
    def nothing_was_built(self, monkeypatch):
        monkeypatch.setattr(cpu, "library", lambda: None)
        cpu._warn_once.cache_clear()
        monkeypatch.setattr(eager, "CPU", cpu.CpuKernel())
        yield
        cpu._warn_once.cache_clear()

    @pytest.mark.usefixtures("nothing_was_built")
    def test_computes_the_same_and_says_once_what_is_lost(self, caplog):
        """At the first large call, and only there."""
        logits, labels = draw_tokens(9, 70)
        with caplog.at_level(logging.WARNING):
            result = value_and_gradient(overtone_loss, logits, labels)
            assert not caplog.records
            large = torch.zeros(1, cpu.MISSED_FROM)
            overtone_loss(large, torch.tensor([0]))
            overtone_loss(large, torch.tensor([0]))
        torch.testing.assert_close(result, value_and_gradient(reference_loss, logits, labels), rtol=1e-12, atol=1e-12)
        assert len(caplog.records) == 1
        assert "was not built" in caplog.records[0].message

    def test_a_library_of_another_version_is_left_alone(self, monkeypatch):
        """Where the Python alone was updated, as by git pull in an editable installation."""
        cpu.library.cache_clear()
        monkeypatch.setattr(cpu, "INTERFACE", cpu.INTERFACE + 1)
        assert cpu.library() is None
        cpu.library.cache_clear()

    def test_a_compiler_that_fails_is_no_failed_installation(self, tmp_path):
        """The extension is optional: building it reports a warning and success."""
        root = Path(__file__).parent.parent
        command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}/temp"]
        environment = {**os.environ, "CC": "false", "CXX": "false"}
        result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "building extension" in result.stdout + result.stderr
        assert not list(tmp_path.rglob("*.so"))
