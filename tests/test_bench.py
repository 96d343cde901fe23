"""`overtone bench`, with a random model named on the command line and a corpus of three edits of a dozen words."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from types import MappingProxyType

import mini_lab
import pytest
import torch

from overtone import cli
from overtone.config import RECOMMENDED
from overtone.lab import bench, results_folder, sequences
from overtone.lab.bench import Bench, BenchSettings
from overtone.lab.corpora import CORPORA
from overtone.lab.easyedit_session import ALGORITHMS
from overtone.lab.editors import METHODS
from overtone.lab.experiment import NotRestoredError, Workplace
from overtone.lab.losses import LOSSES, parse_loss
from overtone.lab.outcomes import read_results
from overtone.lab.presets import PRESETS, preset
from overtone.lab.results_folder import CHECKPOINTS, RESULTS
from overtone.lab.sequences import SequenceTask
from overtone.lab.sessions import WeightSession
from overtone.lab.sharding import Shard
from overtone.lab.world import Probe

ALONE = Shard(0, 1)


class MiniCorpus:
    """Four edits and as many words as the mini tokenizer knows."""

    name = "short"
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

    monkeypatch.setattr(bench, "open_corpus", open_corpus)
    return opened


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    mini_lab.random_model().save_pretrained(path)
    mini_lab.tokenizer().save_pretrained(path)
    return str(path)


def settings(model, **changes):
    grid = {"methods": ("ft-m",), "losses": ("cross_entropy", "overtone_held"), "lengths": (1, 2), "edits": 3}
    return BenchSettings(**{**grid, "model": model, **changes})


def finish(grid, out, shard=ALONE):
    """All there is left to do in a folder."""
    run = Bench(grid, out, shard=shard)
    results = run.open_results(run.open_models(), command=["overtone", "bench"])
    for _ in run.perform(results):
        pass
    return run, results


def without_seconds(outcomes):
    return [dataclasses.replace(outcome, seconds=0.0) for outcome in outcomes]


def stored(out):
    """The results file without what may differ between two runs of the same grid."""
    header, outcomes = read_results(out / RESULTS)
    return {**header, "commands": None}, without_seconds(outcomes)


class TestGrid:
    def keys(self, run):
        return [task.key[2:] for task in run.tasks]

    def test_sequences_are_cut_from_the_list_and_a_remainder_is_left_out(self, model, corpora, tmp_path):
        run = Bench(settings(model, losses=("overtone",)), tmp_path, shard=ALONE)
        assert self.keys(run) == [("ft-m", "overtone", 1, number) for number in range(3)] + [("ft-m", "overtone", 2, 0)]
        targets = [[edit.target_new for edit in task.edits] for task in run.tasks]
        assert targets == [[" bo cy"], [" dan"], [" eve ana"], [" bo cy", " dan"]]

    def test_a_longer_sequence_takes_what_it_needs(self, model, corpora, tmp_path):
        run = Bench(settings(model, losses=("overtone",), lengths=(4,)), tmp_path, shard=ALONE)
        assert self.keys(run) == [("ft-m", "overtone", 4, 0)]

    def test_losses_of_a_sequence_follow_each_other_and_stand_there_once(self, model, corpora, tmp_path):
        losses = ("overtone_held", "cross_entropy", "overtone:hold_settled=true")
        run = Bench(settings(model, losses=losses, methods=("lora", "ft-m"), edits=1), tmp_path, shard=ALONE)
        assert self.keys(run)[:4] == [
            (method, loss, 1, 0) for method in ("lora", "ft-m") for loss in ("overtone_held", "cross_entropy")
        ]

    def test_traces_single_edits_of_the_first_method_and_seed(self, model, corpora, tmp_path):
        run = Bench(settings(model, methods=("lora", "ft-m"), seeds=(1, 0)), tmp_path, shard=ALONE)
        traced = {(task.method, task.seed, task.length) for task in run.tasks if task.is_traced}
        assert traced == {("lora", 1, 1)}

    def test_a_length_that_does_not_fit_is_refused(self, model, corpora, tmp_path):
        with pytest.raises(ValueError, match="short, sequences of 5: count must be at most 4, got 5"):
            Bench(settings(model, lengths=(1, 5)), tmp_path, shard=ALONE)

    def test_a_preset_leaves_it_out_and_says_so(self, model, corpora, tmp_path):
        run = Bench(settings(model, lengths=(1, 5), fit_lengths=True), tmp_path, shard=ALONE)
        assert {task.length for task in run.tasks} == {1}
        assert run.left_out == ["short has no sequence of 5 with seed 0: count must be at most 4, got 5"]

    def test_more_edits_than_there_are_is_a_mistake_in_a_preset_too(self, model, corpora, tmp_path):
        with pytest.raises(ValueError, match="count must be at most 4, got 5"):
            Bench(settings(model, lengths=(1,), edits=5, fit_lengths=True), tmp_path, shard=ALONE)

    def test_files_reach_their_corpora(self, model, corpora, tmp_path):
        (tmp_path / "zsre.json").write_text("[]")
        grid = settings(model, data=("short", "zsre"), paths={"zsre": str(tmp_path / "zsre.json")}, size=7)
        Bench(grid, tmp_path, shard=ALONE)
        assert corpora == [("short", 0, None, None), ("zsre", 0, tmp_path / "zsre.json", 7)]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"data": ()}, "data is empty"),
            ({"data": ("tiny",)}, "unknown corpus 'tiny': choose from short"),
            ({"data": ("zsre",)}, "data zsre needs its published file: pass --zsre PATH"),
            ({"lengths": (0,)}, "lengths must be at least 1, got 0"),
            ({"edits": 0}, "edits must be at least 1, got 0"),
            ({"losses": ("overtone:lam=2",)}, "lam must be"),
            ({"methods": ("rosa",)}, "unknown method 'rosa'"),
        ],
    )
    def test_names_what_is_wrong(self, model, corpora, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            Bench(settings(model, **changes), tmp_path / "out", shard=ALONE)
        assert not (tmp_path / "out").exists()

    def test_refuses_workers_under_a_launcher(self, model, corpora, tmp_path):
        with pytest.raises(ValueError, match="workers must be 1 under torchrun"):
            Bench(settings(model), tmp_path, workers=2, shard=Shard(0, 2))


class TestPresets:
    def test_paper_small_has_every_loss(self):
        grid = PRESETS["paper-small"]
        assert set(LOSSES) < set(grid.losses)
        assert [parse_loss(spec).name for spec in grid.losses] == list(grid.losses)
        assert len(grid.seeds) == 3

    def test_files_join_the_data(self):
        grid = preset("paper-small", paths={"zsre": "a.json"}, edits=5)
        assert grid.data == ("short", "long", "soft", "zsre")
        assert (grid.edits, grid.fit_lengths) == (5, True)

    def test_lengths_that_are_asked_for_must_fit(self):
        assert not preset("quick", paths={}, lengths=(1, 2)).fit_lengths

    def test_refuses_an_unknown_name(self):
        with pytest.raises(ValueError, match="unknown preset 'slow': choose from quick, paper-small"):
            preset("slow", paths={})


class TestRun:
    def test_results_are_whole_and_in_the_order_of_the_grid(self, model, corpora, tmp_path):
        run, results = finish(settings(model), tmp_path)
        outcomes = run.finish(results)
        header, written = read_results(tmp_path / RESULTS)
        assert written == outcomes
        assert [outcome.key for outcome in written] == [
            (*task.key, position) for task in run.tasks for position in range(task.length)
        ]
        (described,) = header["models"]
        assert (described["data"], described["seed"]) == ("short", 0)
        assert described["fingerprint"] == Workplace.load(model).fingerprint
        assert described["perplexity"] > 1
        assert described["knowledge"].keys() == {"facts"}
        assert "parameters" in described["title"]
        assert header["commands"] == [["overtone", "bench"]]
        assert not (tmp_path / CHECKPOINTS).exists()

    def test_two_workers_write_the_same(self, model, corpora, tmp_path):
        finish_alone, results = finish(settings(model), tmp_path / "alone")
        finish_alone.finish(results)
        run = Bench(settings(model), tmp_path / "together", workers=2, shard=ALONE)
        results = run.open_results(run.open_models(), command=["overtone", "bench"])
        assert sum(len(outcomes) for outcomes in run.perform(results)) == run.edits_planned == 10
        run.finish(results)
        assert stored(tmp_path / "together") == stored(tmp_path / "alone")

    def test_a_failed_edit_does_not_end_the_run(self, model, corpora, tmp_path, monkeypatch):
        apply = WeightSession.apply

        def failing(session, edit, *arguments):
            if edit.target_new == " dan":
                raise TypeError("of this edit")
            return apply(session, edit, *arguments)

        expected = finish(settings(model, lengths=(1,)), tmp_path / "sound")
        monkeypatch.setattr(WeightSession, "apply", failing)
        found = finish(settings(model, lengths=(1,)), tmp_path / "failing")
        sound, failed = (without_seconds(run.finish(results)) for run, results in (expected, found))
        assert [outcome.error for outcome in failed] == [None, None, *["TypeError: of this edit"] * 2, None, None]
        assert failed[:2] + failed[4:] == sound[:2] + sound[4:]

    def test_a_model_that_is_not_restored_ends_it(self, model, corpora, tmp_path, monkeypatch):
        monkeypatch.setattr(Workplace, "require_restored", lambda *arguments: (_ for _ in ()).throw(NotRestoredError()))
        with pytest.raises(NotRestoredError):
            finish(settings(model), tmp_path)

    def test_a_method_that_does_not_know_the_model_is_refused_at_once(self, model, corpora, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "overtone.lab.editors._down_projection", lambda *_: (_ for _ in ()).throw(ValueError("no mlp"))
        )
        with pytest.raises(ValueError, match="no mlp"):
            Bench(settings(model), tmp_path, shard=ALONE).open_models()


class TestResume:
    def test_a_finished_run_has_nothing_left(self, model, corpora, tmp_path):
        finish(settings(model), tmp_path)
        run, results = finish(settings(model), tmp_path)
        assert run.left(results) == []

    def test_a_larger_grid_keeps_what_is_there(self, model, corpora, tmp_path):
        run, results = finish(settings(model), tmp_path)
        before = run.finish(results)
        larger = Bench(settings(model, losses=("overtone", "cross_entropy", "overtone_held"), seeds=(1, 0)), tmp_path)
        results = larger.open_results(larger.open_models(), command=[])
        assert {task.key for task in larger.tasks} - {task.key for task in larger.left(results)} == {
            outcome.sequence_key for outcome in before
        }

    def test_a_smaller_grid_loses_nothing(self, model, corpora, tmp_path):
        run, results = finish(settings(model), tmp_path)
        before = run.finish(results)
        run, results = finish(settings(model, losses=("overtone_held",), lengths=(2,)), tmp_path)
        run.finish(results)
        _, after = read_results(tmp_path / RESULTS)
        assert sorted(outcome.key for outcome in after) == sorted(outcome.key for outcome in before)
        assert [outcome.loss for outcome in after[:2]] == ["overtone_held"] * 2

    def test_a_torn_sequence_is_made_again(self, model, corpora, tmp_path):
        run, results = finish(settings(model), tmp_path)
        run.finish(results)
        whole = stored(tmp_path)
        lines = (tmp_path / RESULTS).read_text().splitlines(keepends=True)
        (tmp_path / RESULTS).write_text("".join(lines[:-1]) + lines[-1][:30])
        run = Bench(settings(model), tmp_path, shard=ALONE)
        results = run.open_results(run.open_models(), command=["overtone", "bench"])
        assert [task.length for task in run.left(results)] == [2]
        list(run.perform(results))
        run.finish(results)
        assert stored(tmp_path) == whole

    def test_refuses_another_model_and_keeps_the_file(self, model, corpora, tmp_path):
        finish(settings(model), tmp_path / "out")
        before = (tmp_path / "out" / RESULTS).read_bytes()
        mini_lab.random_model(seed=1).save_pretrained(tmp_path / "other")
        mini_lab.tokenizer().save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="another fingerprint of short with seed 0: choose another folder"):
            finish(settings(str(tmp_path / "other")), tmp_path / "out")
        assert (tmp_path / "out" / RESULTS).read_bytes() == before

    def test_refuses_other_versions(self, model, corpora, tmp_path, monkeypatch):
        finish(settings(model), tmp_path)
        monkeypatch.setattr(sequences, "version", lambda name: "0")
        with pytest.raises(
            ValueError, match=r"another version of overtone, version of peft, .*: choose another folder"
        ):
            finish(settings(model), tmp_path)

    def test_refuses_other_recommended_settings(self, model, corpora, tmp_path, monkeypatch):
        """One name would stand for two losses."""
        finish(settings(model), tmp_path)
        monkeypatch.setitem(RECOMMENDED, "ft-m", {})
        with pytest.raises(ValueError, match="another recommended setting of ft-m: choose another folder"):
            finish(settings(model), tmp_path)

    @pytest.mark.parametrize("line", ['{"format": "something else"}', "[]", '{"a": 1}\n{"b": 2}'])
    def test_refuses_a_file_of_something_else_and_keeps_it(self, model, corpora, tmp_path, line):
        (tmp_path / RESULTS).write_text(f"{line}\n")
        with pytest.raises(ValueError, match=r"results.jsonl is not a .* file"):
            finish(settings(model), tmp_path)
        assert (tmp_path / RESULTS).read_text() == f"{line}\n"

    def test_a_larger_grid_keeps_what_the_first_line_said(self, model, corpora, tmp_path, monkeypatch):
        """Of the other seed's model, and of EasyEdit, which the second run does without."""
        versions = Bench._versions
        with monkeypatch.context() as patch:
            patch.setattr(Bench, "_versions", lambda run: {**versions(run), "easyedit": "abc"})
            finish(settings(model, losses=("overtone",), seeds=(1,)), tmp_path)
        finish(settings(model, losses=("overtone",)), tmp_path)
        header, _ = read_results(tmp_path / RESULTS)
        assert [described["seed"] for described in header["models"]] == [0, 1]
        assert header["versions"]["easyedit"] == "abc"

    def test_every_command_is_kept_once(self, model, corpora, tmp_path):
        """Begun with one command, grown by another, gone on with by the first."""
        for words, losses in (("first", ("overtone",)), ("second", ("cross_entropy",)), ("first", ("overtone",))):
            run = Bench(settings(model, losses=losses), tmp_path, shard=ALONE)
            run.open_results(run.open_models(), command=["overtone", words])
        header, _ = read_results(tmp_path / RESULTS)
        assert header["commands"] == [["overtone", "first"], ["overtone", "second"]]

    def test_goes_on_with_a_file_that_names_one_command(self, model, corpora, tmp_path):
        """As they were before there could be several."""
        run, results = finish(settings(model), tmp_path)
        run.finish(results)
        first, *lines = (tmp_path / RESULTS).read_text().splitlines(keepends=True)
        header = json.loads(first)
        del header["commands"]
        header["command"] = ["overtone", "before"]
        (tmp_path / RESULTS).write_text("".join([json.dumps(header) + "\n", *lines]))
        run, results = finish(settings(model), tmp_path)
        assert run.left(results) == []
        header, _ = read_results(tmp_path / RESULTS)
        assert "command" not in header
        assert header["commands"] == [["overtone", "before"], ["overtone", "bench"]]

    def test_refuses_other_edits(self, model, corpora, tmp_path, monkeypatch):
        finish(settings(model), tmp_path)
        edits = MiniCorpus.edits
        monkeypatch.setattr(MiniCorpus, "edits", lambda self, count, *, seed: edits(self, 4, seed=seed)[::-1][:count])
        with pytest.raises(ValueError, match="holds other edits of short") as refusal:
            finish(settings(model), tmp_path)
        monkeypatch.setattr(MiniCorpus, "edits", edits)
        finish(settings(model), tmp_path)
        assert refusal.value.__traceback__ is not None, "what was refused is still held, its lock is not"


