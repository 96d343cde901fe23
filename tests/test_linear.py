"""The loss from hidden states against the two-step version, F.linear and then overtone_loss."""

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from largest_tensor import LargestTensor

from overtone import linear, linear_overtone_loss, overtone_loss

ROWS, HIDDEN, VOCABULARY = 23, 16, 41


def draw_layer(dtype=torch.float64, seed=0):
    """Hidden states, weight, bias and labels of which every third is well predicted and every fifth ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    labels[::3] = F.linear(hidden, weight, bias).argmax(dim=1)[::3]
    hidden[::3] *= 2
    labels[::5] = -100
    return [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)], labels


def two_step(hidden, weight, labels, *, bias=None, chunk_size=None, **arguments):
    return overtone_loss(F.linear(hidden, weight, bias), labels, **arguments)


def value_and_gradients(loss, tensors, labels, upstream=1.0, **arguments):
    leaves = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    hidden, weight, bias = leaves
    value = loss(hidden, weight, labels, bias=bias, **arguments)
    (value * upstream).sum().backward()
    return value.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


class TestAgainstTwoSteps:
    @pytest.mark.parametrize("chunk_size", [None, 1, 3, 1000])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"epsilon": 0.0},
            {"n_sigma": None, "lam": 0.5},
            {"check": False, "n_sigma": 2.0},
            {"epsilon": 0, "lam": 1},
            {"epsilon": 30.0, "hold": ("correct", 1e-9)},
        ],
        ids=str,
    )
    def test_float64(self, chunk_size, reduction, arguments):
        """Value and all three gradients to 1e-12, whatever the chunk, also with a ragged last one."""
        tensors, labels = draw_layer()
        arguments = {**arguments, "reduction": reduction}
        expected, expected_gradients = value_and_gradients(two_step, tensors, labels, 0.7, **arguments)
        value, gradients = value_and_gradients(
            linear_overtone_loss, tensors, labels, 0.7, chunk_size=chunk_size, **arguments
        )
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)

    def test_rows_that_weigh_differently(self):
        """Weights on single tokens reach every gradient, although the forward pass did not know them."""
        tensors, labels = draw_layer()
        upstream = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
        arguments = {"reduction": "none", "upstream": upstream}
        expected, expected_gradients = value_and_gradients(two_step, tensors, labels, **arguments)
        value, gradients = value_and_gradients(linear_overtone_loss, tensors, labels, chunk_size=4, **arguments)
        torch.testing.assert_close(value, expected)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)

    def test_unedited_reference_logits_are_refused(self):
        """They would be all the logits of another model; the error says where they can go."""
        (hidden, weight, _), labels = draw_layer()
        with pytest.raises(ValueError, match=r"reference_logits must be None.*overtone_loss\(F\.linear"):
            linear_overtone_loss(hidden, weight, labels, reference_logits=torch.zeros(ROWS, VOCABULARY))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lower_precision(self, dtype):
        """The error against float64 is at most that of the two-step version in the same precision, and a rounding."""
        tensors, labels = draw_layer(dtype)
        exact = value_and_gradients(
            two_step, [tensor.detach().double().requires_grad_() for tensor in tensors], labels
        )[1]
        yardstick = value_and_gradients(two_step, tensors, labels)[1]
        gradients = value_and_gradients(linear_overtone_loss, tensors, labels, chunk_size=5)[1]
        for gradient, standard, truth in zip(gradients, yardstick, exact, strict=True):
            assert gradient.dtype == dtype
            allowed = (standard.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
            assert (gradient.double() - truth).abs().max() <= allowed

    @pytest.mark.parametrize("upstream", [1.0, torch.linspace(-1, 2, 40)], ids=["alike", "weighted"])
    def test_vocabulary_in_slices(self, upstream):
        """In bfloat16 a trained weight has its gradient from slices of the vocabulary, the last of them ragged."""
        generator = torch.Generator().manual_seed(0)
        hidden, weight, bias = (
            torch.randn(*shape, generator=generator).bfloat16().requires_grad_()
            for shape in ((40, 16), (3 * linear.CHUNK_MULTIPLE + 11, 16), (3 * linear.CHUNK_MULTIPLE + 11,))
        )
        labels = (hidden @ weight.t() + bias).argmax(dim=1)  # so that some tokens are settled
        labels[::2] = torch.arange(20) * 10
        labels[1] = -100
        arguments = {"upstream": upstream, "reduction": "none", "epsilon": 0.1}
        tensors = hidden, weight, bias
        in_float64 = [tensor.detach().double().requires_grad_() for tensor in tensors]
        exact = value_and_gradients(two_step, in_float64, labels, **arguments)[1]
        yardstick = value_and_gradients(two_step, tensors, labels, **arguments)[1]
        gradients = value_and_gradients(linear_overtone_loss, tensors, labels, chunk_size=8, **arguments)[1]
        for gradient, standard, truth in zip(gradients, yardstick, exact, strict=True):
            allowed = (standard.double() - truth).abs().max() + torch.finfo(torch.bfloat16).eps * truth.abs().max()
            assert (gradient.double() - truth).abs().max() <= allowed

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_many_chunks_lose_nothing(self, dtype):
        """Hundreds of chunks lose nothing against the two-step version, and large hidden states do not overflow."""
        generator = torch.Generator().manual_seed(0)
        hidden = (torch.randn(1024, 8, generator=generator) * 30 + 100).to(dtype)
        weight = (torch.randn(20, 8, generator=generator) / 100).to(dtype)
        labels = torch.randint(20, (1024,), generator=generator)
        tensors = [hidden.requires_grad_(), weight.requires_grad_(), None]
        in_float64 = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), None]
        exact = value_and_gradients(two_step, in_float64, labels)[1][1]
        standard = value_and_gradients(two_step, tensors, labels)[1][1]
        gradient = value_and_gradients(linear_overtone_loss, tensors, labels, chunk_size=4)[1][1]
        allowed = (standard.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (gradient.double() - exact).abs().max() <= allowed

    def test_nan_is_not_hidden(self):
        """A NaN hidden state makes the loss and the gradients that it reaches NaN."""
        tensors, labels = draw_layer()
        with torch.no_grad():
            tensors[0][1, 0] = float("nan")
        value, gradients = value_and_gradients(linear_overtone_loss, tensors, labels, chunk_size=4)
        assert value.isnan()
        assert gradients[0][1].isnan().all()
        assert gradients[0][2:].isfinite().all()
        assert gradients[1].isnan().any()

    def test_second_derivatives_raise(self):
        """A gradient penalty would silently get none; the target's derivative is left out by design."""
        (hidden, weight, bias), labels = draw_layer()
        loss = linear_overtone_loss(hidden, weight, labels, bias=bias)
        gradients = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
        for gradient in gradients:
            with pytest.raises(RuntimeError, match="no second derivative"):
                (loss + gradient.square().sum()).backward(retain_graph=True)

    def test_float16_under_a_loss_scale(self):
        """Small gradients of a mean survive as they do in two steps: the scale comes before they are rounded."""
        torch.manual_seed(0)
        labels, scale = torch.randint(10, (2000,)), 4096.0
        start = torch.randn(2000, 8), torch.randn(400, 8) * 0.1
        rare = torch.cat([torch.zeros(10), torch.full((390,), -12.0)])
        gradients = []
        for loss, dtype in (
            (linear_overtone_loss, torch.float16),
            (two_step, torch.float16),
            (two_step, torch.float32),
        ):
            hidden, weight = (tensor.half().to(dtype).requires_grad_() for tensor in start)
            (loss(hidden, weight, labels, bias=rare.to(dtype), chunk_size=500) * scale).backward()
            gradients.append(weight.grad[10:].float())
        ours, yardstick = ((gradient - gradients[2]).norm() for gradient in gradients[:2])
        assert ours <= 1.5 * yardstick

    def test_second_backward(self):
        """With retain_graph a second backward adds the same gradients again."""
        (hidden, weight, bias), labels = draw_layer()
        loss = linear_overtone_loss(hidden, weight, labels, bias=bias, chunk_size=4)
        loss.backward(retain_graph=True)
        once = [tensor.grad.clone() for tensor in (hidden, weight, bias)]
        loss.backward()
        for tensor, gradient in zip((hidden, weight, bias), once, strict=True):
            torch.testing.assert_close(tensor.grad, 2 * gradient, rtol=1e-12, atol=1e-12)

    def test_leading_dimensions(self):
        """hidden (batch, sequence, H) with labels (batch, sequence)."""
        (hidden, weight, _), labels = draw_layer()
        batched = hidden.detach()[:20].reshape(4, 5, HIDDEN)
        loss = linear_overtone_loss(batched, weight, labels[:20].reshape(4, 5), reduction="none")
        assert loss.shape == (4, 5)
        torch.testing.assert_close(loss.flatten(), two_step(hidden[:20], weight, labels[:20], reduction="none"))


