"""What must stay: the anchored term against torch's KL, its literal form and numerical differentiation."""

import itertools
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gradients import value_and_gradient
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import FLOATS, draw_tokens
from torch.utils._python_dispatch import TorchDispatchMode

from overtone import Anchors, OverToneConfig, OverToneLoss, VocabularyShard, linear_overtone_loss, overtone_loss
from overtone.functional import reference_loss
from overtone.token_loss import EditLoss

VOCABULARY, HIDDEN = 37, 8
PROMPT = torch.tensor([[True, True, True, False, False], [False, True, False, False, False]])
"""Positions that must stay; the others are targets, but for one that is neither."""


def call(dtype=torch.float64, moved=1.0):
    """Logits (2, 5, V), those of the unedited model, and labels."""
    logits, labels = draw_tokens(PROMPT.numel(), VOCABULARY, spread=2.0)
    before = logits + moved * draw_tokens(PROMPT.numel(), VOCABULARY, seed=1, spread=1.0)[0]
    labels = labels.reshape(PROMPT.shape).masked_fill(PROMPT, -100)
    labels[1, 0] = -100
    shape = (*PROMPT.shape, VOCABULARY)
    return logits.reshape(shape).to(dtype), before.reshape(shape).to(dtype), labels


def layer(dtype=torch.float64):
    """Hidden states (2, 5, H), weight, bias and the unedited weight of an output layer, and labels."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, change = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((*PROMPT.shape, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,), (VOCABULARY, HIDDEN))
    )
    tensors = (hidden, weight, bias, weight + change / 3)
    return *(tensor.to(dtype) for tensor in tensors), call()[2]


def two_groups(before, top_k=None):
    """The prompt in two parts of their own, which share a position, one at a third of the weight."""
    first, second = PROMPT.clone(), PROMPT.clone()
    first[0, 0] = False
    second[0, 1] = False
    return [Anchors.record(before, first, top_k=top_k), Anchors.record(before, second, top_k=top_k, group_weight=1 / 3)]


class TestValue:
    def test_is_torchs_kl(self):
        """Targets' loss + anchor * mean of KL(pi_0 || pi), and the gradient there is anchor / A * (pi - pi_0)."""
        logits, before, labels = call()
        settings = {"anchors": Anchors.record(before, PROMPT), "anchor": 2.0, "anchor_epsilon": 0.0}
        value, gradient = value_and_gradient(overtone_loss, logits, labels, **settings)
        targets, targets_gradient = value_and_gradient(overtone_loss, logits, labels)
        log_pi, log_pi_0 = logits[PROMPT].log_softmax(-1), before[PROMPT].log_softmax(-1)
        expected = F.kl_div(log_pi, log_pi_0, log_target=True, reduction="batchmean")
        torch.testing.assert_close(value, targets + 2 * expected)
        torch.testing.assert_close(gradient[PROMPT], 2 / 4 * (log_pi.exp() - log_pi_0.exp()))
        assert torch.equal(gradient[~PROMPT], targets_gradient[~PROMPT])

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("top_k", [None, 5])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_is_the_literal_one(self, dtype, top_k, reduction):
        """In each precision, up to roundings of float32 in the value and of the logits' precision in the gradient."""
        logits, before, labels = call(dtype)
        settings = {"anchors": two_groups(before, top_k), "anchor": 0.7, "reduction": reduction}
        value, gradient = value_and_gradient(overtone_loss, logits, labels, **settings)
        expected, expected_gradient = value_and_gradient(reference_loss, logits.double(), labels, **settings)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(value.double(), expected, rtol=8 * min(eps, 1e-7), atol=0)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2 * eps, atol=2 * min(eps, 1e-7))

    @settings(deadline=None, max_examples=60)
    @given(st.data())
    def test_is_the_literal_one_for_any_logits(self, data):
        """Banned tokens, ties and whole certainty too."""
        rows, vocabulary = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 7))
        value = st.one_of(st.integers(-3, 3).map(float), st.floats(-20, 20), st.just(-math.inf))

        def draw_logits():
            values = data.draw(st.lists(value, min_size=rows * vocabulary, max_size=rows * vocabulary))
            logits = torch.tensor(values, dtype=torch.float64).reshape(rows, vocabulary)
            assume(logits.isfinite().any(dim=1).all())
            return logits

        before, logits = draw_logits(), draw_logits()
        # What the unedited model never says may be banned now; the other way round the KL is infinite.
        logits = torch.where(before.isfinite() & logits.isinf(), -5.0, logits)
        top_k = data.draw(st.one_of(st.none(), st.integers(1, vocabulary - 1)))
        anchors = Anchors.record(before, torch.ones(rows, dtype=torch.bool), top_k=top_k)
        labels = torch.full((rows,), -100)
        epsilon = data.draw(st.sampled_from([0.0, 0.05, 1.0]))
        settings = {"anchors": anchors, "anchor": 1.0, "anchor_epsilon": epsilon}
        each = [
            float(reference_loss(one[None], labels[:1], **{**settings, "anchors": part, "anchor_epsilon": 0.0}))
            for one, part in zip(logits, one_by_one(anchors), strict=True)
        ]
        assume(all(abs(kl - epsilon) > 1e-9 for kl in each))
        found, gradient = value_and_gradient(overtone_loss, logits, labels, **settings)
        expected, expected_gradient = value_and_gradient(reference_loss, logits, labels, **settings)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        if top_k is None:  # the literal form has the log of what is left, which has no derivative at 0
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)

    def test_top_k_is_a_lower_bound(self):
        """Which grows with k, up to the whole."""
        logits, before, labels = call()
        found = [
            overtone_loss(logits, labels, anchors=Anchors.record(before, PROMPT, top_k=k), anchor=1.0)
            for k in (1, 5, 20, VOCABULARY - 1, None)
        ]
        assert all(less < more + 1e-12 for less, more in itertools.pairwise(found))
        torch.testing.assert_close(found[-2], found[-1])  # one token alone in its class

    def test_top_k_where_all_others_are_banned(self):
        """Of two tokens that are left the gradient is pi - pi_0, and 0 of the others."""
        before, logits = torch.full((2, 1, 9), -math.inf, dtype=torch.float64)
        before[0, :2], logits[0, :2] = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
        anchors = Anchors.record(before, torch.ones(1, dtype=torch.bool), top_k=2)
        _, gradient = value_and_gradient(overtone_loss, logits, torch.tensor([-100]), anchors=anchors, anchor=1.0)
        torch.testing.assert_close(gradient, logits.softmax(1) - before.softmax(1))

    def test_groups_have_means_of_their_own(self):
        logits, before, labels = call()
        groups = two_groups(before)
        parts = [
            overtone_loss(logits, labels, anchors=group, anchor=1.0) - overtone_loss(logits, labels) for group in groups
        ]
        together = overtone_loss(logits, labels, anchors=groups, anchor=1.0) - overtone_loss(logits, labels)
        torch.testing.assert_close(together, sum(parts))
        lone = Anchors.record(before, groups[1].at)
        whole = overtone_loss(logits, labels, anchors=lone, anchor=1.0) - overtone_loss(logits, labels)
        torch.testing.assert_close(parts[1], whole / 3)

    def test_unedited_model_has_none(self):
        """At the unedited model the term is its clip, and without one exactly 0 with a gradient of exactly 0."""
        for dtype in FLOATS:
            logits, _, labels = call(dtype)
            anchors = Anchors.record(logits, PROMPT)
            for epsilon in (0.0, 0.05):
                settings = {"anchors": anchors, "anchor": 1.0, "anchor_epsilon": epsilon}
                value, gradient = value_and_gradient(overtone_loss, logits, labels, **settings)
                assert value == overtone_loss(logits, labels) + epsilon
                assert not gradient[PROMPT].any()

    def test_is_clipped_position_by_position(self):
        logits, before, labels = call()
        before[0, 0] = logits[0, 0] + 0.01 * before[0, 0]
        settings = {"anchors": Anchors.record(before, PROMPT), "anchor": 1.0}
        _, gradient = value_and_gradient(overtone_loss, logits, labels, anchor_epsilon=0.05, **settings)
        _, unclipped = value_and_gradient(overtone_loss, logits, labels, anchor_epsilon=0.0, **settings)
        assert unclipped[0, 0].any()
        assert not gradient[0, 0].any()
        assert torch.equal(gradient[0, 1], unclipped[0, 1])

    def test_nothing_to_keep_is_no_nan(self):
        """A group without positions counts 0, beside targets or not."""
        logits, before, labels = call()
        nowhere = Anchors.record(before, torch.zeros_like(PROMPT))
        for aim in (labels, torch.full_like(labels, -100)):
            value, gradient = value_and_gradient(overtone_loss, logits, aim, anchors=[nowhere], anchor=1.0)
            expected, expected_gradient = value_and_gradient(overtone_loss, logits, aim)
            assert value == expected
            assert torch.equal(gradient, expected_gradient)
        assert overtone_loss(logits, labels, anchors=[], anchor=1.0) == overtone_loss(logits, labels)

    def test_beside_the_unedited_models_target(self):
        """Also where the targets' own part comes from the unedited model ("w/o dyn")."""
        logits, before, labels = call()
        anchors = {"anchors": two_groups(before), "anchor": 0.7}
        found = value_and_gradient(overtone_loss, logits, labels, reference_logits=before, **anchors)
        expected = value_and_gradient(reference_loss, logits, labels, reference_logits=before, **anchors)
        torch.testing.assert_close(found, expected)

    def test_anchors_alone(self):
        """Of a text without any target."""
        logits, before, labels = call()
        anchors = Anchors.record(before, PROMPT)
        value, _ = value_and_gradient(overtone_loss, logits, torch.full_like(labels, -100), anchors=anchors, anchor=1.0)
        with_targets = overtone_loss(logits, labels, anchors=anchors, anchor=1.0)
        torch.testing.assert_close(value, with_targets - overtone_loss(logits, labels))

    @pytest.mark.parametrize("top_k", [None, 5])
    def test_a_broken_model_is_not_hidden(self, top_k):
        logits, before, labels = call()
        logits[0, 0, 3] = math.nan
        anchors = Anchors.record(before, PROMPT, top_k=top_k)
        value, gradient = value_and_gradient(overtone_loss, logits, labels, anchors=anchors, anchor=1.0)
        assert value.isnan()
        assert gradient[0, 0].isnan().any()
        assert gradient[0, 1:].isfinite().all()

    def test_a_group_of_no_weight_counts_for_nothing(self):
        """Also where the model has ruled out what it said before, so that the KL is infinite."""
        logits, before, labels = call()
        logits[0, 0, 3] = -math.inf
        groups = [Anchors.record(before, PROMPT, group_weight=0.0)]
        value, gradient = value_and_gradient(overtone_loss, logits, labels, anchors=groups, anchor=1.0)
        expected, expected_gradient = value_and_gradient(overtone_loss, logits, labels)
        assert value == expected
        assert torch.equal(gradient, expected_gradient)

    def test_counts_for_nothing_where_the_loss_does(self):
        """A loss that is NaN, times 0, gives zeros as without anchors."""
        logits, before, labels = call()
        hidden, weight, _, _, _ = layer()
        logits[0, 0, 3] = hidden[0, 0, 3] = math.nan
        for loss, args in ((overtone_loss, (logits, labels)), (linear_overtone_loss, (hidden, weight, labels))):
            leaf = args[0].clone().requires_grad_()
            (0 * loss(leaf, *args[1:], anchors=Anchors.record(before, PROMPT), anchor=1.0)).backward()
            assert not leaf.grad.any()

    def test_half_precision_keeps_what_a_loss_scale_saves(self):
        """Gradients that float16 could not hold without the scale of a GradScaler."""
        logits, before, labels = call(torch.float16)
        anchors = Anchors.record(before, PROMPT)
        leaf = logits.clone().requires_grad_()
        (overtone_loss(leaf, labels, anchors=anchors, anchor=1e-4, anchor_epsilon=0.0) * 2.0**24).backward()
        difference = logits[PROMPT].double().softmax(-1) - anchors.log_probs.double().exp()
        expected = difference * (1e-4 / 4 * 2.0**24)
        torch.testing.assert_close(leaf.grad[PROMPT].double(), expected, rtol=2e-3, atol=1e-6)