class TestShards:
    def test_ranks_write_what_one_process_writes(self, model, corpora, tmp_path):
        run, results = finish(settings(model), tmp_path / "alone")
        run.finish(results)
        finish(settings(model), tmp_path / "ranks", Shard(1, 2))
        assert not (tmp_path / "ranks" / RESULTS).exists()
        run, results = finish(settings(model), tmp_path / "ranks", Shard(0, 2))
        assert list(run.wait_for_others(results)) == [run.edits_planned]
        run.finish(results)
        assert stored(tmp_path / "ranks") == stored(tmp_path / "alone")
        assert [path.name for path in (tmp_path / "ranks").iterdir() if path.suffix != ".lock"] == [RESULTS]

    def test_the_first_rank_waits_for_the_others(self, model, corpora, tmp_path):
        run, results = finish(settings(model), tmp_path, Shard(0, 2))
        mine = sum(task.length for task in run.tasks if task.key in results.done)
        waiting = run.wait_for_others(results, every=0.0)
        assert next(waiting) == mine < run.edits_planned
        finish(settings(model), tmp_path, Shard(1, 2))
        assert list(waiting)[-1] == run.edits_planned

    def test_a_folder_that_is_being_written_to_is_refused(self, model, corpora, tmp_path):
        run, results = finish(settings(model), tmp_path)
        with pytest.raises(ValueError, match="another run is writing to"):
            finish(settings(model), tmp_path)
        run.finish(results)
        finish(settings(model), tmp_path)

    def test_a_rank_with_nothing_left_leaves_no_part(self, model, corpora, tmp_path):
        """The first rank may have cleared the parts away by the time that it opens the folder."""
        finish(settings(model), tmp_path)
        finish(settings(model), tmp_path, Shard(1, 2))
        assert list(tmp_path.glob("results*")) == [tmp_path / RESULTS]

    def test_parts_that_vanish_are_in_the_results_by_then(self, model, corpora, tmp_path, monkeypatch):
        """The first rank finishes while another looks at the folder."""
        for rank in (1, 0):
            run, results = finish(settings(model), tmp_path, Shard(rank, 2))
        last, read = Bench(settings(model), tmp_path, shard=Shard(1, 2)), results_folder.read_records
        models = last.open_models()

        def read_late(path, kind):
            if path.name == "results.rank0.jsonl" and path.exists():
                with monkeypatch.context() as patch:
                    patch.setattr(results_folder, "read_records", read)
                    results.refresh()
                    run.finish(results)
            return read(path, kind)

        monkeypatch.setattr(results_folder, "read_records", read_late)
        assert last.left(last.open_results(models, command=[])) == []

    def test_another_number_of_ranks_goes_on(self, model, corpora, tmp_path):
        """One of three ranks was killed; a single process then has only its part left."""
        for rank in (0, 2):
            finish(settings(model), tmp_path, Shard(rank, 3))
        run = Bench(settings(model), tmp_path, shard=ALONE)
        results = run.open_results(run.open_models(), command=[])
        killed = Bench(settings(model), tmp_path, shard=Shard(1, 3))
        assert {task.key for task in run.left(results)} == {task.key for task in killed.left(results)}
        assert list(tmp_path.glob("results*")) == [tmp_path / RESULTS]


