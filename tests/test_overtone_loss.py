"""The public function: its theory, its derivatives, what it refuses, and which logits it takes."""

import importlib
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from gradients import value_and_gradient
from kernel_cases import FLOATS, SETTINGS, draw_tokens
from torch.autograd import forward_ad

from overtone import kernels, linear_overtone_loss, overtone_loss
from overtone.functional import reference_loss

UP_TO = kernels.CPU.gradient_with_fit_up_to


class TestTheory:
    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    def test_epsilon_0_lam_1_is_cross_entropy(self, reduction):
        """Proposition 3.1, value and gradient."""
        logits, labels = draw_tokens(60, 40)
        labels[::5] = -100
        expected, expected_gradient = value_and_gradient(F.cross_entropy, logits, labels, reduction=reduction)
        value, gradient = value_and_gradient(overtone_loss, logits, labels, epsilon=0, lam=1, reduction=reduction)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("check", [True, False])
    @pytest.mark.parametrize("epsilon", [0.0, 0.3])
    def test_gradcheck(self, check, epsilon):
        """Analytic and numeric gradients agree when the target is constant."""
        logits, labels = draw_tokens(6, 7)
        labels[2] = -100
        reference_logits, _ = draw_tokens(6, 7, seed=1)
        arguments = {"reference_logits": reference_logits, "lam": 0.4, "epsilon": epsilon, "check": check}
        logits.requires_grad_()
        assert torch.autograd.gradcheck(lambda s: overtone_loss(s, labels, reduction="none", **arguments), logits)

    def test_lemma_a3(self):
        """Where the check passed, CE(target, p) = lam CE(onehot, p) + (1 - lam) CE(filtered, p)."""
        logits, labels = draw_tokens(60, 40)
        lam = 0.3
        log_probs = logits.log_softmax(dim=1)
        top = logits.amax(dim=1, keepdim=True)
        filtered = logits.masked_fill(logits <= top - logits.std(dim=1, keepdim=True), -math.inf).softmax(dim=1)
        target = lam * F.one_hot(labels, 40) + (1 - lam) * filtered
        truth_part = lam * F.cross_entropy(logits, labels, reduction="none")
        filtered_part = -(1 - lam) * torch.where(filtered > 0, filtered * log_probs, 0).sum(dim=1)
        entropy = -torch.xlogy(target, target).sum(dim=1)
        kl = overtone_loss(logits, labels, epsilon=0, n_sigma=1.0, lam=lam, check=False, reduction="none")
        torch.testing.assert_close(kl + entropy, truth_part + filtered_part)


class TestUneditedModel:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("ignored", [False, True])
    def test_unedited_reference_logits(self, dtype, ignored):
        """With another model's logits for the filtered distribution the two agree as well."""
        logits, labels = draw_tokens(50, 30, dtype=dtype)
        reference_logits, _ = draw_tokens(50, 30, seed=1, dtype=dtype)
        if ignored:
            labels[::4] = -100
        arguments = {"reference_logits": reference_logits, "lam": 0.6}
        expected, expected_gradient = value_and_gradient(reference_loss, logits, labels, **arguments)
        value, gradient = value_and_gradient(overtone_loss, logits, labels, **arguments)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, expected_gradient)

    def test_own_logits_as_reference_change_nothing(self):
        """A reference that equals the logits gives the closed form's own value and gradient."""
        logits, labels = draw_tokens(60, 40)
        value, gradient = value_and_gradient(overtone_loss, logits, labels)
        other, other_gradient = value_and_gradient(overtone_loss, logits, labels, reference_logits=logits)
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, other_gradient, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("broken_logit", [math.nan, math.inf])
    def test_nan_is_not_hidden(self, broken_logit):
        """Of the unedited model either: its row's loss is NaN and no other's."""
        logits, labels = draw_tokens(3, 5)
        broken = logits.clone()
        broken[1, 2] = broken_logit
        values = overtone_loss(logits, labels, reference_logits=broken, reduction="none")
        assert values.isnan().tolist() == [False, True, False]

    def test_ignored_nan_is_hidden(self):
        """In a row that does not count, of either model, it reaches neither loss nor gradient."""
        logits, labels = draw_tokens(3, 5)
        unedited = logits + 1
        logits[1, 2], unedited[1, 3], labels[1] = math.nan, math.nan, -100
        value, gradient = value_and_gradient(overtone_loss, logits, labels, reference_logits=unedited)
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert not gradient[1].any()