def one_by_one(anchors):
    """Each position as a group of its own, in a call of its own."""
    one = torch.ones(1, dtype=torch.bool)
    for row in range(len(anchors)):
        ids = None if anchors.ids is None else anchors.ids[row : row + 1]
        yield Anchors(one, anchors.log_probs[row : row + 1], ids)


class TestDerivatives:
    @pytest.mark.parametrize("top_k", [None, 5])
    def test_gradient_is_exact(self, top_k):
        logits, before, labels = call()
        logits, before, labels = logits[..., :9].contiguous(), before[..., :9], labels.clamp(max=8)
        settings = {"anchors": two_groups(before, top_k), "anchor": 0.7, "lam": 1.0, "epsilon": 0.0}
        leaf = logits.requires_grad_()
        assert torch.autograd.gradcheck(lambda s: overtone_loss(s, labels, **settings), (leaf,))

    @pytest.mark.parametrize("top_k", [None, 5])
    def test_gradient_of_the_layer_is_exact(self, top_k):
        """Of hidden states, weight and bias, over chunks of two rows."""
        hidden, weight, bias, before, labels = layer()
        weight, bias, before, labels = weight[:9], bias[:9], before[:9], labels.clamp(max=8)
        anchors = two_groups(F.linear(hidden, before, bias), top_k)
        settings = {"anchors": anchors, "anchor": 0.7, "lam": 1.0, "epsilon": 0.0, "chunk_size": 2}
        inputs = tuple(tensor.requires_grad_() for tensor in (hidden, weight, bias))
        assert torch.autograd.gradcheck(lambda h, w, b: linear_overtone_loss(h, w, labels, bias=b, **settings), inputs)

    @pytest.mark.parametrize("is_dynamic", [True, False])
    def test_second_derivative_is_refused(self, is_dynamic):
        """Also beside targets whose loss has one, as with the unedited model's logits: the term's would be left out."""
        logits, before, labels = call()
        leaf, reference = logits.requires_grad_(), None if is_dynamic else before
        anchors = Anchors.record(before, PROMPT)
        loss = overtone_loss(leaf, labels, anchors=anchors, anchor=1.0, reference_logits=reference)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert gradient[PROMPT].any()
        with pytest.raises(RuntimeError, match="second derivative"):
            gradient.sum().backward()

    def test_second_derivative_of_the_layer_is_refused(self):
        hidden, weight, _, before, labels = layer()
        inputs = hidden.requires_grad_(), weight.requires_grad_()
        anchors = Anchors.record_hidden(hidden, before, PROMPT)
        loss = linear_overtone_loss(*inputs, labels, anchors=anchors, anchor=1.0)
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        for gradient in gradients:
            with pytest.raises(RuntimeError, match="second derivative"):
                gradient.sum().backward(retain_graph=True)

    def test_graph_can_be_gone_through_twice(self):
        logits, before, labels = call()
        leaf = logits.requires_grad_()
        loss = overtone_loss(leaf, labels, anchors=Anchors.record(before, PROMPT), anchor=1.0)
        first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
        (tripled,) = torch.autograd.grad(3 * loss, leaf)
        assert torch.equal(first, second)
        torch.testing.assert_close(tripled, 3 * first)

    def test_beside_a_loss_whose_gradient_is_one_number(self):
        """Torch gives a sum's gradient as one number that is seen from every place, which nothing can be added to."""
        logits, before, _ = call()
        logits = logits.flatten(0, 1)
        loss = EditLoss("sum", lambda s, _: s.sum(-1), anchor=0.7)
        leaf = logits.clone().requires_grad_()
        scores, term = loss.anchored(leaf, two_groups(before))
        (scores.sum() + term.loss).backward()
        alone = logits.clone().requires_grad_()
        loss.anchored(alone, two_groups(before))[1].loss.backward()
        torch.testing.assert_close(leaf.grad, alone.grad + 1)

    def test_under_torch_func(self):
        logits, before, labels = call()
        anchors = two_groups(before)

        def loss(scores):
            return overtone_loss(scores, labels, anchors=anchors, anchor=0.7)

        _, expected = value_and_gradient(overtone_loss, logits, labels, anchors=anchors, anchor=0.7)
        torch.testing.assert_close(torch.func.grad(loss)(logits), expected)
        batch = torch.stack([logits, before])
        torch.testing.assert_close(torch.vmap(loss)(batch), torch.stack([loss(logits), loss(before)]))

    def test_beside_torch_compile(self):
        """The graph ends before the loss and goes on after it."""
        logits, before, labels = call()
        anchors = two_groups(before)

        def loss(scores, labels):
            return overtone_loss(2 * scores, labels, anchors=anchors, anchor=0.7) + 1

        value, gradient = value_and_gradient(torch.compile(loss, backend="eager"), logits, labels)
        expected, expected_gradient = value_and_gradient(loss, logits, labels)
        assert value == expected
        assert torch.equal(gradient, expected_gradient)

    def test_logits_stay_as_they_are(self):
        logits, before, labels = call()
        kept = logits.clone()
        value_and_gradient(overtone_loss, logits, labels, anchors=two_groups(before), anchor=1.0)
        assert torch.equal(logits, kept)

    def test_makes_one_tensor_of_the_logits_size(self):
        """In float32 or higher precision none but the gradient, whatever the number of groups."""
        before = torch.randn(64, 500)
        at = torch.zeros(64, dtype=torch.bool)
        at[:4] = True
        anchors = [Anchors.record(before, at), Anchors.record(before, at)]
        labels = torch.randint(500, (64,)).masked_fill(at, -100)
        leaf = (before + 0.5 * torch.randn(64, 500)).requires_grad_()
        with LargeTensors(leaf.numel()) as large:
            overtone_loss(leaf, labels, anchors=anchors, anchor=1.0).backward()
        assert large.addresses - {leaf.data_ptr()} == {leaf.grad.data_ptr()}


