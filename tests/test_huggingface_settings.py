"""The same loss on the same tokens: precision, checkpointing, compilation, padding, packing; real architectures."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
import transformers
from packaging.version import Version

from overtone import OverToneConfig
from overtone.functional import reference_loss
from overtone.huggingface import attach

HELD = OverToneConfig(epsilon=50.0, hold="settled")

architectures = pytest.mark.parametrize("arch", tiny_models.ARCHITECTURES)


def without_auxiliary(arch: str, **changes: Any) -> Any:
    """A model whose loss is the tokens' alone, so that it can be compared across batches."""
    model = tiny_models.build(arch, **changes)
    if arch == "mixtral":
        model.config.output_router_logits = False
    return model


def reference(outputs: Any, labels: torch.Tensor, reduction: Any = "mean") -> torch.Tensor:
    return reference_loss(outputs.logits[:, :-1], labels[:, 1:], reduction=reduction)


def gradients(loss: torch.Tensor, model: Any) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@architectures
class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, arch, dtype):
        """Half-precision logits: the loss in float32 of those very logits, and the gradient that it sends through."""
        model = without_auxiliary(arch)
        batch = tiny_models.ragged_batch(model)
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(**batch)
            assert outputs.logits.dtype == dtype
            expected = reference(outputs, batch["labels"])
            with attach(model):
                loss = model(**batch).loss
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        # Yardstick: one rounding of the logits' gradient to the half precision, carried back to the weights.
        tolerance = 4 * torch.finfo(dtype).eps
        for ours, theirs in zip(gradients(loss, model), gradients(expected, model), strict=True):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_weights(self, arch, dtype):
        """A model loaded in half precision."""
        model = without_auxiliary(arch, dtype=dtype)
        batch = tiny_models.ragged_batch(model)
        expected = reference(model(**batch), batch["labels"])
        with attach(model):
            loss = model(**batch).loss
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@architectures
@pytest.mark.parametrize("use_reentrant", [True, False])
class TestGradientCheckpointing:
    def test_gives_the_same_gradient(self, arch, use_reentrant):
        """As without it."""
        model = tiny_models.build(arch)
        batch = tiny_models.ragged_batch(model)
        with attach(model):
            expected = gradients(model(**batch).loss, model)
            self.checkpoint(model, use_reentrant)
            # Reentrant checkpointing refuses torch.autograd.grad.
            model(**batch).loss.backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)

    def test_a_held_step_gives_none(self, arch, use_reentrant):
        """Not even reentrant checkpointing makes zeros of it."""
        model = without_auxiliary(arch)
        batch = tiny_models.ragged_batch(model)
        self.checkpoint(model, use_reentrant)
        with attach(model, HELD):
            model(**batch).loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())

    def checkpoint(self, model: Any, use_reentrant: bool) -> None:
        for module in model.modules():
            if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
                module.attention_dropout = 0.0
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


class TestCompile:
    @pytest.mark.parametrize("arch", ["llama", "gpt2"])
    def test_gives_the_eager_loss_and_gradient(self, arch):
        """The forward and the loss in one compiled model, which passes the logits by name or by position."""
        torch.compiler.reset()
        model = tiny_models.build(arch, layers=1)
        batch = tiny_models.ragged_batch(model)
        with attach(model):
            expected = model(**batch).loss
            loss = torch.compile(model, backend="aot_eager")(**batch).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(gradients(loss, model), gradients(expected, model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_a_model_that_has_run_notices_every_change(self):
        """Compiled and run, then attached, then held, then detached."""
        torch.compiler.reset()
        model = tiny_models.build(layers=1)
        batch = tiny_models.ragged_batch(model)
        compiled = torch.compile(model, backend="eager")
        before = compiled(**batch).loss
        with attach(compiled):
            torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
            with attach(compiled, HELD):
                compiled(**batch).loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert compiled(**batch).loss == before


@architectures
class TestLayout:
    LENGTHS = (9, 5, 7)

    def rows(self, model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens and labels of each sequence; the first token has no label, since nothing before it predicts it."""
        batch = tiny_models.ragged_batch(model, self.LENGTHS)
        batch["labels"][:, 0] = -100
        return [
            (batch["input_ids"][row, :length], batch["labels"][row, :length]) for row, length in enumerate(self.LENGTHS)
        ]

    def expected(self, model: Any) -> torch.Tensor:
        """The literal loss of each sequence by itself, over all label tokens."""
        rows = self.rows(model)
        total = sum(reference(model(input_ids=ids[None]), labels[None], "sum") for ids, labels in rows)
        return total / sum(labels.ne(-100).sum() for _, labels in rows)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, arch, side):
        """Padded on either side, with position ids that count from the first token."""
        model = without_auxiliary(arch)
        width = max(self.LENGTHS)

        def padded(values: torch.Tensor, fill: int) -> torch.Tensor:
            missing = width - len(values)
            return torch.nn.functional.pad(values, (missing, 0) if side == "left" else (0, missing), value=fill)

        rows = self.rows(model)
        attention_mask = torch.stack([padded(torch.ones_like(ids), 0) for ids, _ in rows])
        batch = {
            "input_ids": torch.stack([padded(ids, tiny_models.PAD) for ids, _ in rows]),
            "labels": torch.stack([padded(labels, -100) for _, labels in rows]),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        }
        with attach(model):
            torch.testing.assert_close(model(**batch).loss, self.expected(model), rtol=1e-5, atol=1e-5)

    def test_packing(self, arch):
        """Sequences in one row, told apart by their position ids."""
        if Version(transformers.__version__) < Version("4.53"):
            pytest.skip(f"transformers {transformers.__version__} tells them apart in flash attention alone")
        model = without_auxiliary(arch)
        rows = self.rows(model)
        batch = {
            "input_ids": torch.cat([ids for ids, _ in rows])[None],
            "labels": torch.cat([labels for _, labels in rows])[None],
            "position_ids": torch.cat([torch.arange(length) for length in self.LENGTHS])[None],
        }
        with attach(model):
            loss = model(**batch, use_cache=False).loss
        torch.testing.assert_close(loss, self.expected(model), rtol=1e-5, atol=1e-5)
