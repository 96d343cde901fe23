"""The closed form against the literal reference, against torch, and at every edge."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from gradients import value_and_gradient
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from overtone import compiled, overtone_loss, rows
from overtone.functional import finite_std, reference_loss
from overtone.settings import TargetSettings

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def draw_tokens(rows, vocabulary, seed=0, spread=3.0, dtype=torch.float64):
    """Logits (rows, vocabulary) and labels of which the first third is well predicted."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * spread
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    confident = range(0, rows, 3)
    logits[confident, labels[::3]] += 4 * spread
    return logits.to(dtype), labels


@st.composite
def problems(draw):
    """Logits with ties, banned tokens and ignored rows, and any setting of the loss."""
    rows, vocabulary = draw(st.integers(0, 6)), draw(st.integers(1, 9))
    palette = st.one_of(st.integers(-3, 3).map(float), st.floats(-20, 20), st.just(-math.inf))
    values = draw(st.lists(palette, min_size=rows * vocabulary, max_size=rows * vocabulary))
    logits = torch.tensor(values, dtype=torch.float64).reshape(rows, vocabulary)
    label = st.one_of(st.integers(0, vocabulary - 1), st.just(-100))
    labels = torch.tensor(draw(st.lists(label, min_size=rows, max_size=rows)), dtype=torch.long)
    assume(logits.isfinite().any(dim=1).all())
    counted = labels != -100
    assume(logits[counted, labels[counted]].isfinite().all())
    share = st.one_of(st.sampled_from([0.0, 1e-18, 0.1, 0.5, 1.0]), st.floats(0, 1))
    arguments = {
        "epsilon": draw(st.one_of(st.just(0.0), st.floats(0, 2))),
        "n_sigma": draw(st.one_of(st.none(), st.floats(0.01, 4))),
        "lam": draw(share),
        "check": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
    }
    return logits, labels, arguments


def margin_to_a_decision(logits, labels, arguments):
    """How near the row comes to a filter border, a tie in the check or the clip, where rounding may decide."""
    counted = labels != -100
    s, y = logits[counted], labels[counted].unsqueeze(1)
    margins = [math.inf]
    top = s.amax(dim=1, keepdim=True)
    kept = torch.ones_like(s, dtype=torch.bool)
    if arguments["n_sigma"] is not None:
        border = (s - (top - arguments["n_sigma"] * finite_std(s))).abs()
        margins += border[(s < top) & s.isfinite()].tolist()
        kept = (s > top - arguments["n_sigma"] * finite_std(s)) | (s == top)
    filtered = s.masked_fill(~kept, -math.inf).softmax(dim=1)
    lam = arguments["lam"]
    candidate = (1 - lam) * filtered + lam * F.one_hot(y.squeeze(1), s.shape[1])
    rival = candidate.scatter(1, y, -math.inf).amax(dim=1, keepdim=True)
    lead = (candidate.gather(1, y) - rival).abs()
    tied = s.gather(1, y) == s.scatter(1, y, -math.inf).amax(dim=1, keepdim=True)
    margins += lead[~tied].tolist()
    kl = reference_loss(logits, labels, **{**arguments, "epsilon": 0.0, "reduction": "none"})[counted]
    margins += (kl - arguments["epsilon"]).abs()[kl > 0].tolist() if arguments["epsilon"] > 0 else []
    return min(margins)


def assert_equal_to_the_reference(logits, labels, arguments):
    assume(margin_to_a_decision(logits, labels, arguments) > 1e-9)
    expected, expected_gradient = value_and_gradient(reference_loss, logits, labels, **arguments)
    value, gradient = value_and_gradient(overtone_loss, logits, labels, **arguments)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