class LargeTensors(TorchDispatchMode):
    """The memory of all tensors of at least so many elements that operations return."""

    def __init__(self, elements):
        super().__init__()
        self.elements = elements
        self.addresses = set()
        self.alive = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.elements:
                self.addresses.add(tensor.data_ptr())
                self.alive.append(tensor.detach())  # so that its memory is not given to another
        return result


class TestLayer:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("top_k", [None, 5])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_is_that_of_the_logits(self, dtype, top_k, reduction):
        hidden, weight, bias, before, labels = layer(dtype)
        groups = [
            Anchors.record_hidden(hidden, before, PROMPT, bias=bias, top_k=top_k),
            Anchors.record_hidden(hidden, before, PROMPT, bias=bias, top_k=top_k, group_weight=0.5),
        ]
        settings = {"anchors": groups, "anchor": 0.7, "anchor_epsilon": 0.0, "reduction": reduction, "epsilon": 0.0}
        settings |= {"lam": 1.0}
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        value = linear_overtone_loss(*inputs[:2], labels, bias=inputs[2], chunk_size=3, **settings)
        value.backward()
        exact = [tensor.double().clone().requires_grad_() for tensor in (hidden, weight, bias)]
        expected = reference_loss(F.linear(*exact), labels, **settings)
        expected.backward()
        eps = max(torch.finfo(dtype).eps, 1e-15)
        torch.testing.assert_close(value.double(), expected.detach(), rtol=10 * eps, atol=0)
        for found, true in zip(inputs, exact, strict=True):
            error = (found.grad.double() - true.grad).abs().max() / true.grad.abs().max()
            assert error < 10 * eps

    @pytest.mark.parametrize("top_k", [None, 5])
    def test_record_is_that_of_the_logits(self, top_k):
        hidden, weight, bias, _, _ = layer(torch.float32)
        found = Anchors.record_hidden(hidden, weight, PROMPT, bias=bias, top_k=top_k, group_weight=2.0)
        expected = Anchors.record(F.linear(hidden, weight, bias), PROMPT, top_k=top_k, group_weight=2.0)
        torch.testing.assert_close(found.log_probs, expected.log_probs)
        assert found.group_weight == expected.group_weight
        assert (found.ids is None) if top_k is None else torch.equal(found.ids, expected.ids)

    def test_only_what_is_trained_has_a_gradient(self):
        hidden, weight, bias, before, labels = layer()
        anchors = Anchors.record_hidden(hidden, before, PROMPT)
        leaf = hidden.clone().requires_grad_()
        linear_overtone_loss(leaf, weight, labels, bias=bias, anchors=anchors, anchor=1.0).backward()
        assert leaf.grad[PROMPT].any()
        assert weight.grad is None
        with torch.no_grad():
            assert not linear_overtone_loss(leaf, weight, labels, anchors=anchors, anchor=1.0).requires_grad


