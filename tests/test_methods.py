"""FT-M and LoRA: which weights they move, when they stop, and that the model comes back bit for bit."""

from __future__ import annotations

import copy

import mini_lab
import pytest
import torch
from torch.nn import functional as F

from overtone import OverToneConfig, OverToneLoss
from overtone.lab.edit.fit import fit, target_loss
from overtone.lab.edit.methods import METHODS
from overtone.lab.edit.weights import open_down_projection, open_lora
from overtone.lab.model.fingerprint import fingerprint
from overtone.lab.model.targets import encode_targets, target_logits
from overtone.token_loss import parse

ARCHITECTURES = ["llama", "qwen2", "mistral", "gpt2"]


def edit_batch(pairs=(("the head of acme is", " bo cy"),)):
    return encode_targets(mini_lab.tokenizer(), list(pairs))


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        [(name, type(module), module.training) for name, module in model.named_modules()],
        {name: sorted(vars(module)) for name, module in model.named_modules()},
    )


def assert_restored(model, before):
    weights, wanted, modules, attributes = snapshot(model)
    assert weights.keys() == before[0].keys()
    assert all(torch.equal(weights[name], before[0][name]) for name in weights)
    assert (wanted, modules, attributes) == before[1:]
    assert all(parameter.grad is None for parameter in model.parameters())


class TestTargetLogits:
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_equal_the_rows_of_unbatched_full_passes(self, arch):
        """Right padding and the slice of positions change no logits beyond rounding."""
        model, tokenizer = mini_lab.random_model(arch), mini_lab.tokenizer()
        pairs = [("the head of acme is", " bo cy"), ("zed", " likes"), ("ana runs", " zed . <eos>")]
        logits, labels = target_logits(model, encode_targets(tokenizer, pairs))
        expected_logits, expected_labels = [], []
        for prompt, target in pairs:
            ids = tokenizer(prompt + target, return_tensors="pt").input_ids
            first = len(tokenizer(prompt).input_ids)
            expected_logits.append(model(input_ids=ids).logits[0, first - 1 : -1])
            expected_labels.append(ids[0, first:])
        torch.testing.assert_close(logits, torch.cat(expected_logits))
        assert torch.equal(labels, torch.cat(expected_labels))

    def test_refuses_a_target_that_does_not_continue_its_prompt(self):
        """Glued to the prompt, "s" changes its last token and adds none."""
        with pytest.raises(ValueError, match="'s' does not continue prompt 'the head'"):
            encode_targets(mini_lab.tokenizer(), [("the head", "s")])

    def test_refuses_no_pairs(self):
        with pytest.raises(ValueError, match="pairs is empty"):
            encode_targets(mini_lab.tokenizer(), [])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
class TestRestoring:
    def test_edits_and_restores(self, arch, method):
        """Inside the context the target becomes likely; after it nothing is left of the edit."""
        model, batch = mini_lab.random_model(arch), edit_batch()
        before = snapshot(model)
        with method.open(model, method.settings, 0) as parameters:
            trace = fit(parameters, target_loss(model, batch, F.cross_entropy), steps=30, lr=1e-2)
            logits, labels = target_logits(model, batch)
            assert F.cross_entropy(logits, labels) < 0.5 * trace.losses[0]
        assert_restored(model, before)

    def test_restores_after_an_exception(self, arch, method):
        """Ctrl-C in the middle of a step leaves no trace either."""
        model, batch = mini_lab.random_model(arch).train(), edit_batch()
        before = snapshot(model)

        def interrupted(step):
            if step == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), method.open(model, method.settings, 0) as parameters:
            fit(parameters, target_loss(model, batch, F.cross_entropy), steps=30, lr=1e-2, observe=interrupted)
        assert_restored(model, before)


class TestOpenDownProjection:
    def test_opens_one_weight_of_the_layer(self):
        model = mini_lab.random_model()
        with open_down_projection(model, layer=1) as parameters:
            assert [id(parameter) for parameter in parameters] == [id(model.model.layers[1].mlp.down_proj.weight)]
            assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
                "model.layers.1.mlp.down_proj.weight"
            ]

    def test_edits_two_thirds_up_by_default(self):
        model = mini_lab.random_model("gpt2")
        with open_down_projection(model) as (weight,):
            assert weight is model.transformer.h[2].mlp.c_proj.weight

    def test_names_a_layer_that_is_not_there(self):
        expected = "layer is 3, but LlamaForCausalLM has layers 0 to 2"
        with pytest.raises(ValueError, match=expected), open_down_projection(mini_lab.random_model(), layer=3):
            pass

    def test_names_a_model_without_the_weight(self):
        with pytest.raises(ValueError, match="Linear has no"), open_down_projection(torch.nn.Linear(2, 2)):
            pass


