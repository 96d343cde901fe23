"""The grid of edits, its records on disk, and its statistics."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import signal
import subprocess
import sys

import mini_lab
import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from overtone.lab import experiment
from overtone.lab.experiment import Task, Workplace, fingerprint, perform_all, plan
from overtone.lab.metrics import Scores
from overtone.lab.records import EditRecord, RecordFile, read_records, write_atomically
from overtone.lab.report import table
from overtone.lab.summary import estimate, summarise
from overtone.lab.traces import EditTrace

RUN = {"model": "abc", "seed": 0}


def record(index=0, method="lora", loss="overtone", accuracy=0.5, trace=None):
    scores = Scores(
        accuracy={"rel": 1.0, "gen": accuracy, "por": accuracy, "loc": accuracy},
        accuracy_by_kind={"rel.rewrite": 1.0},
        exact_match={"rel": 1.0, "gen": 0.0, "por": 0.0, "loc": 0.0},
        p_new=0.75,
        p_old=0.125,
        kl=0.25,
    )
    return EditRecord(index, method, loss, "the head is", " bo", " ana", scores, 12, "steps", 0.5, trace)


TRACE = EditTrace([0, 1, 2], [3.0, 2.0, 1.0], [4.0, 3.5, 3.75], [5.0, 0.5], [0.25, -0.5])


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = mini_lab.random_model(), mini_lab.tokenizer()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, Workplace(model, tokenizer)


def grid(losses=("cross_entropy", "overtone_held"), methods=("lora", "ft-m"), edits=1):
    return plan([mini_lab.edit()] * edits, methods, losses, traced_method=methods[0])


class TestPlan:
    def test_is_the_whole_grid_edit_after_edit(self):
        tasks = grid(edits=2)
        assert [task.key for task in tasks[:4]] == [
            (0, "lora", "cross_entropy"),
            (0, "lora", "overtone_held"),
            (0, "ft-m", "cross_entropy"),
            (0, "ft-m", "overtone_held"),
        ]
        assert [task.index for task in tasks] == [0] * 4 + [1] * 4
        assert all(task.is_traced == (task.method == "lora") for task in tasks)


class TestWorkplace:
    def test_record_tells_the_edit(self, saved_model):
        _, workplace = saved_model
        task = Task(3, mini_lab.edit(), "lora", "early_stopping", is_traced=True)
        made = workplace.perform(task)
        assert made.key == task.key == (3, "lora", "early_stopping")
        assert made.scores.accuracy["rel"] == 1.0
        assert made.ended == "stopped"
        assert made.trace.steps[-1] == made.steps
        assert made.trace.generality_loss[0] != made.trace.generality_loss[-1]

    def test_every_edit_starts_from_the_clean_model(self, saved_model):
        """The same task gives the same record after other edits as before them."""
        _, workplace = saved_model
        tasks = grid(losses=("overtone_held",))
        first = [comparable(workplace.perform(task)) for task in tasks]
        again = [comparable(workplace.perform(task)) for task in reversed(tasks)]
        assert first == again[::-1]

    def test_refuses_to_go_on_with_a_model_that_was_not_restored(self, saved_model, monkeypatch):
        """A method that leaves a weight changed by one bit is found out by the checksum."""
        path, _ = saved_model
        workplace = Workplace.load(path)
        lora = experiment.METHODS["lora"]

        def leaky(model, seed):
            model.lm_head.weight.data[0, 0] *= 1 + 1e-6
            return lora.open(model, seed)

        monkeypatch.setitem(experiment.METHODS, "lora", dataclasses.replace(lora, open=leaky))
        with pytest.raises(RuntimeError, match="LoRA did not restore the model"):
            workplace.perform(Task(0, mini_lab.edit(), "lora", "cross_entropy"))

    def test_traces_do_not_change_the_edit(self, saved_model):
        _, workplace = saved_model
        plain, traced = (
            workplace.perform(Task(0, mini_lab.edit(), "ft-m", "overtone", is_traced=flag)) for flag in (False, True)
        )
        assert plain.scores == traced.scores
        assert plain.trace is None


def comparable(made):
    return dataclasses.replace(made, seconds=0.0)


class TestPerformAll:
    def test_records_do_not_depend_on_the_number_of_workers(self, saved_model):
        """Two spawned processes and this one compute the same floats."""
        path, workplace = saved_model
        tasks = grid(methods=("ft-m",))
        alone = sorted(map(comparable, perform_all(workplace, path, tasks)), key=lambda made: made.key)
        threads = torch.get_num_threads()
        together = sorted(map(comparable, perform_all(workplace, path, tasks, workers=2)), key=lambda made: made.key)
        assert alone == together
        assert torch.get_num_threads() == threads

    def test_a_worker_refuses_another_model(self, saved_model, monkeypatch):
        """Records of two different models must not be mixed, so the folder is held against what the run began with."""
        path, _ = saved_model
        monkeypatch.setattr(experiment.signal, "signal", lambda *arguments: None)
        monkeypatch.setattr(experiment.torch, "set_num_threads", lambda count: None)
        with pytest.raises(RuntimeError, match="is not the one that the run began with"):
            experiment._start_worker(path, fingerprint(mini_lab.random_model(seed=1)))

    def test_workers_end_with_a_parent_that_was_killed(self, tmp_path):
        """A worker would keep the pipe open for ten minutes; it closes when its parent is gone."""
        script = tmp_path / "parent.py"
        script.write_text(
            "import multiprocessing, os, signal, time\n"
            "from types import SimpleNamespace\n"
            "from overtone.lab import experiment\n"
            "def work(started):\n"
            "    experiment.Workplace.load = lambda source: SimpleNamespace(fingerprint='same')\n"
            "    experiment._start_worker('', 'same')\n"
            "    started.set()\n"
            "    time.sleep(600)\n"
            "if __name__ == '__main__':\n"
            "    context = multiprocessing.get_context('spawn')\n"
            "    started = context.Event()\n"
            "    context.Process(target=work, args=(started,)).start()\n"
            "    started.wait()\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        killed = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, timeout=120, check=False)
        assert killed.returncode == -signal.SIGKILL

    def test_no_tasks_need_no_workers(self, saved_model):
        path, workplace = saved_model
        assert list(perform_all(workplace, path, [], workers=2)) == []

    def test_refuses_no_workers(self, saved_model):
        path, workplace = saved_model
        with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
            next(perform_all(workplace, path, grid(), workers=0))


class TestFingerprint:
    def test_sees_a_single_bit(self):
        model = mini_lab.random_model()
        before = fingerprint(model)
        assert fingerprint(mini_lab.random_model()) == before
        with torch.no_grad():
            weight = model.lm_head.weight.view(-1)
            weight[5] = torch.nextafter(weight[5], torch.tensor(9.0))
        assert fingerprint(model) != before


class TestRecordFile:
    def test_finds_what_was_appended(self, tmp_path):
        path = tmp_path / "records.jsonl"
        first = RecordFile(path, EditRecord, RUN)
        first.append(record(0, trace=TRACE))
        first.append(record(1))
        assert RecordFile(path, EditRecord, RUN).records == [record(0, trace=TRACE), record(1)]

    def test_reads_what_gzip_has_compressed(self, tmp_path):
        path = tmp_path / "records.jsonl"
        RecordFile(path, EditRecord, RUN).append(record(0, trace=TRACE))
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(path.read_bytes())
        assert read_records(tmp_path / "records.jsonl.gz", EditRecord) == (RUN, [record(0, trace=TRACE)])

    def test_values_that_may_differ_are_those_of_the_latest_run(self, tmp_path):
        path = tmp_path / "records.jsonl"
        RecordFile(path, EditRecord, RUN).append(record(0))
        RecordFile(path, EditRecord, RUN | {"seed": 1}, may_differ=["seed"])
        assert read_records(path, EditRecord) == (RUN | {"seed": 1}, [record(0)])

    def test_a_record_is_on_disk_when_append_returns(self, tmp_path):
        path = tmp_path / "records.jsonl"
        RecordFile(path, EditRecord, RUN).append(record())
        assert path.read_text().count("\n") == 2

    def test_drops_a_torn_last_line_and_goes_on(self, tmp_path):
        path = tmp_path / "records.jsonl"
        RecordFile(path, EditRecord, RUN).append(record(0))
        whole = path.read_text()
        path.write_text(whole + whole.splitlines()[1][:40])
        resumed = RecordFile(path, EditRecord, RUN)
        assert resumed.records == [record(0)]
        resumed.append(record(1))
        assert RecordFile(path, EditRecord, RUN).records == [record(0), record(1)]

    def test_begins_again_after_a_torn_first_line(self, tmp_path):
        path = tmp_path / "records.jsonl"
        path.write_text('{"mod')
        assert RecordFile(path, EditRecord, RUN).records == []
        assert json.loads(path.read_text()) == RUN

    def test_refuses_the_records_of_another_run_and_keeps_them(self, tmp_path):
        path = tmp_path / "records.jsonl"
        RecordFile(path, EditRecord, RUN).append(record())
        before = path.read_text()
        with pytest.raises(ValueError, match="another seed: choose another folder"):
            RecordFile(path, EditRecord, RUN | {"seed": 1})
        assert path.read_text() == before

    @pytest.mark.parametrize(
        "line", ["not json", "[1, 2]", "7", '"text"', json.dumps(RUN) + '\n{"index": 0}', "\0\xff"]
    )
    def test_refuses_a_file_of_something_else_and_keeps_it(self, tmp_path, line):
        path = tmp_path / "records.jsonl"
        path.write_bytes(f"{line}\n".encode("latin-1"))
        with pytest.raises(ValueError, match=r"is not a record file of overtone .*: choose another folder, or remove"):
            RecordFile(path, EditRecord, RUN)
        assert path.read_bytes() == f"{line}\n".encode("latin-1")


class TestWriteAtomically:
    def test_a_failure_keeps_the_old_text(self, tmp_path):
        path = tmp_path / "results.json"
        write_atomically(path, "old")
        with pytest.raises(UnicodeEncodeError):
            write_atomically(path, "\ud800")
        assert path.read_text() == "old"


class TestSummarise:
    def test_one_row_per_method_and_loss_in_order(self):
        records = [record(0, "lora", "overtone"), record(0, "ft-m", "overtone"), record(1, "lora", "overtone")]
        assert [(row.method, row.loss) for row in summarise(records)] == [("lora", "overtone"), ("ft-m", "overtone")]

    def test_means_by_hand(self):
        """Averages of (1 + 3a) / 4 for a of 0.5 and 1; exact match 1 of the four measures."""
        (row,) = summarise([record(0, accuracy=0.5), record(1, accuracy=1.0)])
        means = {name: value.mean for name, value in row.measures.items()}
        assert means["rel"] == 1.0
        assert means["gen"] == 0.75
        assert means["average"] == pytest.approx((0.625 + 1.0) / 2)
        assert means["exact_match_average"] == 0.25
        assert (means["p_new"], means["p_old"], means["kl"], means["steps"]) == (0.75, 0.125, 0.25, 12.0)

    def test_a_measure_that_some_edits_lack_is_averaged_over_the_others(self):
        bare = record(1)
        bare = dataclasses.replace(bare, scores=dataclasses.replace(bare.scores, accuracy={"rel": 0.0}, kl=None))
        (row,) = summarise([record(0), bare])
        assert (row.measures["gen"].mean, row.measures["gen"].count) == (0.5, 1)
        assert row.measures["kl"].count == 1
        assert row.measures["rel"].mean == 0.5


class TestEstimate:
    def test_interval_is_scipy_s(self):
        values = np.random.default_rng(0).random(30)
        found = estimate(values.tolist(), seed=4)
        expected = stats.bootstrap(
            (values,), np.mean, method="percentile", rng=np.random.default_rng(4)
        ).confidence_interval
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        assert found.low < found.mean < found.high

    def test_constant_values_have_an_interval_of_one_point(self):
        assert dataclasses.astuple(estimate([1.0, 1.0, 1.0])) == (1.0, 1.0, 1.0, 3)

    def test_one_value_has_none(self):
        assert dataclasses.astuple(estimate([0.5])) == (0.5, None, None, 1)

    def test_refuses_no_values(self):
        with pytest.raises(ValueError, match="values is empty"):
            estimate([])


class TestTable:
    def rendered(self, rows):
        console = Console(width=80, file=io.StringIO())
        console.print(table(rows, title="two edits"))
        return console.file.getvalue()

    def test_shows_mean_interval_and_settings(self):
        text = self.rendered(summarise([record(0, accuracy=0.5), record(1, accuracy=1.0)]))
        assert "LoRA" in text
        assert "OverTone" in text
        assert "75.0" in text
        assert "50-100" in text
        assert "LoRA 50 steps at lr 0.005" in " ".join(text.split())

    def test_fits_eighty_columns(self):
        """Nothing is cut off or wrapped inside a number."""
        rows = summarise(
            [record(index, method, "overtone_held", index / 7) for index in range(7) for method in ("lora", "ft-m")]
        )
        text = self.rendered(rows)
        assert "…" not in text
        assert all(heading in text for heading in ("Rel", "Gen", "Por", "Loc", "Avg", "Exact", "KL", "Steps"))