class TestGradientWithTheLoss:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_is_the_backward_pass_own(self, dtype, reduction, monkeypatch):
        """Worked out at once, and given out once; bit for bit what the backward pass would have worked out."""
        logits, labels = draw_tokens(9, 700, dtype=dtype)
        labels[1] = -100
        for arguments in (*SETTINGS, {"epsilon": 0.5, "hold": "correct"}):
            results = []
            for limit in (UP_TO, 0):
                monkeypatch.setattr(kernels.CPU, "gradient_with_fit_up_to", limit)
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

    @pytest.mark.parametrize("limit", [UP_TO, 0])
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

        monkeypatch.setattr(kernels.CPU, "gradient_with_fit_up_to", limit)
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


class TestDerivatives:
    def test_forward_mode_is_refused(self):
        """With what to do instead, whether the logits are trained or not."""
        logits, labels = draw_tokens(3, 5)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(lambda s: overtone_loss(s, labels), (logits,), (torch.ones_like(logits),))
        with forward_ad.dual_level():
            for scores in (logits, logits.clone().requires_grad_()):
                dual = forward_ad.make_dual(scores, torch.ones_like(scores))
                with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                    overtone_loss(dual, labels)

    def test_changed_logits_are_noticed(self, monkeypatch):
        """Logits modified in place between the passes raise torch's version error instead of a wrong gradient."""
        monkeypatch.setattr(kernels.CPU, "gradient_with_fit_up_to", 0)
        logits, labels = draw_tokens(12, 9)
        scores = logits.requires_grad_() * 1
        loss = overtone_loss(scores, labels)
        scores.detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_several_threads(self):
        """Calls of several threads at once do not disturb each other."""
        logits, labels = draw_tokens(200, 90)
        expected = value_and_gradient(reference_loss, logits, labels)
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: value_and_gradient(overtone_loss, logits, labels), range(20)))
        for value, gradient in results:
            torch.testing.assert_close(value, expected[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-12)

    def test_cpu_autocast(self):
        """Inside autocast a bfloat16 model's logits are worked out in float32 all the same."""
        torch.manual_seed(0)
        linear = torch.nn.Linear(16, 50)
        inputs, labels = torch.randn(20, 16), torch.randint(50, (20,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = linear(inputs)
            loss = overtone_loss(logits, labels)
        loss.backward()
        assert logits.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        assert torch.equal(loss, overtone_loss(logits.detach(), labels))


class TestTransforms:
    """torch.func's, judged by F.cross_entropy, which the loss equals at lam=1 and epsilon=0, and by a loop."""

    def test_from_hidden_states(self):
        """With the gradient of two steps."""
        hidden, weight, labels = torch.randn(4, 8), torch.randn(11, 8), torch.arange(4)
        own = torch.func.grad(lambda h: linear_overtone_loss(h, weight, labels))(hidden)
        torch.testing.assert_close(own, torch.func.grad(lambda h: overtone_loss(h @ weight.t(), labels))(hidden))

    @pytest.mark.parametrize("epsilon", [0.0, 100.0])
    def test_a_hold_is_refused_whether_or_not_it_is_met(self, epsilon):
        """A transform returns a gradient whatever the values are."""
        logits, labels = draw_tokens(12, 9)
        with pytest.raises(ValueError, match=r"hold='settled' cannot be used inside torch\.func"):
            torch.func.grad(lambda s: overtone_loss(s, labels, epsilon=epsilon, hold="settled"))(logits)

    def test_grad(self):
        logits, labels = draw_tokens(12, 9)
        labels[2] = -100
        own = torch.func.grad(lambda s: overtone_loss(s, labels, lam=1.0, epsilon=0.0))(logits)
        torch.testing.assert_close(own, torch.func.grad(lambda s: F.cross_entropy(s, labels))(logits))
        value, gradient = value_and_gradient(overtone_loss, logits, labels)
        own, own_value = torch.func.grad_and_value(lambda s: overtone_loss(s, labels))(logits)
        torch.testing.assert_close((own_value, own), (value, gradient), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_vmap(self, reduction, dtype):
        """Over a batch in front, behind, and with the same labels for all; a call without a label is 0."""
        logits, labels = draw_tokens(12, 9, dtype=dtype)
        logits, labels = logits.view(3, 4, 9), labels.view(3, 4).clone()
        labels[0, 1], labels[2] = -100, -100

        def loss(s, y):
            return overtone_loss(s, y, reduction=reduction)

        expected = torch.stack([loss(s, y) for s, y in zip(logits, labels, strict=True)])
        torch.testing.assert_close(torch.func.vmap(loss)(logits, labels), expected)
        torch.testing.assert_close(torch.func.vmap(loss, in_dims=(1, 0))(logits.movedim(0, 1), labels), expected)
        alike = torch.func.vmap(loss, in_dims=(0, None))(logits, labels[0])
        torch.testing.assert_close(alike, torch.stack([loss(s, labels[0]) for s in logits]))

    @pytest.mark.parametrize("settings", [{}, {"lam": 1.0, "epsilon": 0.0}, {"reduction": "sum", "check": False}])
    def test_gradients_of_each_sample(self, settings):
        """vmap of grad, as for differential privacy, is the loop's; at lam=1 it is cross-entropy's."""
        torch.manual_seed(0)
        weight, inputs, labels = torch.randn(7, 5), torch.randn(4, 3, 5), torch.randint(7, (4, 3))
        labels[1, 0] = -100

        def per_sample(loss, **arguments):
            def of_one(weight, x, y):
                return loss(x @ weight.t(), y, **arguments)

            return torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0))(weight, inputs, labels)

        own = per_sample(overtone_loss, **settings)
        for index in range(4):
            leaf = weight.clone().requires_grad_()
            overtone_loss(inputs[index] @ leaf.t(), labels[index], **settings).backward()
            torch.testing.assert_close(own[index], leaf.grad, rtol=1e-5, atol=1e-6)
        if settings.get("lam") == 1:
            torch.testing.assert_close(own, per_sample(F.cross_entropy), rtol=1e-5, atol=1e-6)

    def test_grad_of_vmap(self):
        """The transforms the other way round."""
        logits, labels = draw_tokens(12, 9)
        batch, batch_labels = logits.view(3, 4, 9), labels.view(3, 4)
        own = torch.func.grad(lambda s: torch.func.vmap(overtone_loss)(s, batch_labels).sum())(batch)
        each = [value_and_gradient(overtone_loss, s, y)[1] for s, y in zip(batch, batch_labels, strict=True)]
        torch.testing.assert_close(own, torch.stack(each), rtol=1e-12, atol=1e-12)

    def test_a_second_derivative_is_refused(self):
        logits, labels = draw_tokens(3, 5)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.func.grad(lambda s: torch.func.grad(overtone_loss)(s, labels).sum())(logits)


class TestCompile:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ignored", [False, True])
    def test_one_graph_and_the_same_values(self, dtype, ignored):
        """A compiled step stays one graph and gives eager's value and gradient bit for bit."""
        logits, labels = draw_tokens(24, 33, dtype=dtype)
        if ignored:
            labels[::4] = -100
        step = torch.compile(overtone_loss, fullgraph=True, backend="aot_eager")
        value, gradient = value_and_gradient(step, logits, labels)
        expected, expected_gradient = value_and_gradient(overtone_loss, logits, labels)
        assert torch.equal(value, expected)
        assert torch.equal(gradient, expected_gradient)

    def test_other_settings_stay_one_graph(self):
        """Settings that change between calls, which the compiler then takes for variables, break no graph."""
        torch.compiler.reset()
        logits, labels = draw_tokens(24, 33)
        step = torch.compile(overtone_loss, fullgraph=True, backend="aot_eager")
        for arguments in ({}, {"epsilon": 0.1}, {"epsilon": 0.3, "lam": 0.4}, {"lam": 0.6, "n_sigma": 1.5}):
            value, gradient = value_and_gradient(step, logits, labels, **arguments)
            expected, expected_gradient = value_and_gradient(overtone_loss, logits, labels, **arguments)
            assert torch.equal(value, expected)
            assert torch.equal(gradient, expected_gradient)

    def test_a_hold_needs_breaks_in_the_graph(self):
        """With them it holds as ever; in one graph the error names it and the way out."""
        torch.compiler.reset()
        logits, labels = draw_tokens(6, 5)
        leaf = logits.clone().requires_grad_()
        torch.compile(overtone_loss, backend="aot_eager")(leaf, labels, epsilon=99.0, hold="settled").backward()
        assert leaf.grad is None
        torch.compiler.reset()
        step = torch.compile(overtone_loss, fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match=r"hold='settled' cannot .* compile the model alone"):
            step(logits, labels, hold="settled")

    def test_operators_are_well_defined(self):
        """torch's own checks of schema and fake tensors pass, for both kernels."""
        importlib.import_module("overtone.kernels.graph")
        logits, labels = draw_tokens(6, 5)
        for scores in (logits, logits.t().contiguous().t()):
            for reduction in ("mean", "none"):
                arguments = scores, labels, 0.5, 0.1, True, 0.05, False, reduction, -100, 1.0
                torch.library.opcheck(torch.ops.overtone.fit.default, arguments)
            _, _, coefficients, row_weights = torch.ops.overtone.fit(*arguments)
            torch.library.opcheck(torch.ops.overtone.gradient.default, (row_weights, scores, labels, coefficients))


class TestSynchronisation:
    """On the meta device, where tensors hold no values, whatever would wait for one on a GPU raises."""

    @pytest.mark.parametrize("count", [6, 3000])
    @pytest.mark.parametrize(
        "settings",
        [{}, {"reduction": "none"}, {"reduction": "sum"}, {"n_sigma": None}, {"check": False}],
    )
    @pytest.mark.parametrize("has_reference", [False, True])
    def test_the_host_waits_for_nothing(self, settings, count, has_reference):
        logits = torch.randn(count, 50, device="meta", requires_grad=True)
        labels = torch.zeros(count, dtype=torch.long, device="meta")
        reference = torch.randn(count, 50, device="meta") if has_reference else None
        overtone_loss(logits, labels, reference_logits=reference, **settings).sum().backward()
        assert logits.grad.shape == logits.shape

    def test_a_hold_does(self):
        """It has to know whether every token is settled."""
        logits, labels = torch.randn(6, 50, device="meta", requires_grad=True), torch.zeros(6).long().to("meta")
        with pytest.raises(RuntimeError, match=r"(?i)meta"):
            overtone_loss(logits, labels, hold="settled")


class TestBadInput:
    @pytest.mark.parametrize("loss", [overtone_loss, reference_loss])
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"epsilon": -0.1}, "epsilon must be .* got -0.1"),
            ({"epsilon": math.nan}, "epsilon must be .* got nan"),
            ({"n_sigma": 0}, "n_sigma must be .* got 0"),
            ({"n_sigma": -1.0}, "n_sigma must be .* got -1.0"),
            ({"lam": 1.1}, r"lam must be a number in \[0, 1\], got 1.1"),
            ({"lam": -0.1}, "lam must be"),
            ({"reduction": "avg"}, "reduction must be one of .* got 'avg'"),
            ({"ignore_index": 2**64 + 3}, "ignore_index must be a label as int64 holds them, got 18446744073709551619"),
            ({"hold": -1.0}, "hold must be .* got -1.0"),
            ({"hold": 0}, "hold must be .* got 0"),
            ({"hold": math.inf}, "hold=inf would hold every call"),
            ({"hold": "setled"}, "hold must be .* got 'setled'"),
            ({"hold": ()}, r"hold must be .* got \(\)"),
            ({"hold": (0.1, 0.2)}, r"hold must be .* got \(0.1, 0.2\)"),
            ({"hold": ["correct", "correct"]}, "hold must be .* got"),
            ({"labels": torch.tensor([0, 5])}, r"labels must lie in \[0, 5\) .* got 5"),
            ({"labels": torch.tensor([0, -1])}, r"labels must lie in \[0, 5\) .* got -1"),
            ({"labels": torch.tensor([0])}, r"labels must have the shape .* \(2, 5\), labels \(...\) is \(1,\)"),
            ({"labels": torch.tensor([0.0, 1.0])}, "labels must be integer token ids, got torch.float32"),
            ({"logits": torch.zeros(2, 5, dtype=torch.long)}, "logits must be floating point, got torch.int64"),
            ({"logits": torch.zeros(2, 0)}, "logits must have a vocabulary"),
            ({"logits": torch.tensor(1.0), "labels": torch.tensor(0)}, "labels must have the shape"),
            ({"reference_logits": torch.zeros(2, 4)}, r"reference_logits must have the shape of logits \(2, 5\)"),
            ({"reference_logits": torch.zeros(2, 5, dtype=torch.long)}, "reference_logits must be floating point"),
            ({"labels": torch.zeros(2, dtype=torch.long, device="meta")}, "labels must be on the device of logits"),
        ],
    )
    def test_value_errors_name_argument_and_value(self, loss, arguments, message):
        """Each bad value is refused by name, before anything is computed."""
        arguments = {"logits": torch.zeros(2, 5), "labels": torch.tensor([0, 1]), **arguments}
        with pytest.raises(ValueError, match=message):
            loss(arguments.pop("logits"), arguments.pop("labels"), **arguments)

    @pytest.mark.parametrize("loss", [overtone_loss, reference_loss])
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"epsilon": "0.1"}, "epsilon must be .* of type str"),
            ({"lam": True}, "lam must be .* of type bool"),
            ({"lam": torch.tensor(0.1)}, "lam must be .* of type Tensor; pass a Python number"),
            ({"check": None}, "check must be True or False, got None"),
            ({"check": 1}, "check must be True or False, got 1"),
            ({"ignore_index": None}, "ignore_index must be an integer label, got None"),
            ({"ignore_index": 1.0}, "ignore_index must be an integer label, got 1.0"),
            ({"hold": {"settled": True}}, "hold must be .* of type dict"),
            ({"hold": ("correct", True)}, "hold must be .* of type tuple"),
            ({"logits": [[0.0]]}, "logits must be a torch.Tensor, got list"),
            ({"labels": [0, 1]}, "labels must be a torch.Tensor, got list"),
            ({"reference_logits": 3}, "reference_logits must be a torch.Tensor or None"),
        ],
    )
    def test_type_errors_name_argument_and_type(self, loss, arguments, message):
        """A value of the wrong type is refused by name."""
        arguments = {"logits": torch.zeros(2, 5), "labels": torch.tensor([0, 1]), **arguments}
        with pytest.raises(TypeError, match=message):
            loss(arguments.pop("logits"), arguments.pop("labels"), **arguments)

    @pytest.mark.parametrize("name", ["shard", "hold_group"])
    def test_what_belongs_to_ranks_is_refused_by_type(self, name):
        tensors = torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([0, 1])
        with pytest.raises(TypeError, match=f"{name} must be .* or None, got 3 of type int"):
            overtone_loss(tensors[1][:2], tensors[2], **{name: 3})
        with pytest.raises(TypeError, match=f"{name} must be .* or None, got 3 of type int"):
            linear_overtone_loss(*tensors, **{name: 3})

    def test_class_second_logits_are_refused_with_a_hint(self):
        """(B, V, L) logits, as CrossEntropyLoss takes them, are never guessed at."""
        with pytest.raises(ValueError, match=r"movedim\(1, -1\)"):
            overtone_loss(torch.zeros(2, 5, 3), torch.zeros(2, 3, dtype=torch.long))