class TestOpenLora:
    def test_starts_at_the_unedited_model(self):
        """LoRA's second matrix starts at zero, so opening changes no logits."""
        model, batch = mini_lab.random_model(), edit_batch()
        clean = target_logits(model, batch)[0]
        with open_lora(model):
            assert torch.equal(target_logits(model, batch)[0], clean)

    def test_seed_decides_the_start_and_leaves_the_global_state(self):
        model = mini_lab.random_model()
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        starts = []
        for seed in (0, 0, 1):
            with open_lora(model, seed=seed) as parameters:
                starts.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        assert torch.equal(torch.rand(3), expected)
        assert torch.equal(starts[0], starts[1])
        assert not torch.equal(starts[0], starts[2])


class TestFit:
    def test_is_adam_on_the_mean_over_target_tokens(self):
        """Weights and losses equal those of a loop written with the model's own loss."""
        model, batch = mini_lab.random_model(), edit_batch()
        twin = copy.deepcopy(model).requires_grad_(False)
        weight = twin.model.layers[2].mlp.down_proj.weight.requires_grad_(True)
        optimizer = torch.optim.Adam([weight], lr=1e-2)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = twin(input_ids=batch.input_ids, labels=batch.labels).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
        with open_down_projection(model) as (edited,):
            trace = fit([edited], target_loss(model, batch, F.cross_entropy), steps=5, lr=1e-2)
            torch.testing.assert_close(edited, weight)
        assert trace.losses == pytest.approx(losses, rel=1e-5)
        assert (trace.steps, trace.ended) == (5, "steps")

    def test_early_stopping_ends_before_the_step_once_the_loss_is_low(self):
        model, batch = mini_lab.random_model(), edit_batch()
        with open_down_projection(model) as parameters:
            loss_of = target_loss(model, batch, parse("cross_entropy:hold=0.1").build("ft-m").mean)
            trace = fit(parameters, loss_of, steps=100, lr=1e-2)
        assert trace.ended == "held"
        assert trace.steps == len(trace.losses) - 1 < 100
        assert trace.losses[-1] <= 0.1 < min(trace.losses[:-1])

    @pytest.mark.parametrize("method", METHODS)
    def test_ends_when_the_edit_is_held(self, method):
        """The steps that are saved would have changed nothing: going on by hand leaves every weight as it is."""
        model, batch = mini_lab.random_model(), edit_batch()
        held = OverToneLoss(OverToneConfig(epsilon=0.3, hold_settled=True))
        with METHODS[method].open(model, METHODS[method].settings, 0) as parameters:
            trace = fit(parameters, target_loss(model, batch, held), steps=200, lr=1e-2)
            assert trace.ended == "held"
            assert trace.steps == len(trace.losses) - 1 < 200
            edited = [parameter.detach().clone() for parameter in parameters]
            optimizer = torch.optim.Adam(parameters, lr=1e-2)
            for _ in range(3):
                optimizer.zero_grad()
                held(*target_logits(model, batch)).backward()
                optimizer.step()
            assert all(map(torch.equal, parameters, edited))

    def test_observes_the_model_before_every_step(self):
        model, batch, seen = mini_lab.random_model(), edit_batch(), []
        with open_down_projection(model) as parameters:
            fit(parameters, target_loss(model, batch, F.cross_entropy), steps=3, lr=1e-2, observe=seen.append)
        assert seen == [0, 1, 2]

    def test_says_when_the_loss_is_not_finite(self):
        model, batch = mini_lab.random_model(), edit_batch()
        before = fingerprint(model)
        with (
            pytest.raises(RuntimeError, match=r"nan after 0 steps with lr=0\.01"),
            open_down_projection(model) as weights,
        ):
            fit(
                weights,
                target_loss(model, batch, lambda logits, labels: logits.sum() * torch.nan),
                steps=3,
                lr=1e-2,
            )
        assert fingerprint(model) == before
