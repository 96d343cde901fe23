"""The method on toy vocabularies, every number worked out by hand: read this to learn it.

The logits are logarithms of probabilities, so softmax gives the probabilities back. For p = (0.6, 0.3, 0.1):
    logits = (-0.5108, -1.2040, -2.3026), mean -1.3391, squared deviations 0.6861 + 0.0183 + 0.9282 = 1.6326,
    sigma = sqrt(1.6326 / 2) = 0.9035.
The filter keeps logits above max - n * sigma:
    n = 0.5: above -0.9626, so {0};      filtered = (1, 0, 0)
    n = 1:   above -1.4143, so {0, 1};   filtered = (2/3, 1/3, 0)
"""

import pytest
import torch

from overtone import overtone_loss
from overtone.functional import (
    build_target,
    clipped_kl,
    finite_std,
    ground_truth_check,
    mix_target,
    reference_loss,
    top_n_sigma_filter,
)

P = (0.6, 0.3, 0.1)
INF = float("inf")


def logits_of(probs):
    return torch.tensor([probs], dtype=torch.float64).log()


class TestFilter:
    def test_standard_deviation(self):
        """Sigma is the unbiased one of torch.std."""
        assert finite_std(logits_of(P)).item() == pytest.approx(0.9035, abs=1e-4)
        torch.testing.assert_close(finite_std(logits_of(P)), logits_of(P).std(dim=-1, keepdim=True))

    @pytest.mark.parametrize(
        ("n_sigma", "kept"), [(0.5, [0]), (1.0, [0, 1]), (1.9, [0, 1]), (2.0, [0, 1, 2]), (None, [0, 1, 2])]
    )
    def test_kept_set(self, n_sigma, kept):
        """A wider n keeps more: at n = 2 the border is -2.3178, just below the last logit."""
        filtered = top_n_sigma_filter(logits_of(P), n_sigma)
        assert filtered.isfinite().nonzero()[:, 1].tolist() == kept

    def test_border_is_dropped(self):
        """Logits (0, 1, 2) have sigma 1, so with n = 1 the border is 1 and the logit on it is dropped."""
        assert top_n_sigma_filter(torch.tensor([[0.0, 1.0, 2.0]]), 1.0).tolist() == [[-INF, -INF, 2.0]]

    def test_tied_maxima_without_spread_all_stay(self):
        """Sigma is 0, the border is the maximum itself, and the maximum is always kept."""
        assert top_n_sigma_filter(torch.zeros(1, 3), 0.5).tolist() == [[0.0, 0.0, 0.0]]

    def test_banned_tokens_take_no_part(self):
        """(0, 1, 2) with a banned fourth token is filtered as if that token did not exist."""
        assert top_n_sigma_filter(torch.tensor([[0.0, 1.0, 2.0, -INF]]), 1.5).tolist() == [[-INF, 1.0, 2.0, -INF]]


