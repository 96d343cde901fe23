"""What the sessions of EasyEdit's methods are made of, where EasyEdit is not needed."""

from __future__ import annotations

from types import SimpleNamespace

import mini_lab
import pytest
import torch

from overtone.easyedit.hparams import choose
from overtone.lab.edit.easyedit import process
from overtone.lab.edit.easyedit.algorithms import easyedit_cannot_minimise
from overtone.lab.edit.easyedit.losses import OVERTONE_METHODS, hparams_token_loss
from overtone.lab.edit.easyedit.rows import RowByRow
from overtone.lab.edit.easyedit.session import open_easyedit_session
from overtone.lab.edit.easyedit.statistics import second_moment
from overtone.lab.model.workplace import Workplace
from overtone.token_loss import parse

TEXTS = ["the head of acme is ana", "zed likes tea milk", "zed likes tea milk", "ana runs"]


class TestTokenLoss:
    """The lab's losses say in EasyEdit's words what they say in the lab."""

    def test_cross_entropy_is_the_methods_own(self):
        assert hparams_token_loss("FT", parse("cross_entropy")) is None

    @pytest.mark.parametrize("alg_name", OVERTONE_METHODS)
    @pytest.mark.parametrize(
        "spec",
        [
            *("cross_entropy:hold=0.3", "label_smoothing", "overtone", "overtone:hold=settled", "overtone_recommended"),
            *("overtone:n_sigma=none", "overtone:lam=0.5+hold=correct,0.1", "dft"),
        ],
    )
    def test_the_adapters_minimise_the_same_loss(self, alg_name, spec):
        """Also where they would hold by default and the spec does not."""
        method = OVERTONE_METHODS[alg_name]
        found, expected = choose(hparams_token_loss(alg_name, parse(spec)), method).loss, parse(spec).build(method)
        assert (found.description, found.epsilon, found.hold) == (
            expected.description,
            expected.epsilon,
            expected.hold,
        )

    @pytest.mark.parametrize("method", ["rome", "memit"])
    @pytest.mark.parametrize("spec", ["overtone", "label_smoothing", "cross_entropy:hold=0.1"])
    def test_rome_and_memit_have_a_loss_of_their_own(self, method, spec):
        """What they cannot minimise is refused before a run."""
        assert easyedit_cannot_minimise(method, parse("cross_entropy")) is None
        assert "use the loss cross_entropy" in easyedit_cannot_minimise(method, parse(spec))

    def test_no_target_from_before_the_edit(self):
        """EasyEdit's trainers have nowhere to keep it."""
        assert "logits from before" in easyedit_cannot_minimise("easyedit-ft", parse("overtone:dynamic=false"))


class TestSecondMoment:
    """The statistics of ROME and MEMIT."""

    @pytest.mark.parametrize(
        ("arch", "name"), [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.1.mlp.c_proj")]
    )
    def test_equals_the_mean_outer_product_of_the_inputs(self, arch, name):
        """Text by text, without padding, in plain sums."""
        model, tokenizer = mini_lab.random_model(arch), mini_lab.tokenizer()
        inputs = []
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].double()))
        with torch.no_grad():
            for text in TEXTS:
                model(**tokenizer(text, return_tensors="pt"))
        hook.remove()
        rows = torch.cat(inputs)
        found = second_moment(model, tokenizer, name, TEXTS, batch_size=3)
        # The model itself computes in float32, and otherwise for a padded batch.
        torch.testing.assert_close(found, torch.einsum("ti,tj->ij", rows, rows) / len(rows), rtol=1e-4, atol=1e-5)
        assert not model.get_submodule(name)._forward_pre_hooks

    def test_needs_texts(self):
        """A mean over nothing is refused."""
        with pytest.raises(ValueError, match="texts is empty"):
            second_moment(mini_lab.random_model(), mini_lab.tokenizer(), "model.layers.0.mlp.down_proj", [])


