"""`overtone bench`, with a random model named on the command line and a corpus of four edits of a dozen words."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import mini_lab
import pytest
import torch
from launch import exit_code_of

import overtone
from overtone import cli
from overtone.config import RECOMMENDED
from overtone.lab.data.corpora import CORPORA
from overtone.lab.data.edit import Probe
from overtone.lab.edit import weights
from overtone.lab.edit.compared import COMPARED
from overtone.lab.edit.easyedit.algorithms import ALGORITHMS
from overtone.lab.edit.methods import METHODS
from overtone.lab.edit.sessions import WeightSession
from overtone.lab.model import sources
from overtone.lab.model.completion import complete
from overtone.lab.model.sources import NamedModel
from overtone.lab.model.training import ARCHITECTURES
from overtone.lab.model.workplace import NotRestoredError, Workplace
from overtone.lab.results.folder import EDITS, HEADER, ResultsFolder
from overtone.lab.run import plan, run
from overtone.lab.run.run import Run
from overtone.lab.run.settings import GRIDS, RunSettings, preset
from overtone.lab.run.sharding import Rank
from overtone.lab.run.task import SequenceTask
from overtone.token_loss import parse

ALONE = Rank(0, 1)


class MiniCorpus:
    """Four edits and as many words as the mini tokenizer knows."""

    knowledge_needed = MappingProxyType({"facts": 1.0})

    def training_texts(self):
        return ["zed likes tea milk .", "ana likes rain ."]

    def held_out_texts(self):
        return ["dan likes milk", "the head of zed is dan eve"]

    def knowledge_probes(self):
        return {"facts": [Probe("zed likes", " tea", "fact", "tea")]}

    def edits(self, count, *, seed):
        targets = [" bo cy", " dan", " eve ana", " cy"]
        if count > len(targets):
            raise ValueError(f"count must be at most {len(targets)}, got {count}")
        return [dataclasses.replace(mini_lab.edit(), target_new=target) for target in targets[:count]]


@pytest.fixture
def corpora(monkeypatch):
    """What was opened, by name, seed, path and size."""
    opened = []

    def open_corpus(name, *, seed, path=None, size=None):
        opened.append((name, seed, path, size))
        return MiniCorpus()

    monkeypatch.setattr(plan, "open_corpus", open_corpus)
    return opened


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    mini_lab.random_model().save_pretrained(path)
    mini_lab.tokenizer().save_pretrained(path)
    return str(path)


def settings(model, **changes):
    grid = {"methods": ("ft-m",), "losses": ("cross_entropy", "overtone:hold=settled"), "lengths": (1, 2), "edits": 3}
    return RunSettings(**{**grid, "fit_lengths": False, "model": model, "at_once": 1, **changes})


def begun(grid, out, shard=ALONE, command=("overtone", "bench")):
    """A run whose folder is open and in which nothing was made yet by this process."""
    started = Run(grid, out, shard=shard)
    started.begin(started.open_models(), command=command)
    return started


def finish(grid, out, shard=ALONE):
    """All there is left to do in a folder; how many edits that was, and the run."""
    started = begun(grid, out, shard)
    return sum(started.perform()), started


@pytest.fixture(scope="session")
def finished_folder(model, tmp_path_factory):
    """The grid of `settings`, made once; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "open_corpus", lambda *arguments, **others: MiniCorpus())
        finish(settings(model), folder)
    return folder


@pytest.fixture
def finished(finished_folder, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished_folder, tmp_path / "finished"))


def stored(out):
    """The results without what may differ between two runs of the same grid."""
    header, records = ResultsFolder(out).read_all()
    return {**header, "commands": None}, [dataclasses.replace(made, seconds=0.0) for made in records]