class TestMixtureAndCheck:
    def test_mixture(self):
        """0.1 * (0, 1, 0) + 0.9 * (2/3, 1/3, 0) = (0.6, 0.4, 0)."""
        filtered = torch.tensor([[2 / 3, 1 / 3, 0.0]], dtype=torch.float64)
        expected = torch.tensor([[0.6, 0.4, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(mix_target(filtered, torch.tensor([1]), 0.1), expected)

    @pytest.mark.parametrize(
        ("candidate", "label", "passes"),
        [((0.7, 0.3, 0.0), 0, True), ((0.6, 0.4, 0.0), 1, False), ((0.5, 0.5, 0.0), 1, False), ((1.0,), 0, True)],
    )
    def test_check_demands_a_strict_win(self, candidate, label, passes):
        """The true token must be strictly above every other one; alone, it wins."""
        assert ground_truth_check(torch.tensor([candidate]), torch.tensor([label])).item() is passes

    def test_failed_check_falls_back_to_the_true_token(self):
        """The mixture (0.6, 0.4, 0) leaves the outdated token on top, so the target is (0, 1, 0)."""
        assert build_target(logits_of(P), torch.tensor([1]), 1.0, 0.1).tolist() == [[0.0, 1.0, 0.0]]


# name: (probabilities, label, arguments, expected loss, expected gradient = prediction - target, or zeros if settled)
BRANCHES = {
    # target (0.7, 0.3, 0): 0.7 ln(0.7/0.6) + 0.3 ln(0.3/0.3)
    "mixed": (P, 0, {"n_sigma": 1.0}, 0.1079055, (-0.1, 0.0, 0.1)),
    # filtered (1, 0, 0), target (1, 0, 0): -ln 0.6
    "only the true token kept": (P, 0, {"n_sigma": 0.5}, 0.5108256, (-0.4, 0.3, 0.1)),
    # candidate (0.6, 0.4, 0) fails the check, target (0, 1, 0): -ln 0.3
    "outdated answer on top": (P, 1, {"n_sigma": 1.0}, 1.2039728, (0.6, -0.7, 0.1)),
    # candidate (0.5, 0.5, 0) ties, a tie is not a win: -ln 0.3
    "tie after mixing": (P, 1, {"n_sigma": 0.5, "lam": 0.5}, 1.2039728, (0.6, -0.7, 0.1)),
    # target (1/3, 2/3, 0): 1/3 ln(0.3333/0.6) + 2/3 ln(0.6667/0.3)
    "not on top, lifted by lam": (P, 1, {"n_sigma": 1.0, "lam": 0.5}, 0.3364096, (0.6 - 1 / 3, 0.3 - 2 / 3, 0.1)),
    # the true token was filtered out; target 0.5 (0, 0, 1) + 0.5 (2/3, 1/3, 0): 0.5 ln(1/1.8) + 0.5 ln 5
    "true token filtered out": (P, 2, {"n_sigma": 1.0, "lam": 0.5}, 0.5108256, (0.6 - 1 / 3, 0.3 - 1 / 6, -0.4)),
    # target (1, 0, 0), KL = -ln 0.96 = 0.0408 < 0.05: the constant epsilon, no gradient
    "settled": ((0.96, 0.03, 0.01), 0, {}, 0.05, (0.0, 0.0, 0.0)),
    # -ln 0.9 = 0.1054 > 0.05
    "nearly settled": ((0.9, 0.06, 0.04), 0, {}, 0.1053605, (-0.1, 0.06, 0.04)),
    # target (0.55, 0.45): 0.55 ln 1.1 + 0.45 ln 0.9
    "tied prediction, sigma 0": ((0.5, 0.5), 0, {"epsilon": 0.0}, 0.0050084, (-0.05, 0.05)),
    # lam 0 leaves the tie: target (1, 0): ln 2
    "tied prediction, lam 0": ((0.5, 0.5), 0, {"lam": 0.0}, 0.6931472, (-0.5, 0.5)),
    # lam 0, the true token on top: target (2/3, 1/3, 0): 2/3 ln(1/0.9) + 1/3 ln(1/0.9)
    "lam 0": (P, 0, {"n_sigma": 1.0, "lam": 0.0}, 0.1053605, (0.6 - 2 / 3, 0.3 - 1 / 3, 0.1)),
    # lam 1 is cross-entropy: -ln 0.1
    "lam 1": (P, 2, {"lam": 1.0}, 2.3025851, (0.6, 0.3, -0.9)),
    # a vocabulary of one token: nothing to learn, and epsilon 0 clips nothing
    "one token": ((1.0,), 0, {"epsilon": 0.0}, 0.0, (0.0,)),
    # the ablations of Table 3
    "w/o clip": ((0.96, 0.03, 0.01), 0, {"epsilon": 0.0}, 0.0408220, (-0.04, 0.03, 0.01)),
    # the mixture although it fails the check; target (0.6, 0.4, 0): 0.4 ln(0.4/0.3)
    "w/o chk": (P, 1, {"n_sigma": 1.0, "check": False}, 0.1150728, (0.0, -0.1, 0.1)),
    # target 0.1 (1, 0, 0) + 0.9 p = (0.64, 0.27, 0.09): 0.64 ln(0.64/0.6) + 0.36 ln 0.9
    "w/o flt": (P, 0, {"n_sigma": None, "epsilon": 0.0}, 0.0033749, (-0.04, 0.03, 0.01)),
    # unedited model p = (0.1, 0.3, 0.6), filtered (0, 1/3, 2/3), target 0.6 (1, 0, 0) + 0.4 (0, 1/3, 2/3):
    # 0.6 ln 1 + 0.1333 ln(0.1333/0.3) + 0.2667 ln(0.2667/0.1)
    "w/o dyn": (
        P,
        0,
        {"n_sigma": 1.0, "lam": 0.6, "reference_logits": logits_of((0.1, 0.3, 0.6))},
        0.1534304,
        (0.0, 0.3 - 0.4 / 3, 0.1 - 0.8 / 3),
    ),
}


class TestLoss:
    @pytest.mark.parametrize("loss", [reference_loss, overtone_loss], ids=["literal", "closed form"])
    @pytest.mark.parametrize("branch", BRANCHES)
    def test_value_and_gradient(self, loss, branch):
        """Each branch of Eq. 2 and Eq. 3 gives the number worked out beside it."""
        probs, label, arguments, value, gradient = BRANCHES[branch]
        logits = logits_of(probs).requires_grad_()
        result = loss(logits, torch.tensor([label]), **arguments)
        result.backward()
        assert result.item() == pytest.approx(value, abs=1e-6)
        assert logits.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)

    def test_clip_is_a_constant(self):
        """Below epsilon the value is epsilon; above, the KL."""
        target = torch.tensor([[1.0, 0.0]])
        logits = torch.tensor([[0.96, 0.04]]).log()
        assert clipped_kl(target, logits, 0.05).item() == pytest.approx(0.05)
        assert clipped_kl(target, logits, 0.04).item() == pytest.approx(0.0408220, abs=1e-6)
