"""Edits made together in one batch: the weights, steps and endings of edits made one after the other."""

from __future__ import annotations

import dataclasses
import re

import mini_lab
import pytest
import torch
from torch.nn import functional as F

from overtone.lab.edit import methods
from overtone.lab.edit.anchored import AnchoredTexts
from overtone.lab.edit.batched_lora import BatchedLora
from overtone.lab.edit.cached_ft import CachedDownProjection
from overtone.lab.edit.fit import fit, target_loss
from overtone.lab.edit.many import fit_many, target_job, target_texts
from overtone.lab.edit.trial import try_method
from overtone.lab.edit.weights import open_down_projection, open_lora
from overtone.lab.model.fingerprint import fingerprint
from overtone.lab.model.positions import Capture, entering_at, layer_inputs, logits_at
from overtone.lab.model.targets import TargetBatch, encode_targets
from overtone.token_loss import parse

ARCHITECTURES = ["llama", "gemma3", "gpt2"]
METHODS = {"lora": (open_lora, BatchedLora), "ft-m": (open_down_projection, CachedDownProjection)}
EDITS = [
    (("the head of acme is", " bo cy"),),
    (("zed", " likes tea"),),
    (("ana runs", " zed ."), ("the spouse of dan is", " eve")),
    (("bo likes", " rain"),),
]
LOSSES = {"cross-entropy": F.cross_entropy, "held": parse("overtone:epsilon=1.5+hold=settled").build("lora").mean}


def weights_one_by_one(model, method, seed, batch, token_loss, **settings):
    opening = METHODS[method][0]
    with opening(model, seed=seed) if method == "lora" else opening(model) as parameters:
        trace = fit(parameters, target_loss(model, batch, token_loss), **settings)
        return torch.cat([parameter.detach().flatten() for parameter in parameters]), trace


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_edits_in_one_batch_are_the_edits_made_alone(arch, method, loss):
    model = mini_lab.random_model(arch).double()
    batches = [encode_targets(mini_lab.tokenizer(), list(pairs)) for pairs in EDITS]
    settings = {"steps": 20, "lr": 0.05}
    opened = METHODS[method][1](model)
    jobs = [target_job(batch, LOSSES[loss], opened.start(seed)) for seed, batch in enumerate(batches)]
    together = fit_many(model, opened, jobs, at_once=3, **settings)
    for seed, (batch, edit) in enumerate(zip(batches, together, strict=True)):
        expected, trace = weights_one_by_one(model, method, seed, batch, LOSSES[loss], **settings)
        assert (edit.steps, edit.ended) == (trace.steps, trace.ended)
        torch.testing.assert_close(edit.losses, trace.losses)
        torch.testing.assert_close(edit.weights, expected)
    if (loss, method) == ("held", "lora"):
        assert "held" in {edit.ended for edit in together}


@pytest.mark.parametrize("method", METHODS)
def test_a_snapshot_is_the_edit_that_stops_there(method):
    """One run to the end holds what runs with each threshold would give."""
    model = mini_lab.random_model()
    opened = METHODS[method][1](model)
    batch = encode_targets(mini_lab.tokenizer(), list(EDITS[0]))
    thresholds = {"3.0": 3.0, "1.0": 1.0, "1e-9": 1e-9}
    watch = lambda loss, *_: [name for name, below in thresholds.items() if loss <= below]  # noqa: E731
    whole = target_job(batch, F.cross_entropy, opened.start(0), watch=watch)
    (fitted,) = fit_many(model, opened, [whole], steps=15, lr=0.05)
    assert fitted.snapshots.keys() == {"3.0", "1.0"}
    for threshold, snapshot in fitted.snapshots.items():
        stopping = target_job(batch, parse(f"cross_entropy:hold={threshold}").build("lora").mean, opened.start(0))
        (stopped,) = fit_many(model, opened, [stopping], steps=15, lr=0.05)
        assert (stopped.steps, stopped.ended) == (snapshot.steps, "held")
        assert torch.equal(stopped.weights, snapshot.weights)