class BatchDecider(torch.nn.Module):
    """A model that adds the mean of a batch's token ids to every logit, as WISE decides by the mean of a batch."""

    device = torch.device("cpu")

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        mean = input_ids.float().mean()
        return SimpleNamespace(logits=input_ids[..., None].float() + mean * torch.tensor([1.0, 2.0]))

    def generate(self, input_ids, attention_mask, pad_token_id, max_new_tokens, **settings):
        said = int(input_ids.float().mean())
        return torch.cat([input_ids, torch.full((1, min(said, max_new_tokens)), said)], dim=1)


class TestRowByRow:
    """A layer that decides for a batch decides for each text."""

    def test_logits_are_those_of_each_text_alone(self):
        """On either side of a text, padding has no part in it."""
        model = BatchDecider()
        ids = torch.tensor([[5, 6, 7], [9, 0, 0], [0, 3, 4]])
        mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1]])
        logits = RowByRow(model)(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, is_token in enumerate(mask.bool()):
            alone = model(ids[row][is_token][None]).logits[0]
            torch.testing.assert_close(logits[row][is_token], alone)
        kept = RowByRow(model)(input_ids=ids, attention_mask=mask, logits_to_keep=2).logits
        torch.testing.assert_close(kept, logits[:, 1:])

    def test_agrees_with_a_model_that_does_not_decide_by_batch(self):
        """A transformer's logits and completions come out the same, and the rest of it is still there."""
        model, tokenizer = mini_lab.random_model(), mini_lab.tokenizer()
        tokenizer.padding_side = "left"
        batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
        rows = RowByRow(model)
        with torch.no_grad():
            found, expected = rows(**batch).logits, model(**batch).logits
        is_token = batch["attention_mask"].bool()
        torch.testing.assert_close(found[is_token], expected[is_token], rtol=1e-4, atol=1e-4)
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
        said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows.generate(**batch, **settings)]
        wanted = [tokenizer.decode(ids, skip_special_tokens=True) for ids in model.generate(**batch, **settings)]
        assert said == wanted
        assert rows.device == model.device

    def test_completions_are_padded_to_the_longest(self):
        """The prompt keeps its place, so that what follows it can be cut off."""
        said = RowByRow(BatchDecider()).generate(
            torch.tensor([[0, 2], [3, 3]]), torch.tensor([[0, 1], [1, 1]]), pad_token_id=8, max_new_tokens=5
        )
        assert said.tolist() == [[0, 2, 2, 2, 8], [3, 3, 3, 3, 3]]


class TestOpening:
    """What is refused before anything is imported or changed."""

    @pytest.fixture
    def workplace(self):
        return Workplace(mini_lab.random_model(), mini_lab.tokenizer())

    def test_without_easyedit(self, workplace, monkeypatch, tmp_path):
        """The message says what to set, and what it is set to."""
        monkeypatch.setattr(process, "find_spec", lambda name: None)
        monkeypatch.setenv("EASYEDIT_ROOT", str(tmp_path))
        with pytest.raises(ValueError, match=f"'easyedit-ft' needs EasyEdit: .*EASYEDIT_ROOT is {tmp_path}"):
            open_easyedit_session(workplace, "easyedit-ft", 0).__enter__()
        monkeypatch.delenv("EASYEDIT_ROOT")
        assert "EASYEDIT_ROOT is not set" in process.missing()

    def test_unknown_method(self, workplace):
        """With the methods that there are."""
        with pytest.raises(ValueError, match="unknown method 'FT': choose from easyedit-ft"):
            open_easyedit_session(workplace, "FT", 0).__enter__()

    @pytest.mark.parametrize("method", ["rome", "memit", "easyedit-wise"])
    def test_missing_texts(self, workplace, method):
        """Statistics and unrelated prompts come from somewhere."""
        with pytest.raises(ValueError, match=f"texts .* for method '{method}'"):
            open_easyedit_session(workplace, method, 0).__enter__()