class TestAgainstTheReference:
    @settings(max_examples=400, deadline=None)
    @given(problems())
    def test_equal_to_1e_12(self, problem):
        """Value and gradient equal the literal transcription's wherever rounding does not decide a branch."""
        assert_equal_to_the_reference(*problem)

    @pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (7, 507), (40, 20011), (3, 600_000)])
    def test_blocks(self, rows, vocabulary):
        """Odd sizes, and rows that fill one block, many blocks, or more than a block each."""
        logits, labels = draw_tokens(rows, vocabulary)
        expected, expected_gradient = value_and_gradient(reference_loss, logits, labels, reduction="none")
        value, gradient = value_and_gradient(overtone_loss, logits, labels, reduction="none")
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)

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

    def test_settled_tokens_are_let_go(self):
        """A settled token's gradient is exactly zero and its value exactly epsilon; the others are as without clip."""
        logits, labels = draw_tokens(60, 40)
        value, gradient = value_and_gradient(overtone_loss, logits, labels, epsilon=0.05, reduction="none")
        free_value, free_gradient = value_and_gradient(overtone_loss, logits, labels, epsilon=0, reduction="none")
        settled = free_value < 0.05
        assert 0 < settled.sum() < 60
        assert (value[settled] == 0.05).all()
        assert (gradient[settled] == 0).all()
        assert torch.equal(value[~settled], free_value[~settled])
        assert torch.equal(gradient[~settled], free_gradient[~settled])


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_gradient_is_as_good_as_cross_entropy(self, dtype):
        """The error against float64 is no larger than that of F.cross_entropy in the same precision, plus 1e-3."""
        logits, labels = draw_tokens(200, 503, dtype=dtype)
        exact = value_and_gradient(reference_loss, logits.double(), labels, reduction="sum")[1]
        gradient = value_and_gradient(overtone_loss, logits, labels, reduction="sum")[1]
        yardstick_exact = value_and_gradient(F.cross_entropy, logits.double(), labels, reduction="sum")[1]
        yardstick = value_and_gradient(F.cross_entropy, logits, labels, reduction="sum")[1]
        error = (gradient.double() - exact).abs().max()
        assert gradient.dtype == dtype
        assert error <= (yardstick.double() - yardstick_exact).abs().max() + 1e-3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("lam", [0.1, 1.0])
    def test_confident_tokens_keep_their_gradient(self, dtype, lam):
        """With p_y from 0.9 to 1 - 1e-6 the true token's gradient is within 1%; p - 1 in low precision loses it all."""
        leads = torch.linspace(math.log(9), math.log(1e6), 40)
        logits = torch.zeros(40, 1000).to(dtype)
        logits[:, 0] = (leads + math.log(999)).to(dtype)
        labels = torch.zeros(40, dtype=torch.long)
        arguments = {"epsilon": 0.0, "lam": lam, "reduction": "sum"}
        exact = value_and_gradient(reference_loss, logits.double(), labels, **arguments)[1][:, 0]
        gradient = value_and_gradient(overtone_loss, logits, labels, **arguments)[1][:, 0].double()
        assert ((gradient - exact).abs() <= 0.01 * exact.abs()).all()

    @pytest.mark.parametrize(("dtype", "lead"), [(torch.float32, 20.0), (torch.float32, 60.0), (torch.float64, 40.0)])
    def test_confident_tokens_keep_their_value(self, dtype, lead):
        """With lam 1 the loss of p_y near 1 is -log p_y to 1e-6 of itself, not a rounding of 1."""
        logits = torch.tensor([[lead, 0.0, 0.0]], dtype=dtype)
        value = overtone_loss(logits, torch.tensor([0]), epsilon=0.0, lam=1.0)
        assert value.item() == pytest.approx(math.log1p(2 * math.exp(-lead)), rel=1e-6, abs=0)

    def test_never_below_zero(self):
        """A KL whose terms cancel is rounded to 0 at the lowest."""
        logits = torch.randn(500, 40, generator=torch.Generator().manual_seed(0)) * 0.01
        values = overtone_loss(logits, logits.argmax(dim=1), epsilon=0.0, n_sigma=None, lam=0.0, reduction="none")
        assert (values >= 0).all()

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_dtypes(self, dtype):
        """The loss comes back in float32, for float64 in float64; the gradient in the logits' own precision."""
        logits, labels = draw_tokens(9, 11, dtype=dtype)
        value, gradient = value_and_gradient(overtone_loss, logits, labels)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gradient.dtype == dtype
        expected = reference_loss(logits.double(), labels)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)

    def test_large_offset_does_not_matter(self):
        """Logits far from zero give the same loss: the spread is measured around the mean."""
        logits, labels = draw_tokens(30, 200, dtype=torch.float32)
        shifted = logits + 1000
        torch.testing.assert_close(overtone_loss(shifted, labels), reference_loss(shifted.double(), labels).float())