def plain_loop(model, parameters, pairs, rows, *, steps, lr):
    """Adam on the texts that take part in each step, with their mean cross-entropies averaged."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        means = []
        for row in rows(step):
            batch = encode_targets(mini_lab.tokenizer(), [pairs[row]])
            logits = model(input_ids=batch.input_ids).logits[:, :-1].flatten(0, 1)
            means.append(F.cross_entropy(logits, batch.labels[:, 1:].flatten()))
        torch.stack(means).mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


@pytest.mark.parametrize("method", METHODS)
def test_the_texts_of_an_edit_may_change_from_step_to_step(method):
    """Two edits in a pass, one with a single text in even steps and two in odd ones, the other the other way round."""
    model, settings = mini_lab.random_model("gemma3").double(), {"steps": 5, "lr": 0.05}
    texts = [(*EDITS[2], *EDITS[3]), (*EDITS[0], *EDITS[1])]
    plans = [lambda step: [2] if step % 2 == 0 else [1, 0], lambda step: [0] if step % 2 == 1 else range(2)]
    opened = METHODS[method][1](model)

    def job(pairs, rows, seed):
        batch = encode_targets(mini_lab.tokenizer(), list(pairs))

        def objective(logits, rows):
            labels = [batch.targets[row] for row in rows]
            parts = logits.split([len(own) for own in labels])
            return torch.stack([F.cross_entropy(part, own) for part, own in zip(parts, labels, strict=True)]).mean()

        return dataclasses.replace(
            target_job(batch, F.cross_entropy, opened.start(seed)), objective=objective, rows=rows
        )

    jobs = [job(pairs, rows, seed) for seed, (pairs, rows) in enumerate(zip(texts, plans, strict=True))]
    for seed, fitted in enumerate(fit_many(model, opened, jobs, **settings)):
        opening = METHODS[method][0]
        with opening(model, seed=seed) if method == "lora" else opening(model) as parameters:
            expected = plain_loop(model, parameters, texts[seed], plans[seed], **settings)
        torch.testing.assert_close(fitted.weights, expected)


@pytest.mark.parametrize("rows", [[], [1], [-1]])
def test_a_step_without_texts_of_the_job_is_refused(rows):
    model = mini_lab.random_model()
    opened = BatchedLora(model)
    whole = target_job(encode_targets(mini_lab.tokenizer(), list(EDITS[0])), F.cross_entropy, opened.start(0))
    with pytest.raises(ValueError, match=rf"rows must name some of the job's 1 texts.*{re.escape(str(rows))} after 0"):
        fit_many(model, opened, [dataclasses.replace(whole, rows=lambda _: rows)], steps=1, lr=0.1)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral", "gemma3", "gpt2"])
def test_passes_that_start_at_a_block_have_the_logits_of_whole_passes(arch):
    model = mini_lab.random_model(arch).double()
    texts = [text for pairs in EDITS for text in target_texts(encode_targets(mini_lab.tokenizer(), list(pairs)))]
    blocks = model.transformer.h if arch == "gpt2" else model.model.layers
    whole = logits_at(model, texts)
    hidden = layer_inputs(model, blocks[2], texts)
    with entering_at(blocks, 2, hidden):
        torch.testing.assert_close(logits_at(model, texts), whole)
    assert torch.equal(logits_at(model, texts), whole)


def test_captured_inputs_of_the_output_layer_give_the_logits_again():
    model = mini_lab.random_model("gemma3").double()
    texts = target_texts(encode_targets(mini_lab.tokenizer(), list(EDITS[2])))
    capture = Capture()
    logits = logits_at(model, texts, capture=capture)
    again = logits_at(model, texts[:1], further_hidden=torch.cat(capture.hidden))
    torch.testing.assert_close(again[-len(logits) :], logits)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_comes_back_bit_for_bit_also_from_a_loss_that_fails(method):
    model = mini_lab.random_model()
    before, hooks = fingerprint(model), number_of_hooks(model)
    opened = METHODS[method][1](model)
    jobs = [
        target_job(encode_targets(mini_lab.tokenizer(), list(pairs)), F.cross_entropy, opened.start(0))
        for pairs in EDITS
    ]
    fit_many(model, opened, jobs, steps=2, lr=0.05)
    broken = dataclasses.replace(jobs[0], objective=lambda logits, _: logits.sum() * float("nan"))
    with pytest.raises(RuntimeError, match="lower lr"):
        fit_many(model, opened, [jobs[1], broken], steps=2, lr=0.05)
    assert fingerprint(model) == before
    assert number_of_hooks(model) == hooks
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def number_of_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("at_once", 0)])
def test_less_than_one_is_refused(name, value):
    model = mini_lab.random_model()
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        fit_many(model, BatchedLora(model), [], **{"steps": 1, "lr": 0.1, name: value})


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_layers_that_do_not_see_a_pass_row_by_row_are_refused_in_it_alone(name):
    model = mini_lab.random_model()
    before, settings = fingerprint(model), methods.METHODS["lora"].changed({"target_modules": ("q_proj", name)})
    try_method(model, methods.METHODS["lora"], settings, at_once=1)
    with pytest.raises(ValueError, match=rf"{name} .* leave it out of --target-modules, or .* with --at-once 1"):
        try_method(model, methods.METHODS["lora"], settings, at_once=2)
    assert fingerprint(model) == before


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_with_its_own_settings_is_not_refused(arch, method):
    model = mini_lab.random_model(arch)
    try_method(model, methods.METHODS[method], methods.METHODS[method].settings, at_once=8)
    assert number_of_hooks(model) == 0


def test_half_precision_weights_are_trained_in_float32():
    """The steps of Adam would vanish in bfloat16's rounding."""
    model = mini_lab.random_model("gemma3").bfloat16()
    opened = CachedDownProjection(model)
    batch = encode_targets(mini_lab.tokenizer(), list(EDITS[0]))
    job = target_job(batch, F.cross_entropy, opened.start(0).float())
    (fitted,) = fit_many(model, opened, [job], steps=20, lr=1e-3)
    assert fitted.weights.dtype == torch.float32
    assert fitted.losses[-1] < fitted.losses[0]


def test_an_anchored_text_keeps_its_prompt_but_not_a_bos_and_not_what_predicts_the_target():
    """Texts of a BOS (1), a prompt and a target of one and of two tokens; the second is padded."""
    batch = TargetBatch(
        input_ids=torch.tensor([[1, 5, 6, 7, 8, 9], [1, 5, 4, 3, 0, 0]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        labels=torch.tensor([[-100, -100, -100, -100, 8, 9], [-100, -100, -100, 3, -100, -100]]),
    )
    texts = AnchoredTexts(batch, bos_token_id=1)
    assert [text.positions.tolist() for text in texts.texts] == [[1, 2, 3, 4], [1, 2]]
    assert texts.is_target.tolist() == [False, False, True, True, False, True]
    assert texts.labels.tolist() == [8, 9, 3]
    without_bos = AnchoredTexts(batch, bos_token_id=None)
    assert [text.positions.tolist() for text in without_bos.texts] == [[0, 1, 2, 3, 4], [0, 1, 2]]