class TestEditing:
    def test_frozen_weight_has_no_gradient(self):
        """A frozen output layer, as editing has it, gets no gradient and no work for one."""
        (hidden, weight, bias), labels = draw_layer()
        tensors = [hidden, weight.detach(), bias.detach()]
        expected = value_and_gradients(two_step, tensors, labels)[1]
        gradients = value_and_gradients(linear_overtone_loss, tensors, labels, chunk_size=4)[1]
        torch.testing.assert_close(gradients[0], expected[0], rtol=1e-12, atol=1e-12)
        assert gradients[1] is gradients[2] is None

    def test_tied_embeddings(self):
        """A weight that is also the embedding gets both gradients."""
        embedding, labels = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64), draw_layer()[1]
        tokens = torch.randint(VOCABULARY, (ROWS,))
        results = []
        for loss in (two_step, linear_overtone_loss):
            weight = embedding.clone().requires_grad_()
            loss(F.embedding(tokens, weight).tanh(), weight, labels, chunk_size=4).backward()
            results.append(weight.grad)
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)

    def test_hold(self):
        """A held call gives no gradient to anything."""
        (hidden, weight, bias), labels = draw_layer()
        linear_overtone_loss(hidden, weight, labels, bias=bias, epsilon=99.0, hold="settled").backward()
        assert hidden.grad is weight.grad is bias.grad is None

    def test_no_grad_works_out_no_gradient(self, monkeypatch):
        """Evaluation does none of the gradients' work."""
        (hidden, weight, bias), labels = draw_layer()
        fit_chunk, overwritten = linear._fit_chunk, []

        def watched(*arguments, overwrite, **options):
            overwritten.append(overwrite)
            return fit_chunk(*arguments, overwrite=overwrite, **options)

        monkeypatch.setattr(linear, "_fit_chunk", watched)
        monkeypatch.setattr(linear, "_add_gradients", None)
        with torch.no_grad():
            loss = linear_overtone_loss(hidden, weight, labels, bias=bias)
        assert overwritten
        assert not any(overwritten)
        torch.testing.assert_close(loss, two_step(hidden, weight, labels, bias=bias).detach())

    def test_autocast(self):
        """Under autocast the layer works in bfloat16 and the float32 leaves get float32 gradients."""
        tensors, labels = draw_layer(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, expected_gradients = value_and_gradients(two_step, tensors, labels)
            value, gradients = value_and_gradients(linear_overtone_loss, tensors, labels)
        torch.testing.assert_close(value, expected)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, expected_gradient, rtol=0.02, atol=0.02)

    def test_compiled_caller(self):
        """A compiled step around it gives the same values; the loss itself stays outside the graph."""
        (hidden, weight, _), labels = draw_layer()

        def step(hidden, weight):
            return linear_overtone_loss(hidden.tanh(), weight, labels)

        compiled = torch.compile(step, backend="aot_eager")
        torch.testing.assert_close(compiled(hidden, weight), two_step(hidden.tanh(), weight, labels))
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(step, backend="aot_eager", fullgraph=True)(hidden, weight)

    @pytest.mark.parametrize("rows", [0, 3])
    def test_nothing_counted(self, rows):
        """No rows, or none that counts: 0 with a graph, gradients of zeros."""
        hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        loss = linear_overtone_loss(hidden, weight, torch.full((rows,), -100))
        loss.backward()
        assert loss == 0
        assert (hidden.grad == 0).all()
        assert (weight.grad == 0).all()