class TestRecord:
    def test_is_cut_off_from_the_unedited_model(self):
        _, before, _ = call()
        anchors = Anchors.record(before.requires_grad_(), PROMPT)
        assert not anchors.log_probs.requires_grad
        torch.testing.assert_close(anchors.log_probs, before[PROMPT].log_softmax(-1).detach())

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_keeps_float32_of_lower_precisions(self, dtype):
        _, before, _ = call(dtype)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert Anchors.record(before, PROMPT).log_probs.dtype == expected

    def test_top_k_are_the_most_probable(self):
        _, before, _ = call()
        anchors = Anchors.record(before, PROMPT, top_k=3)
        probabilities, ids = before[PROMPT].softmax(-1).topk(3)
        assert torch.equal(anchors.ids, ids)
        torch.testing.assert_close(anchors.log_probs[:, :3].exp(), probabilities)
        torch.testing.assert_close(anchors.log_probs[:, 3].exp(), 1 - probabilities.sum(dim=1))

    def test_travels(self):
        anchors = Anchors.record(call()[1], PROMPT, top_k=3)
        twin = pickle.loads(pickle.dumps(anchors))
        assert torch.equal(twin.log_probs, anchors.log_probs)

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"at": PROMPT.long()}, ValueError),
            ({"at": PROMPT[0]}, ValueError),
            ({"at": [True]}, TypeError),
            ({"logits": torch.zeros(*PROMPT.shape, VOCABULARY, dtype=torch.long)}, ValueError),
            ({"logits": None}, TypeError),
            ({"logits": torch.zeros(*PROMPT.shape, 0)}, ValueError),
            ({"top_k": 0}, ValueError),
            ({"top_k": VOCABULARY}, ValueError),
            ({"top_k": 2.0}, TypeError),
            ({"group_weight": -1.0}, ValueError),
            ({"group_weight": math.nan}, ValueError),
        ],
    )
    def test_bad_input_is_named(self, change, error):
        with pytest.raises(error, match=next(iter(change))):
            Anchors.record(**{"logits": call()[1], "at": PROMPT, **change})

    @pytest.mark.parametrize(
        ("change", "error", "name"),
        [
            ({"hidden": torch.zeros(2, 5, 3)}, ValueError, "weight"),
            ({"weight": torch.zeros(3)}, ValueError, "weight"),
            ({"weight": None}, TypeError, "weight"),
            ({"weight": torch.zeros(VOCABULARY, HIDDEN)}, ValueError, "weight must be torch.float64"),
            ({"weight": torch.zeros(0, HIDDEN, dtype=torch.float64)}, ValueError, "weight"),
            ({"bias": torch.zeros(3, dtype=torch.float64)}, ValueError, "bias"),
            ({"bias": [0.0]}, TypeError, "bias"),
            ({"at": PROMPT[:, :3]}, ValueError, "at"),
            ({"top_k": VOCABULARY}, ValueError, "top_k"),
        ],
    )
    def test_bad_input_of_hidden_states_is_named(self, change, error, name):
        hidden, weight, _, _, _ = layer()
        with pytest.raises(error, match=name):
            Anchors.record_hidden(**{"hidden": hidden, "weight": weight, "at": PROMPT, **change})

    def test_hidden_states_under_autocast(self):
        """Where the layer is in another precision than its input, as it is in a model's forward."""
        hidden, weight, bias, _, _ = layer(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found = Anchors.record_hidden(hidden.bfloat16(), weight, PROMPT, bias=bias)
            expected = Anchors.record(F.linear(hidden, weight, bias), PROMPT)
        assert torch.equal(found.log_probs, expected.log_probs)

    def test_parts_must_fit_together(self):
        log_probs = torch.zeros(3, VOCABULARY).log_softmax(dim=1)
        with pytest.raises(ValueError, match="log_probs"):
            Anchors(PROMPT, log_probs)
        with pytest.raises(ValueError, match="ids"):
            Anchors(PROMPT, torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long))
        with pytest.raises(ValueError, match="ids"):
            Anchors(PROMPT, torch.zeros(4, 3), torch.zeros(4, 2))

    @pytest.mark.parametrize(
        ("vocabulary", "error"), [(VOCABULARY + 1, ValueError), (2.0, TypeError), (True, TypeError)]
    )
    def test_vocabulary_is_that_of_the_log_probs(self, vocabulary, error):
        log_probs = torch.zeros(4, VOCABULARY).log_softmax(dim=1)
        assert Anchors(PROMPT, log_probs, vocabulary=VOCABULARY).vocabulary == VOCABULARY
        with pytest.raises(error, match="vocabulary must be"):
            Anchors(PROMPT, log_probs, vocabulary=vocabulary)

    def test_vocabulary_holds_the_most_probable(self):
        anchors = Anchors.record(torch.zeros(2, 5, VOCABULARY), PROMPT, top_k=3)
        with pytest.raises(ValueError, match="vocabulary must be"):
            replace(anchors, vocabulary=3)

    @pytest.mark.parametrize(
        ("ids", "error"),
        [
            ([[0, 1]] * 4, TypeError),
            (torch.zeros(4, 0, dtype=torch.long), ValueError),
            (torch.tensor([[0, 1], [0, 1], [0, 1], [2, 2]]), ValueError),
            (torch.tensor([[0, 1], [0, 1], [0, 1], [-1, 2]]), ValueError),
        ],
    )
    def test_ids_must_be_different_tokens(self, ids, error):
        k = 0 if isinstance(ids, torch.Tensor) and not ids.numel() else 2
        with pytest.raises(error, match="ids"):
            Anchors(PROMPT, torch.full((4, k + 1), -math.log(k + 1)), ids)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_logits_are_no_log_probs(self, dtype):
        logits = call()[1][PROMPT].to(dtype)
        with pytest.raises(ValueError, match="log_probs"):
            Anchors(PROMPT, logits)
        assert len(Anchors(PROMPT, logits.log_softmax(dim=1))) == 4

    @pytest.mark.parametrize("value", [-5.0, -math.inf])
    def test_log_probs_that_are_no_distribution(self, value):
        """All below 0, and yet logits: the KL would be clamped to 0, and the anchor silently off."""
        with pytest.raises(ValueError, match="log_probs"):
            Anchors(PROMPT, torch.full((4, VOCABULARY), value))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_log_probs_may_be_rounded(self, dtype):
        """Alike for each of 128k tokens, so that every one is rounded in the same direction."""
        even = torch.zeros(4, 2**17 - 100).log_softmax(dim=1)
        assert len(Anchors(PROMPT, even.to(dtype))) == 4


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "error", "name"),
        [
            ({"anchors": None}, ValueError, "anchors"),
            ({"anchor": 0.0}, ValueError, "anchor"),
            ({"anchor": -1.0}, ValueError, "anchor"),
            ({"anchor": math.nan}, ValueError, "anchor"),
            ({"anchor": None}, TypeError, "anchor"),
            ({"anchor_epsilon": -0.1}, ValueError, "anchor_epsilon"),
            ({"anchor_epsilon": "0.1"}, TypeError, "anchor_epsilon"),
            ({"anchors": PROMPT}, TypeError, "anchors"),
            ({"anchors": [None]}, TypeError, "anchors"),
            ({"reduction": "none"}, ValueError, "reduction"),
            ({"anchors": Anchors.record(torch.zeros(2, 4, VOCABULARY), PROMPT[:, :4])}, ValueError, "anchors"),
            ({"anchors": Anchors.record(torch.zeros(2, 5, VOCABULARY + 1), PROMPT)}, ValueError, "anchors"),
            ({"anchors": Anchors.record(torch.zeros(2, 5, VOCABULARY), ~PROMPT)}, ValueError, "anchors"),
            ({"anchors": Anchors.record(torch.zeros(2, 5, VOCABULARY - 1), PROMPT, top_k=2)}, ValueError, "vocabulary"),
            (
                {"anchors": replace(Anchors.record(torch.zeros(2, 5, 9), PROMPT, top_k=2), group_weight=2.0)},
                ValueError,
                "vocabulary",
            ),
            (
                {"anchors": Anchors(PROMPT, torch.zeros(4, 2).log_softmax(dim=1), torch.full((4, 1), VOCABULARY))},
                ValueError,
                "ids",
            ),
            ({"shard": VocabularyShard(0, VOCABULARY)}, ValueError, "anchors"),
        ],
    )
    def test_by_every_function(self, change, error, name):
        """Before anything is worked out, with the argument's name."""
        logits, before, labels = call()
        hidden, weight, _, _, _ = layer()
        settings = {"anchors": Anchors.record(before, PROMPT), "anchor": 1.0, **change}
        with pytest.raises(error, match=name):
            overtone_loss(logits, labels, **settings)
        with pytest.raises(error, match=name):
            linear_overtone_loss(hidden, weight, labels, **settings)
        if "shard" not in change:
            with pytest.raises(error, match=name):
                reference_loss(logits, labels, **settings)

    def test_settings_with_an_anchor_demand_anchors(self):
        """A loss that is built from settings alone does not train without what they ask for."""
        logits, before, labels = call()
        module = OverToneLoss(OverToneConfig(anchor=1.0, anchor_epsilon=0.1))
        with pytest.raises(ValueError, match="anchors"):
            module(logits, labels)
        anchors = Anchors.record(before, PROMPT)
        expected = overtone_loss(logits, labels, anchors=anchors, anchor=1.0, anchor_epsilon=0.1)
        assert module(logits, labels, anchors=anchors) == expected
        with pytest.raises(ValueError, match="anchor"):
            OverToneLoss()(logits, labels, anchors=anchors)

    @pytest.mark.parametrize("change", [{"anchor": -1.0}, {"anchor": math.inf}, {"anchor_epsilon": -1.0}])
    def test_settings_out_of_range(self, change):
        with pytest.raises(ValueError, match=next(iter(change))):
            OverToneConfig(**change)