class TestEdges:
    def test_a_logit_on_the_border_is_dropped(self):
        """At the top less n_sigma standard deviations, here 1 - 1 * 1 exactly, it is noise, as in Algorithm 1."""
        logits, labels = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0])
        arguments = {"n_sigma": 1.0, "epsilon": 0.0}
        value, gradient = value_and_gradient(overtone_loss, logits, labels, **arguments)
        expected, expected_gradient = value_and_gradient(reference_loss, logits, labels, **arguments)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, expected_gradient)
        assert gradient[0, 1] == pytest.approx(logits[0].softmax(dim=0)[1].item())

    def test_minus_infinity_has_no_part(self):
        """Padding the vocabulary with banned tokens changes neither the loss nor the other gradients."""
        logits, labels = draw_tokens(30, 20)
        padded = torch.cat([logits, torch.full((30, 5), -math.inf, dtype=logits.dtype)], dim=1)
        value, gradient = value_and_gradient(overtone_loss, logits, labels)
        padded_value, padded_gradient = value_and_gradient(overtone_loss, padded, labels)
        torch.testing.assert_close(value, padded_value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(padded_gradient[:, :20], gradient, rtol=0, atol=1e-12)
        assert (padded_gradient[:, 20:] == 0).all()

    def test_banned_label_is_infinitely_wrong(self):
        """A true token at -inf costs infinity, as in F.cross_entropy."""
        logits = torch.tensor([[0.0, -math.inf]])
        assert overtone_loss(logits, torch.tensor([1])).item() == math.inf == F.cross_entropy(logits, torch.tensor([1]))

    @pytest.mark.parametrize("loss", [overtone_loss, reference_loss])
    @pytest.mark.parametrize("lam", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("check", [True, False])
    @pytest.mark.parametrize("of_reference", [True, False])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_is_not_hidden(self, loss, lam, check, of_reference, value):
        """A NaN or infinite logit, the model's or the unedited one's, makes its row's loss NaN and no other's."""
        logits, labels = draw_tokens(3, 5)
        broken = logits.clone()
        broken[1, 2] = value
        arguments = {"reference_logits": broken} if of_reference else {}
        arguments.update(lam=lam, check=check, reduction="none")
        values = loss(logits if of_reference else broken, labels, **arguments)
        assert values.isnan().tolist() == [False, True, False]

    def test_nothing_wanted_of_nan_is_zero(self):
        """A loss that is multiplied by 0 asks for no gradient, of a NaN row either."""
        logits, labels = draw_tokens(3, 5)
        logits[1, 2] = math.nan
        (overtone_loss(logits.requires_grad_(), labels) * 0).backward()
        assert torch.equal(logits.grad, torch.zeros(3, 5, dtype=logits.dtype))

    def test_ignored_nan_is_hidden(self):
        """A NaN in a row that does not count reaches neither loss nor gradient."""
        logits, labels = draw_tokens(3, 5)
        logits[1, 2], labels[1] = math.nan, -100
        value, gradient = value_and_gradient(overtone_loss, logits, labels)
        assert value.isfinite()
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("ignore_index", [-100, 3, -1])
    def test_ignored_rows(self, ignore_index):
        """Ignored rows have loss and gradient 0 and leave the mean over the others."""
        logits, labels = draw_tokens(12, 9)
        labels[labels == ignore_index] = 4
        full = labels.clone()
        labels[::3] = ignore_index
        kept = labels != ignore_index
        value, gradient = value_and_gradient(overtone_loss, logits, labels, ignore_index=ignore_index)
        expected, expected_gradient = value_and_gradient(overtone_loss, logits[kept], full[kept])
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient[kept], expected_gradient)
        assert (gradient[~kept] == 0).all()
        each = overtone_loss(logits, labels, ignore_index=ignore_index, reduction="none")
        assert (each[~kept] == 0).all()

    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize("rows", [0, 4])
    def test_nothing_counted_is_zero_with_a_graph(self, rows, reduction):
        """No rows, or none that counts: 0 and not NaN, and backward works."""
        logits = torch.randn(rows, 5, requires_grad=True)
        loss = overtone_loss(logits, torch.full((rows,), -100), reduction=reduction)
        assert loss.shape == ((rows,) if reduction == "none" else ())
        assert (loss == 0).all()
        loss.sum().backward()
        assert torch.equal(logits.grad, torch.zeros(rows, 5))

    @pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 2)])
    def test_leading_dimensions(self, shape):
        """Logits (..., V) with labels (...), down to a single token, equal the flattened call."""
        logits = torch.randn(*shape, 7)
        labels = torch.randint(7, shape)
        flat = overtone_loss(logits.reshape(-1, 7), labels.reshape(-1), reduction="none")
        assert torch.equal(overtone_loss(logits, labels, reduction="none"), flat.reshape(shape))
        torch.testing.assert_close(overtone_loss(logits, labels), flat.mean())

    def test_non_contiguous_logits(self):
        """Transposed and strided logits give the value and gradient of their contiguous copy."""
        logits, labels = draw_tokens(12, 9)
        for view in (logits.t().contiguous().t(), torch.stack([logits, logits], dim=2)[..., 0]):
            assert not view.is_contiguous()
            leaf = view.requires_grad_()
            overtone_loss(leaf, labels).backward()
            assert torch.equal(leaf.grad, value_and_gradient(overtone_loss, logits, labels)[1])

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("ignored", [False, True])
    def test_caller_logits_are_untouched(self, dtype, ignored):
        """Neither pass writes to the logits or the labels."""
        logits, labels = draw_tokens(12, 9, dtype=dtype)
        if ignored:
            labels[1] = -100
        before = logits.clone(), labels.clone()
        overtone_loss(logits.requires_grad_(), labels).backward()
        assert torch.equal(logits, before[0])
        assert torch.equal(labels, before[1])

    def test_second_backward(self):
        """With retain_graph a second backward adds the same gradient again; without, torch's own error."""
        logits, labels = draw_tokens(12, 9)
        logits.requires_grad_()
        loss = overtone_loss(logits, labels)
        loss.backward(retain_graph=True)
        once = logits.grad.clone()
        loss.backward()
        assert torch.equal(logits.grad, once + once)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    def test_denormal_numbers_flushed(self):
        """A row without spread at 0 keeps all of its tokens, though what is just below 0 is 0 then."""
        logits, labels = torch.zeros(3, 7), torch.arange(3)
        expected = value_and_gradient(reference_loss, logits.double(), labels, epsilon=0)
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor does not flush denormal numbers")
        try:
            value, gradient = value_and_gradient(overtone_loss, logits, labels, epsilon=0)
        finally:
            torch.set_flush_denormal(False)
        torch.testing.assert_close((value.double(), gradient.double()), expected)

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

    def test_second_derivatives_raise(self):
        """The target's own derivative is left out by design, so there is no second one to ask for."""
        logits, labels = draw_tokens(3, 5)
        loss = overtone_loss(logits.requires_grad_(), labels)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()

    def test_changed_logits_are_noticed(self):
        """Logits modified in place between the passes raise torch's version error instead of a wrong gradient."""
        logits, labels = draw_tokens(12, 9)
        scores = logits.requires_grad_() * 1
        loss = overtone_loss(scores, labels)
        scores.detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_upstream_gradient(self):
        """Weights on single tokens reach each row."""
        logits, labels = draw_tokens(12, 9)
        weights = torch.arange(12, dtype=torch.float64)
        leaf = logits.clone().requires_grad_()
        (overtone_loss(leaf, labels, reduction="none") * weights).sum().backward()
        each = value_and_gradient(overtone_loss, logits, labels, reduction="sum")[1]
        torch.testing.assert_close(leaf.grad, weights.unsqueeze(1) * each)

    def test_no_grad(self):
        """Under no_grad and inference_mode the value is the same and has no graph."""
        logits, labels = draw_tokens(12, 9)
        expected = overtone_loss(logits, labels)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                loss = overtone_loss(logits, labels)
            assert not loss.requires_grad
            assert torch.equal(loss, expected)

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

    def test_operators_are_well_defined(self):
        """torch's own checks of schema and fake tensors pass."""
        logits, labels = draw_tokens(6, 5)
        kl, coefficients = torch.ops.overtone.token_kl(logits, labels, None, 0.5, 0.1, True, -100)
        for reference, target in ((None, (0.5, 0.1, True)), (logits + 1, (None, 0.1, False))):
            arguments = logits, labels, reference, *target, -100
            torch.library.opcheck(torch.ops.overtone.token_kl.default, arguments)
            arguments = torch.ones_like(kl), logits, labels, reference, coefficients, *target
            torch.library.opcheck(torch.ops.overtone.token_kl_backward.default, arguments)