class TestMemory:
    def test_never_more_than_a_chunk_of_logits(self):
        """No tensor of the whole call is larger than a chunk's logits."""
        hidden, weight = torch.randn(60, 4, requires_grad=True), torch.randn(1000, 4)
        labels = torch.randint(1000, (60,))
        with LargestTensor() as largest:
            linear_overtone_loss(hidden, weight, labels, chunk_size=6).backward()
        assert largest.elements <= 6 * 1000 < 60 * 1000


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"weight": torch.zeros(5, 3)}, r"weight must be \(V, H\) .* got weight \(5, 3\) for hidden \(2, 4\)"),
            (
                {"hidden": torch.zeros(2, 0), "weight": torch.zeros(5, 0)},
                r"hidden must have features .* \(2, 0\)",
            ),
            ({"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}, "weight must be torch.float32 .* got torch.bfloat16"),
            ({"bias": torch.zeros(4)}, r"bias must be \(5,\)"),
            ({"chunk_size": 0}, "chunk_size must be .* got 0"),
            ({"chunk_size": 2.5}, "chunk_size must be .* got 2.5"),
            ({"labels": torch.tensor([0, 5])}, r"labels must lie in \[0, 5\) .* got 5"),
            ({"labels": torch.tensor([0])}, "labels must have the shape of logits"),
            ({"epsilon": -1}, "epsilon must be"),
            ({"hidden": torch.zeros(2, 4, dtype=torch.long)}, "hidden must be floating point, got torch.int64"),
        ],
    )
    def test_errors_name_the_argument(self, arguments, message):
        """Each bad value is refused by name."""
        arguments = {
            "hidden": torch.zeros(2, 4),
            "weight": torch.zeros(5, 4),
            "labels": torch.tensor([0, 1]),
            **arguments,
        }
        with pytest.raises(ValueError, match=message):
            linear_overtone_loss(**arguments)

    @pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
    def test_lists_are_refused(self, name):
        """What is no tensor is refused by name."""
        arguments = {
            "hidden": torch.zeros(2, 4),
            "weight": torch.zeros(5, 4),
            "labels": torch.tensor([0, 1]),
            name: [0],
        }
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor.*, got list"):
            linear_overtone_loss(**arguments)