class TestGrid:
    def keys(self, found):
        return [(task.method, task.loss, task.length, task.sequence) for task in found.plan.tasks]

    def test_sequences_are_cut_from_the_list_and_a_remainder_is_left_out(self, model, corpora, tmp_path):
        found = Run(settings(model, losses=("overtone",)), tmp_path, shard=ALONE)
        assert self.keys(found) == [("ft-m", "overtone", 1, number) for number in range(3)] + [
            ("ft-m", "overtone", 2, 0)
        ]
        targets = [[edit.target_new for edit in task.edits] for task in found.plan.tasks]
        assert targets == [[" bo cy"], [" dan"], [" eve ana"], [" bo cy", " dan"]]

    def test_a_longer_sequence_takes_what_it_needs(self, model, corpora, tmp_path):
        found = Run(settings(model, losses=("overtone",), lengths=(4,)), tmp_path, shard=ALONE)
        assert self.keys(found) == [("ft-m", "overtone", 4, 0)]

    def test_losses_of_a_sequence_follow_each_other_and_stand_there_once(self, model, corpora, tmp_path):
        losses = ("overtone_held", "cross_entropy", "overtone:hold=settled")
        found = Run(settings(model, losses=losses, methods=("lora", "ft-m"), edits=1), tmp_path, shard=ALONE)
        assert self.keys(found)[:4] == [
            (method, loss, 1, 0) for method in ("lora", "ft-m") for loss in ("overtone:hold=settled", "cross_entropy")
        ]

    def test_traces_single_edits_of_the_first_method_and_seed(self, model, corpora, tmp_path):
        found = Run(settings(model, methods=("lora", "ft-m"), seeds=(1, 0)), tmp_path, shard=ALONE)
        traced = {(task.method, task.seed, task.length) for task in found.plan.tasks if task.is_traced}
        assert traced == {("lora", 1, 1)}

    def test_passes_over_a_sequence_leave_single_edits_as_they_are(self, model, corpora, tmp_path):
        found = Run(settings(model, changes={"breadth_first": 2}), tmp_path, shard=ALONE)
        assert {(task.length, task.settings.breadth_first) for task in found.plan.tasks} == {(1, None), (2, 2)}

    def test_no_step_has_more_edits_than_the_sequence(self, model, corpora, tmp_path):
        found = Run(settings(model, changes={"breadth_first": 99}), tmp_path, shard=ALONE)
        assert {(task.length, task.settings.breadth_first) for task in found.plan.tasks} == {(1, None), (2, 2)}

    def test_a_length_that_does_not_fit_is_refused(self, model, corpora, tmp_path):
        with pytest.raises(ValueError, match="short, sequences of 5: count must be at most 4, got 5"):
            Run(settings(model, lengths=(1, 5)), tmp_path, shard=ALONE)

    def test_a_preset_leaves_it_out_and_says_so(self, model, corpora, tmp_path):
        found = Run(settings(model, lengths=(1, 5), fit_lengths=True), tmp_path, shard=ALONE)
        assert {task.length for task in found.plan.tasks} == {1}
        assert found.plan.left_out == ["short has no sequence of 5 with seed 0: count must be at most 4, got 5"]

    def test_more_edits_than_there_are_is_a_mistake_in_a_preset_too(self, model, corpora, tmp_path):
        with pytest.raises(ValueError, match="count must be at most 4, got 5"):
            Run(settings(model, lengths=(1,), edits=5, fit_lengths=True), tmp_path, shard=ALONE)

    def test_files_reach_their_corpora(self, model, corpora, tmp_path):
        (tmp_path / "zsre.json").write_text("[]")
        grid = settings(model, data=("short", "zsre"), paths={"zsre": str(tmp_path / "zsre.json")}, size=7)
        Run(grid, tmp_path, shard=ALONE)
        assert corpora == [("short", 0, None, None), ("zsre", 0, tmp_path / "zsre.json", 7)]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"data": ()}, "data is empty"),
            ({"data": ("tiny",)}, "unknown corpus 'tiny': choose from short"),
            ({"lengths": (0,)}, "lengths must be at least 1, got 0"),
            ({"edits": 0}, "edits must be at least 1, got 0"),
            ({"held_out_texts": -1}, "held_out_texts must be at least 0, got -1"),
            ({"losses": ("overtone:lam=2",)}, "lam must be"),
            ({"methods": ("rosa",)}, "unknown method 'rosa'"),
            (
                {"changes": {"breadth_first": 0}},
                "breadth_first must be a whole number of edits a step, at least 1, got 0",
            ),
            ({"changes": {"breadth_first": 2.5}}, "breadth_first must be a whole number .* got 2.5"),
            ({"changes": {"breadth_first": 5}, "lengths": (1,)}, "breadth_first is 5, but lengths has single edits"),
        ],
    )
    def test_names_what_is_wrong(self, model, corpora, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            Run(settings(model, **changes), tmp_path / "out", shard=ALONE)
        assert not (tmp_path / "out").exists()

    def test_refuses_workers_under_a_launcher(self, model, corpora, tmp_path):
        with pytest.raises(ValueError, match="workers must be 1 under torchrun"):
            Run(settings(model), tmp_path, workers=2, shard=Rank(0, 2))


class TestPresets:
    def test_paper_small_has_every_loss(self):
        grid = GRIDS["paper-small"]
        assert set(COMPARED) < set(grid.losses)
        assert [parse(spec).name for spec in grid.losses] == list(grid.losses)
        assert len(grid.seeds) == 3

    def test_files_join_the_data(self):
        grid = preset("paper-small", paths={"zsre": "a.json"}, edits=5)
        assert grid.data == ("short", "long", "soft", "zsre")
        assert (grid.edits, grid.fit_lengths) == (5, True)

    def test_lengths_that_are_asked_for_must_fit(self):
        assert not preset("quick", paths={}, lengths=(1, 2)).fit_lengths

    def test_refuses_an_unknown_name(self):
        with pytest.raises(ValueError, match="unknown preset 'slow': choose from demo, quick, paper-small"):
            preset("slow", paths={})


class TestRun:
    def test_results_are_the_grid(self, model, corpora, tmp_path):
        made, found = finish(settings(model), tmp_path)
        header, written = found.results.read_all()
        assert made == found.plan.edits == len(written) == 2 * (3 + 2)
        assert {record.key for record in written} == {task.key for task in found.plan.tasks}
        assert {record.error for record in written} == {None}
        (described,) = header["models"]
        assert (described["data"], described["seed"]) == ("short", 0)
        assert described["fingerprint"] == Workplace.load(model).fingerprint
        assert described["perplexity"] > 1
        assert described["knowledge"].keys() == {"facts"}
        assert "parameters" in described["title"]
        assert header["commands"] == [["overtone", "bench"]]

    def test_a_perplexity_that_is_not_finite_is_none(self, model, corpora, tmp_path, monkeypatch):
        """A results file that holds infinity is refused where it is read."""
        monkeypatch.setattr(run, "perplexity", lambda *_: math.inf)
        (described,) = Run(settings(model), tmp_path, shard=ALONE).open_models()
        assert described["perplexity"] is None

    def test_a_named_model_is_asked_a_sample_of_what_it_may_know(self, model, monkeypatch):
        probes = [Probe(f"zed likes {number}", " tea", "fact", "tea") for number in range(300)]
        corpus = SimpleNamespace(knowledge_probes=lambda: {"facts": probes, "others": probes[:2]})
        asked = []

        def answered(model, tokenizer, own, **options):
            asked.append([probe.prompt for probe in own])
            return [probe in probes[:150] for probe in own]

        monkeypatch.setattr(sources, "answered", answered)
        source = NamedModel(str(model), show_progress=False)
        first, again = source.knowledge(corpus, 0), source.knowledge(corpus, 0)
        assert first == again
        assert asked[0] == asked[1]
        assert [len(own) for own in asked] == [52, 52]
        assert first["others"] == 1.0
        assert 0.3 < first["facts (50 of 300 asked)"] < 0.7

    def test_a_failed_edit_does_not_end_the_run(self, model, corpora, tmp_path, monkeypatch):
        apply = WeightSession.apply

        def failing(session, edit, *arguments):
            if edit.target_new == " dan":
                raise TypeError("of this edit")
            return apply(session, edit, *arguments)

        finish(settings(model, lengths=(1,)), tmp_path / "sound")
        monkeypatch.setattr(WeightSession, "apply", failing)
        finish(settings(model, lengths=(1,)), tmp_path / "failing")
        sound, failed = (stored(tmp_path / name)[1] for name in ("sound", "failing"))
        for one, other in zip(sound, failed, strict=True):
            if one.index == 1:
                assert other.error == "TypeError: of this edit"
            else:
                assert one == other

    def test_a_model_that_is_not_restored_ends_it(self, model, corpora, tmp_path, monkeypatch):
        monkeypatch.setattr(Workplace, "require_restored", lambda *arguments: (_ for _ in ()).throw(NotRestoredError()))
        with pytest.raises(NotRestoredError):
            finish(settings(model), tmp_path)

    def test_a_method_that_does_not_know_the_model_is_refused_at_once(self, model, corpora, tmp_path, monkeypatch):
        monkeypatch.setattr(weights, "_down_projection", lambda *_: (_ for _ in ()).throw(ValueError("no mlp")))
        with pytest.raises(ValueError, match="no mlp"):
            Run(settings(model), tmp_path, shard=ALONE).open_models()


class TestResume:
    def test_what_is_finished_is_not_made_again(self, model, corpora, finished):
        """A finished run has nothing left; a larger one makes what is new, a smaller one loses nothing."""
        assert finish(settings(model), finished)[0] == 0
        more = ("overtone", "cross_entropy", "overtone_held")
        assert finish(settings(model, losses=more), finished)[0] == 3 + 2
        assert finish(settings(model, losses=("overtone_held",), lengths=(2,)), finished)[0] == 0
        assert len(stored(finished)[1]) == 2 * (3 + 2) + 5

    def test_refuses_another_model_and_keeps_the_results(self, corpora, finished, tmp_path):
        before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
        mini_lab.random_model(seed=1).save_pretrained(tmp_path / "other")
        mini_lab.tokenizer().save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="another fingerprint of short with seed 0: choose another folder"):
            finish(settings(str(tmp_path / "other")), finished)
        assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before

    def test_refuses_other_versions_and_recommended_settings(self, model, corpora, tmp_path, monkeypatch):
        """One name would stand for two losses."""
        begun(settings(model), tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(run, "version", lambda name: "0")
            patch.setattr(run, "__version__", "0")
            with pytest.raises(ValueError, match="another version of overtone, version of peft, "):
                begun(settings(model), tmp_path)
        monkeypatch.setitem(RECOMMENDED, "ft-m", {})
        with pytest.raises(ValueError, match="another recommended setting of ft-m: choose another folder"):
            begun(settings(model), tmp_path)

    def test_asks_no_installation_for_its_own_version(self, model, corpora, tmp_path, monkeypatch):
        """A checkout that was never installed has a version, too."""
        installed = importlib.metadata.version
        monkeypatch.setattr(run, "version", lambda name: None if name == "overtone" else installed(name))
        begun(settings(model), tmp_path)
        assert json.loads((tmp_path / HEADER).read_text())["versions"]["overtone"] == overtone.__version__

    def test_refuses_other_edits(self, model, corpora, finished, monkeypatch):
        edits = MiniCorpus.edits
        monkeypatch.setattr(MiniCorpus, "edits", lambda self, count, *, seed: edits(self, 4, seed=seed)[::-1][:count])
        with pytest.raises(ValueError, match="holds other edits of short"):
            begun(settings(model), finished)


class TestSharedPasses:
    """What a named model's edits get unless they are asked for one by one."""

    def test_measures_what_needs_no_generation(self, model, corpora, tmp_path):
        finish(settings(model, at_once=None, lengths=(1,)), tmp_path)
        header, records = stored(tmp_path)
        assert all(record.scores.exact_match == {} and record.perplexity is None for record in records)
        assert all(record.scores.begins.keys() == {"rel", "gen", "por", "loc"} for record in records)
        assert header["models"][0]["perplexity"] is None

    def test_a_rate_is_a_grid_of_its_own_with_its_settings_in_every_row(self, model, corpora, tmp_path):
        changes = {"steps": 3, "layer": 1, "rank": 2, "alpha": 4, "target_modules": ("v_proj",)}
        grid = settings(model, at_once=None, lengths=(1,), methods=("lora", "ft-m"), lrs=(1e-4, 1e-2), changes=changes)
        finish(grid, tmp_path)
        rows = {json.dumps(record.settings) for record in stored(tmp_path)[1]}
        lora = {"steps": 3, "rank": 2, "alpha": 4, "target_modules": ["v_proj"]}
        assert rows == {
            json.dumps({"lr": lr, **own}) for lr in (1e-4, 1e-2) for own in (lora, {"steps": 3, "layer": 1})
        }

    def test_the_settings_are_those_of_easyedits_files_for_large_models(self, model, corpora, tmp_path):
        found = Run(settings(model, methods=("lora", "ft-m")), tmp_path, shard=ALONE)
        assert {task.method: task.settings.lr for task in found.plan.tasks} == {"lora": 5e-3, "ft-m": 5e-4}

    def test_a_module_that_cannot_be_adapted_in_them_is_refused_before_the_first_edit(self, model, corpora, tmp_path):
        grid = settings(model, at_once=None, methods=("lora",), changes={"target_modules": ("lm_head",)})
        with pytest.raises(ValueError, match=r"target_modules cannot have lm_head .* --at-once 1"):
            Run(grid, tmp_path, shard=ALONE).open_models()
        Run(dataclasses.replace(grid, at_once=1), tmp_path, shard=ALONE).open_models()

    def test_ranks_do_not_part_what_shares_a_pass(self, model, corpora, tmp_path):
        grid = settings(model, at_once=2, lengths=(1,), edits=4)
        shares = [begun(grid, tmp_path, Rank(rank, 2)).left() for rank in (0, 1)]
        assert [len(share) for share in shares] == [4, 4]
        for share in shares:
            for loss in {task.loss for task in share}:
                assert {task.sequence for task in share if task.loss == loss} in ({0, 1}, {2, 3}, {0, 1, 2, 3})

    def test_what_is_finished_is_not_made_again(self, model, corpora, tmp_path):
        grid = settings(model, at_once=2, lengths=(1,), edits=4)
        started = begun(grid, tmp_path)
        made = next(started.perform())
        assert 0 < made < started.plan.edits
        assert finish(grid, tmp_path)[0] == started.plan.edits - made

    def test_what_edited_models_say_is_asked_for_and_never_mixed_with_what_was_not(self, model, corpora, tmp_path):
        grid = settings(model, at_once=2, lengths=(1,), edits=2)
        finish(dataclasses.replace(grid, generate=True), tmp_path)
        assert all({"rel", "gen"} <= record.scores.said.keys() for record in stored(tmp_path)[1])
        with pytest.raises(ValueError, match="another choice of --generate: choose another folder"):
            begun(grid, tmp_path)
        with pytest.raises(ValueError, match="generate is for edits that share a pass, but at_once is 1"):
            Run(settings(model, generate=True), tmp_path, shard=ALONE)

    def test_only_facts_that_the_model_knows(self, model, corpora, tmp_path, monkeypatch):
        monkeypatch.setattr(NamedModel, "knows", lambda _, edits: [edit.target_new != " dan" for edit in edits])
        found = Run(settings(model, lengths=(1,), only_known=True), tmp_path, shard=ALONE)
        assert [task.edits[0].target_new for task in found.plan.tasks[::2]] == [" bo cy", " eve ana", " cy"]
        with pytest.raises(
            ValueError, match="count must be from 1 to 3, the edits of facts that the model knows, got 4"
        ):
            Run(settings(model, lengths=(1,), edits=4, only_known=True), tmp_path, shard=ALONE)

    def test_knows_is_what_generation_begins_with_as_normalised_text(self, model):
        source = NamedModel(model)
        workplace = source.open(MiniCorpus(), 0).workplace
        (said,) = complete(workplace.model, workplace.tokenizer, [mini_lab.edit().prompt], 2)
        known = dataclasses.replace(mini_lab.edit(), target_old=f" The {said.upper()}")
        unknown = dataclasses.replace(mini_lab.edit(), target_old=" tea" if said != "tea" else " milk")
        unnamed = dataclasses.replace(mini_lab.edit(), target_old="")
        assert source.knows([unknown, known, unnamed]) == [False, True, False]


class TestShards:
    def test_ranks_write_what_one_process_writes(self, model, corpora, finished_folder, tmp_path):
        """And the first one waits for the other; a number of ranks may go on with what another number has left."""
        made, first = finish(settings(model), tmp_path / "ranks", Rank(0, 2))
        waiting = first.wait_for_others(every=0.0)
        assert next(waiting) == made < first.plan.edits
        finish(settings(model), tmp_path / "ranks", Rank(1, 3))
        left = {task.key for task in begun(settings(model), tmp_path / "ranks").left()}
        assert left == {task.key for task in first.plan.tasks if not first.results.has(task.key)}
        finish(settings(model), tmp_path / "ranks", Rank(1, 2))
        assert list(waiting)[-1] == first.plan.edits
        assert stored(tmp_path / "ranks") == stored(finished_folder)


def bench_command(out, model, *extra):
    grid = ("--methods", "ft-m", "--losses", "cross_entropy", "overtone_held", "--lengths", "1,2", "--edits", "2")
    return ["bench", "--out", str(out), "--model", model, "--at-once", "1", *grid, *extra]


class TestCommand:
    """On the world's own short edits and a random model with a tokenizer of the world."""

    ENVIRONMENT = MappingProxyType({**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory):
        return mini_lab.save_world_model(tmp_path_factory.mktemp("world model"))

    @pytest.fixture(scope="class")
    @classmethod
    def in_one_go(cls, model, tmp_path_factory):
        out = tmp_path_factory.mktemp("in one go")
        assert cli.main(bench_command(out, model, "--workers", "1")) == 0
        return out

    def test_writes_results_and_report_and_nothing_else(self, in_one_go):
        names = {path.name for path in in_one_go.iterdir()}
        assert names == {HEADER, EDITS, "report.md", "table1.csv", "forgetting.csv", "figures"}
        assert len(stored(in_one_go)[1]) == 2 * (2 + 2)

    def test_two_ranks_write_the_same(self, model, in_one_go, tmp_path, monkeypatch):
        """By the variables that torchrun sets; the second rank in a process of its own, not a fork: sets and hashes
        have another order there, and `python -m overtone` is what starts it.
        """
        command = bench_command(tmp_path, model)
        of_two = {"WORLD_SIZE": "2", "RANK": "1"}
        subprocess.run(
            [sys.executable, "-m", "overtone", *command],
            env={**self.ENVIRONMENT, **of_two},
            check=True,
            capture_output=True,
        )
        assert 0 < len(list((tmp_path / EDITS).iterdir())) < len(list((in_one_go / EDITS).iterdir()))
        for name, value in (of_two | {"RANK": "0"}).items():
            monkeypatch.setenv(name, value)
        assert cli.main(command) == 0
        assert stored(tmp_path) == stored(in_one_go)

    @pytest.mark.slow
    def test_two_ranks_of_torchrun_write_the_same(self, model, in_one_go, tmp_path):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launch, "-m", "overtone", *bench_command(tmp_path, model)]
        subprocess.run(command, env=dict(self.ENVIRONMENT), check=True, capture_output=True)
        assert stored(tmp_path) == stored(in_one_go)

    def test_a_killed_run_goes_on(self, model, in_one_go, tmp_path, monkeypatch):
        """kill -9 inside the second sequence: the first is kept, and the same command ends at the same results."""
        command = bench_command(tmp_path, model, "--workers", "1")
        made, apply = [], WeightSession.apply

        def apply_or_die(*arguments):
            if len(made) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(1)
            return apply(*arguments)

        def run_until_killed():
            WeightSession.apply = apply_or_die
            cli.main(command)

        assert exit_code_of(run_until_killed) == -signal.SIGKILL
        (kept,) = (tmp_path / EDITS).glob("*.json")
        before = kept.read_bytes()
        monkeypatch.setattr(WeightSession, "apply", lambda *arguments: made.append(1) or apply(*arguments))
        assert cli.main(command) == 0
        assert len(made) == 2 + 2 * 2, "the other sequence and the single edits"
        assert kept.read_bytes() == before
        assert stored(tmp_path) == stored(in_one_go)


class TestErrors:
    """What a command says that ends after the first edit."""

    @pytest.mark.parametrize(
        ("error", "message", "exit_code"),
        [
            (ValueError("no line"), "no line", 1),
            (MemoryError(), "MemoryError", 1),
            (OSError(28, "full"), "full", 1),
            (KeyboardInterrupt(), "interrupted", 130),
        ],
    )
    def test_a_run_that_ends_can_be_gone_on_with(
        self, model, corpora, tmp_path, monkeypatch, capsys, error, message, exit_code
    ):
        """The edits that were made are on disk."""
        perform = SequenceTask.perform

        def failing(task, workplace):
            if task.sequence == 1:
                raise error
            return perform(task, workplace)

        monkeypatch.setattr(SequenceTask, "perform", failing)
        arguments = (
            "--model",
            model,
            "--methods",
            "ft-m",
            "--losses",
            "overtone",
            "--lengths",
            "1",
            "--edits",
            "2",
            "--at-once",
            "1",
        )
        assert cli.main(["bench", "--out", str(tmp_path), "--workers", "1", *arguments]) == exit_code
        said = capsys.readouterr().err
        assert message in said
        assert "the same command goes on from there" in said
        assert len(stored(tmp_path)[1]) == 1


class TestNamedModel:
    def test_pads_with_the_end_of_a_sequence_where_there_is_no_pad_token(self, corpora, tmp_path):
        words = mini_lab.tokenizer()
        words.pad_token = None
        mini_lab.random_model().bfloat16().save_pretrained(tmp_path)
        words.save_pretrained(tmp_path)
        workplace = Workplace.load(tmp_path)
        assert workplace.tokenizer.pad_token == "<eos>"
        assert workplace.model.dtype == torch.float32
        finish(settings(str(tmp_path), edits=1, lengths=(1,)), tmp_path / "out")
        assert {record.error for record in stored(tmp_path / "out")[1]} == {None}

    def test_refuses_a_tokenizer_that_cannot_pad(self, corpora, tmp_path):
        words = mini_lab.tokenizer()
        words.pad_token = words.eos_token = None
        mini_lab.random_model().save_pretrained(tmp_path)
        words.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has neither a pad token nor an end-of-sequence token"):
            Workplace.load(tmp_path)


class TestHelp:
    def test_names_are_those_of_the_registries(self, capsys, monkeypatch):
        """The help spells names out so that it needs no import; they must be the real ones."""
        monkeypatch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit):
            cli.main(["bench", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        for names in (CORPORA, METHODS, ALGORITHMS, ARCHITECTURES):
            assert ", ".join(names) in text.replace(" or gpt2", ", gpt2")
        assert all(f"{name}:" in text for name in GRIDS)


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--preset", "slow"), "unknown preset 'slow'"),
            (("--data", "mars"), "unknown corpus 'mars'"),
            (("--losses", "focal"), "unknown loss 'focal'"),
            (("--methods", ","), "methods is empty"),
            (("--workers", "0"), "workers must be at least 1, got 0"),
            (("--at-once", "0"), "at_once must be at least 1, got 0"),
            (("--size", "0"), "size is 0, but no data here is read from a published file"),
            (("--zsre", ""), "--zsre must be a file that can be read, got '': name one, or leave it out"),
            (("--lengths", "100", "--data", "long"), "from 1 to 44"),
            (("--zsre", "nowhere.json"), "nowhere.json"),
            (("--model", "./nowhere"), "model './nowhere' cannot be loaded"),
        ],
    )
    def test_exit_code_2_and_a_message(self, tmp_path, capsys, arguments, message):
        assert cli.main(["bench", "--out", str(tmp_path / "out"), *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--lengths", "1,ten", "whole numbers by commas are expected, got '1,ten'"),
            ("--lr", "fast", "numbers by commas are expected, got 'fast'"),
            ("--lr", ",", "numbers by commas are expected, got ','"),
        ],
    )
    def test_numbers_that_are_none(self, capsys, option, value, message):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bench", option, value])
        assert stopped.value.code == 2
        assert f"argument {option}: {message}" in capsys.readouterr().err