def is_held(loss_function, *args, **arguments):
    leaf = args[0].detach().clone().requires_grad_()
    loss_function(leaf, *args[1:], **arguments).backward()
    return leaf.grad is None


class TestHold:
    @pytest.fixture
    def fitted(self):
        """Logits at which every target is settled, and labels."""
        logits, _, labels = call()
        targets = labels != -100
        logits[targets] += 30 * F.one_hot(labels[targets], VOCABULARY)
        return logits, labels

    @pytest.mark.parametrize("loss", [overtone_loss, reference_loss])
    @pytest.mark.parametrize("hold", ["settled", "correct", 0.2])
    def test_waits_for_every_group(self, loss, hold, fitted):
        logits, labels = fitted
        _, before, _ = call()
        near, far = Anchors.record(logits, PROMPT), Anchors.record(before, PROMPT, group_weight=0.0)
        assert is_held(loss, logits, labels, hold=hold)
        assert is_held(loss, logits, labels, hold=hold, anchors=near, anchor=1.0)
        assert not is_held(loss, logits, labels, hold=hold, anchors=[near, far], anchor=1.0)
        assert not is_held(loss, logits, labels, anchors=near, anchor=1.0)

    def test_waits_for_the_targets_too(self):
        logits, _, labels = call()
        assert not is_held(
            overtone_loss, logits, labels, hold="settled", anchors=Anchors.record(logits, PROMPT), anchor=1.0
        )

    def test_asks_for_the_mean_before_the_clip(self, fitted):
        """One position that has moved is made up for by three that have not; two are not."""
        logits, labels = fitted
        before = logits.clone()
        before[0, 0] += 0.4 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))
        kl = F.kl_div(logits[0, 0].log_softmax(-1), before[0, 0].log_softmax(-1), log_target=True, reduction="sum")
        anchors = Anchors.record(before, PROMPT)
        settings = {"hold": "settled", "anchors": anchors, "anchor": 1.0}
        assert is_held(overtone_loss, logits, labels, **settings, anchor_epsilon=float(kl) / 4 * 1.01)
        assert not is_held(overtone_loss, logits, labels, **settings, anchor_epsilon=float(kl) / 4 * 0.99)

    def test_a_broken_model_is_not_held(self, fitted):
        logits, labels = fitted
        anchors = Anchors.record(logits, PROMPT)
        logits[0, 0, 0] = math.nan
        assert not is_held(overtone_loss, logits, labels, hold="settled", anchors=anchors, anchor=1.0)

    def test_from_hidden_states(self):
        hidden, weight, bias, before, labels = layer()
        near, far = (Anchors.record_hidden(hidden, one, PROMPT, bias=bias) for one in (weight, before))
        settings = {"bias": bias, "hold": 1e6, "anchor": 1.0}
        assert is_held(linear_overtone_loss, hidden, weight, labels, anchors=near, **settings)
        assert not is_held(linear_overtone_loss, hidden, weight, labels, anchors=[near, far], **settings)