def bench_command(out, model, *extra):
    grid = ("--methods", "lora", "--losses", "cross_entropy", "overtone_held", "--lengths", "1,3", "--edits", "3")
    return ["bench", "--out", str(out), "--model", model, *grid, *extra]


def subprocess_environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


class TestCommand:
    """In processes of their own, on the world's own short edits and a random model with a tokenizer of the world."""

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
        assert names >= {RESULTS, "report.md", "figures"}
        assert not {CHECKPOINTS, "results.rank0.jsonl"} & names
        _, outcomes = read_results(in_one_go / RESULTS)
        assert len(outcomes) == 2 * (3 + 3)
        assert {outcome.error for outcome in outcomes} == {None}

    def test_two_ranks_of_torchrun_write_the_same(self, model, in_one_go, tmp_path):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run(
            [*launch, "-m", "overtone", *bench_command(tmp_path, model)],
            env=subprocess_environment(),
            check=True,
            capture_output=True,
        )
        assert stored(tmp_path) == stored(in_one_go)

    def test_a_run_killed_inside_a_sequence_goes_on_there(self, model, in_one_go, tmp_path, monkeypatch):
        """kill -9 once two of three edits are on disk; the second run makes the third, and ends at the same numbers."""
        kill_itself = (
            "import os, signal, sys\n"
            "from overtone import cli\n"
            "from overtone.lab.checkpoint import SequenceCheckpoint\n"
            "save = SequenceCheckpoint.save\n"
            "def save_and_die(self, session, fitted):\n"
            "    save(self, session, fitted)\n"
            "    if len(fitted) == 2:\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "SequenceCheckpoint.save = save_and_die\n"
            "cli.main(sys.argv[1:])\n"
        )
        command = bench_command(tmp_path, model, "--workers", "1")
        killed = subprocess.run(
            [sys.executable, "-c", kill_itself, *command], env=subprocess_environment(), capture_output=True
        )
        assert killed.returncode == -9
        assert len(list((tmp_path / CHECKPOINTS).iterdir())) == 1

        made, apply = [], WeightSession.apply

        def counted(session, *arguments):
            made.append(arguments)
            return apply(session, *arguments)

        monkeypatch.setattr(WeightSession, "apply", counted)
        assert cli.main(command) == 0
        assert len(made) == 1 + 3 + 2 * 3, "one edit of the sequence under way, the other sequence, the single edits"
        assert stored(tmp_path) == stored(in_one_go)
        assert not (tmp_path / CHECKPOINTS).exists()