class TestMemory:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ignored", [False, True])
    def test_no_target_tensor(self, dtype, ignored, monkeypatch):
        """Beside the logits and the gradient that is asked for, nothing is larger than a block of rows."""
        monkeypatch.setattr(compiled, "BLOCK_ELEMENTS", 2000)
        logits, labels = draw_tokens(100, 1000, dtype=dtype)
        if ignored:
            labels[::3] = -100
        settings = TargetSettings(n_sigma=0.5, lam=0.1, check=True)
        gradient = torch.empty_like(logits)
        with LargestResult() as largest:
            kl, coefficients = rows.row_kl(logits, labels, None, settings, -100)
            rows.row_gradient((kl > 0).float(), logits, labels, None, coefficients, settings, out=gradient)
        assert largest.new_elements <= 2000 < 100 * 1000 // 10


class TestSynchronisation:
    """On the meta device, where tensors hold no values, whatever would wait for one on a GPU raises."""

    @pytest.mark.parametrize("count", [6, 3000])
    @pytest.mark.parametrize(
        "settings",
        [{}, {"reduction": "none"}, {"reduction": "sum"}, {"n_sigma": None, "hold_correct": True}, {"check": False}],
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
            overtone_loss(logits, labels, hold_settled=True)


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
            ({"hold_settled": -1.0}, "hold_settled must be .* got -1.0"),
            ({"hold_settled": 0}, "hold_settled must be .* got 0"),
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
            ({"hold_settled": None}, "hold_settled must be .* of type NoneType"),
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

    def test_class_second_logits_are_refused_with_a_hint(self):
        """(B, V, L) logits, as CrossEntropyLoss takes them, are never guessed at."""
        with pytest.raises(ValueError, match=r"movedim\(1, -1\)"):
            overtone_loss(torch.zeros(2, 5, 3), torch.zeros(2, 3, dtype=torch.long))
