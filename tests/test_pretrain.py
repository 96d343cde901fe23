"""Training on a world: what is cached, what an interruption costs, and how knowledge is measured."""

from __future__ import annotations

import dataclasses
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from overtone.lab import log_lines
from overtone.lab.data.recipe import Recipe
from overtone.lab.data.world import build_world
from overtone.lab.data.world_corpus import WorldCorpus
from overtone.lab.model import cache, pretrain, training
from overtone.lab.model.knowledge import Knowledge, measure_knowledge
from overtone.lab.model.pretrain import load_or_train
from overtone.lab.model.tokenizer import train_tokenizer
from overtone.lab.model.training import ARCHITECTURES

WORLD = build_world(0, "tiny")
RECIPE = Recipe(vocabulary=400, steps=10, blocks=2, block_length=32)


def train(cache, **settings):
    settings = {"corpus": WorldCorpus(WORLD), "recipe": RECIPE, "show_progress": False, **settings}
    return load_or_train(cache_dir=cache, **settings)


def same_weights(one, other):
    return all(torch.equal(weight, other.state_dict()[name]) for name, weight in one.state_dict().items())


def count_steps(monkeypatch):
    """Count the training steps."""
    losses, cross_entropy = [], training.F.cross_entropy

    def counted(*arguments):
        losses.append(cross_entropy(*arguments))
        return losses[-1]

    monkeypatch.setattr(training.F, "cross_entropy", counted)
    return losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("cache"))