class TestErrors:
    """What a command says that ends after the first edit."""

    @pytest.mark.parametrize(
        ("error", "message"),
        [(ValueError("no line"), "no line"), (MemoryError(), "MemoryError"), (OSError(28, "full"), "full")],
    )
    def test_a_run_that_ends_can_be_gone_on_with(self, model, corpora, tmp_path, monkeypatch, capsys, error, message):
        """The edits that were made are on disk."""
        perform = SequenceTask.perform

        def failing(task, workplace):
            if task.sequence == 1:
                raise error
            return perform(task, workplace)

        monkeypatch.setattr(SequenceTask, "perform", failing)
        arguments = ("--model", model, "--methods", "ft-m", "--losses", "overtone", "--lengths", "1", "--edits", "2")
        assert cli.main(["bench", "--out", str(tmp_path), "--workers", "1", *arguments]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert "the same command goes on from there" in said
        _, outcomes = read_results(tmp_path / RESULTS)
        assert len(outcomes) == 1


class TestNamedModel:
    def test_pads_with_the_end_of_a_sequence_where_there_is_no_pad_token(self, corpora, tmp_path):
        words = mini_lab.tokenizer()
        words.pad_token = None
        mini_lab.random_model().bfloat16().save_pretrained(tmp_path)
        words.save_pretrained(tmp_path)
        workplace = Workplace.load(tmp_path)
        assert workplace.tokenizer.pad_token == "<eos>"
        assert workplace.model.dtype == torch.float32
        run, results = finish(settings(str(tmp_path), edits=1, lengths=(1,)), tmp_path / "out")
        assert {outcome.error for outcome in run.finish(results)} == {None}

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
        for names in (CORPORA, METHODS, ALGORITHMS):
            assert ", ".join(names) in text
        assert all(f"{name}:" in text for name in PRESETS)


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--preset", "slow"), "unknown preset 'slow'"),
            (("--data", "mars"), "unknown corpus 'mars'"),
            (("--losses", "focal"), "unknown loss 'focal'"),
            (("--methods", ","), "methods is empty"),
            (("--workers", "0"), "workers must be at least 1, got 0"),
            (("--lengths", "100", "--data", "long"), "from 1 to 44"),
            (("--zsre", "nowhere.json"), "nowhere.json"),
            (("--model", "./nowhere"), "nowhere"),
        ],
    )
    def test_exit_code_2_and_a_message(self, tmp_path, capsys, arguments, message):
        assert cli.main(["bench", "--out", str(tmp_path / "out"), *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_numbers_that_are_none(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bench", "--lengths", "1,ten"])
        assert stopped.value.code == 2
        assert "whole numbers by commas are expected, got '1,ten'" in capsys.readouterr().err