class TestLoadOrTrain:
    def test_comes_ready_to_be_edited(self, trained):
        assert not trained.model.training
        assert {weight.dtype for weight in trained.model.parameters()} == {torch.float32}
        assert trained.tokenizer.pad_token_id != trained.tokenizer.eos_token_id
        assert trained.seconds > 0

    def test_is_cached(self, trained, monkeypatch):
        steps = count_steps(monkeypatch)
        again = train(trained.path.parent)
        assert (len(steps), again.seconds) == (0, 0.0)
        assert (again.path, again.knowledge) == (trained.path, trained.knowledge)
        assert same_weights(again.model, trained.model)

    def test_other_questions_are_asked_again_without_training(self, tmp_path, monkeypatch):
        corpus = WorldCorpus(WORLD)
        before = train(tmp_path, corpus=corpus)
        monkeypatch.setattr(corpus, "knowledge_probes", lambda: {"facts": WORLD.fact_probes()[:7], "others": []})
        monkeypatch.setattr(pretrain, "measure_knowledge", lambda *_: Knowledge({"facts": 0.5, "others": 0.25}, {}))
        steps = count_steps(monkeypatch)
        for _ in range(2):
            after = train(tmp_path, corpus=corpus)
            assert (after.path, after.knowledge.shares) == (before.path, {"facts": 0.5, "others": 0.25})
            monkeypatch.setattr(pretrain, "measure_knowledge", None)
        assert not steps

    def test_leaves_a_folder_that_transformers_loads_and_nothing_else(self, trained):
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(trained.path),
            AutoTokenizer.from_pretrained(trained.path),
        )
        assert same_weights(model, trained.model)
        assert tokenizer("The head").input_ids == trained.tokenizer("The head").input_ids
        assert {path.suffix for path in trained.path.parent.iterdir()} <= {"", ".lock"}

    @pytest.mark.parametrize(
        "other",
        [
            {"seed": 1},
            {"arch": "qwen2"},
            {"corpus": WorldCorpus(build_world(1, "tiny"))},
            {"recipe": dataclasses.replace(RECIPE, learning_rate=1e-4)},
        ],
        ids=lambda other: next(iter(other)),
    )
    def test_another_setting_is_another_entry(self, trained, other):
        result = train(trained.path.parent, **other)
        assert result.path != trained.path
        assert result.seconds > 0

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_trains_every_architecture(self, tmp_path, arch):
        result = train(tmp_path, arch=arch, recipe=dataclasses.replace(RECIPE, steps=1))
        assert result.model.config.model_type == arch
        assert not [module for module in result.model.modules() if getattr(module, "p", 0)], "dropout is not repeatable"

    def test_names_an_unknown_architecture(self, tmp_path):
        with pytest.raises(ValueError, match=r"arch must be one of llama, qwen2, mistral, gpt2, got 'bert'"):
            train(tmp_path / "cache", arch="bert")
        assert not (tmp_path / "cache").exists()

    def test_a_file_is_no_cache_folder(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(FileExistsError, match="file"):
            train(tmp_path / "file")

    def test_the_environment_names_the_cache_folder(self, trained, monkeypatch):
        monkeypatch.setenv(cache.CACHE_VARIABLE, str(trained.path.parent))
        assert train(None).path == trained.path

    def test_leaves_the_global_random_state_alone(self, tmp_path):
        before = torch.get_rng_state()
        train(tmp_path, recipe=dataclasses.replace(RECIPE, steps=1))
        assert torch.equal(torch.get_rng_state(), before)

    def test_lowers_the_loss(self, tmp_path, monkeypatch):
        losses = count_steps(monkeypatch)
        train(tmp_path, recipe=dataclasses.replace(RECIPE, steps=30))
        assert losses[-1] < losses[0] - 1


class TestInterruption:
    def test_a_log_gets_lines_on_standard_error(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(log_lines, "SECONDS_A_LINE", 0.0)
        train(tmp_path, show_progress=True)
        said = capsys.readouterr()
        assert [f"training llama: {step} of 10 steps" in said.err for step in (1, 5, 10)] == [True] * 3
        assert said.out == ""

    def test_an_interrupted_training_leaves_nothing_and_starts_again(self, trained, tmp_path, monkeypatch):
        """A minute's work is not worth a checkpoint; the weights are those of a training in one go."""

        def interrupt(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(training.torch.nn.utils, "clip_grad_norm_", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path)
        assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}
        assert same_weights(train(tmp_path).model, trained.model)

    def test_an_entry_appears_whole_or_not_at_all(self, trained, tmp_path, monkeypatch):
        def fail(*arguments):
            raise OSError("no space left")

        with monkeypatch.context() as patch:
            patch.setattr(type(trained.tokenizer), "save_pretrained", fail)
            with pytest.raises(OSError, match="no space left"):
                train(tmp_path)
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]
        assert same_weights(train(tmp_path).model, trained.model)

    @pytest.mark.parametrize("spoilt", ["model.safetensors", "knowledge.json"])
    def test_a_spoilt_entry_is_told_and_trained_anew(self, trained, tmp_path, spoilt, caplog):
        file = train(tmp_path).path / spoilt
        file.write_bytes(file.read_bytes()[:-10])
        with caplog.at_level(logging.WARNING, cache.__name__):
            again = train(tmp_path)
        assert again.seconds > 0
        assert same_weights(again.model, trained.model)
        assert "is broken and will be trained anew" in caplog.text
        assert json.loads((again.path / "knowledge.json").read_text()).keys() > again.knowledge.shares.keys()


class TestTokenizer:
    def test_a_target_has_the_same_tokens_apart_and_behind_its_prompt(self, trained):
        for probe in (*WORLD.fact_probes(), *WORLD.two_hop_probes()):
            prompt, target, both = trained.tokenizer(
                [probe.prompt, probe.target, probe.prompt + probe.target]
            ).input_ids
            assert prompt + target == both

    def test_gives_the_text_back(self, trained):
        for text in (*WORLD.training_texts(), "Ünknown wörds, too: 漢字"):
            assert trained.tokenizer.decode(trained.tokenizer(text).input_ids).strip() == text

    def test_names_share_tokens(self):
        world = build_world(0)
        tokenizer = train_tokenizer(world.training_texts(), Recipe().vocabulary)
        people = {subject for relation, subject in world.facts if relation == "birthplace"}
        names = [tokenizer(f" {name}").input_ids for name in people]
        assert min(map(len, names)) >= 2
        assert len({tuple(name) for name in names}) == len(names)
        assert len({name[0] for name in names}) < len(names) / 2


@dataclasses.dataclass
class FewFacts:
    """A corpus that tells some of the facts that it asks."""

    told: list
    kept_back: list
    knowledge_needed = {"facts": 0.99, "two hops": 0.95}  # noqa: RUF012

    def training_texts(self):
        return [f"{probe.prompt}{probe.target}." for probe in self.told] * 20

    def knowledge_probes(self):
        return {"facts": self.told + self.kept_back, "told": self.told}


NEEDED = FewFacts.knowledge_needed


class TestKnowledge:
    def test_is_what_greedy_generation_says_word_for_word(self, tmp_path):
        facts = WORLD.fact_probes()[::3]
        few = FewFacts(told=facts[:6], kept_back=facts[6:14])
        lab = train(tmp_path, corpus=few, recipe=dataclasses.replace(RECIPE, steps=60))

        def says(probe):
            prompt = lab.tokenizer(probe.prompt, return_tensors="pt")
            length = len(lab.tokenizer(f"{probe.target}.").input_ids)
            ids = lab.model.generate(**prompt, max_new_tokens=length, do_sample=False)[0]
            return lab.tokenizer.decode(ids).strip() == f"{probe.prompt}{probe.target}."

        shares = {title: sum(map(says, probes)) / len(probes) for title, probes in few.knowledge_probes().items()}
        assert 0 < shares["facts"] < shares["told"]
        assert lab.knowledge == measure_knowledge(lab.model, lab.tokenizer, few) == Knowledge(shares, NEEDED)

    def test_every_token_of_the_target_and_its_full_stop_counts_and_none_of_the_prompt(self, trained):
        probe = WORLD.fact_probes()[0]
        prompt = len(trained.tokenizer(probe.prompt).input_ids)
        length = len(trained.tokenizer(f"{probe.prompt}{probe.target}.").input_ids)

        def share_recalled(*, wrong):
            """Of a model that says each token right but the one at position ``wrong``."""

            class Saying(nn.Module):
                device = torch.device("cpu")
                head = nn.Identity()

                def get_output_embeddings(self):
                    return self.head

                def forward(self, input_ids, use_cache):
                    said = input_ids.roll(-1, dims=1)
                    said[:, wrong - 1] += 1
                    return SimpleNamespace(logits=self.head(F.one_hot(said, 1000)))

            return measure_knowledge(Saying(), trained.tokenizer, FewFacts([probe], [])).shares["facts"]

        shares = [share_recalled(wrong=position) for position in range(1, length)]
        assert shares == [1.0] * (prompt - 1) + [0.0] * (length - prompt)

    @pytest.mark.parametrize(("facts", "two_hops"), [(0.98, 1.0), (1.0, 0.94)])
    def test_too_little_is_refused(self, facts, two_hops):
        with pytest.raises(
            RuntimeError,
            match=rf"{facts:.1%} of the facts, {two_hops:.1%} of the two hops and needs 99% of the facts, 95% of the",
        ):
            Knowledge({"facts": facts, "two hops": two_hops}, NEEDED).require()

    def test_enough_is_enough(self):
        Knowledge({"facts": 0.99, "two hops": 0.95, "asked for interest": 0.0}, NEEDED).require()
