"""Edits in several processes, and the checksum by which an edit that was not taken back shows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace

import mini_lab
import pytest
import torch

from overtone.lab.edit.methods import METHODS
from overtone.lab.model.fingerprint import _checksum, _weighted_sum, fingerprint
from overtone.lab.model.workplace import Workplace
from overtone.lab.run import workers
from overtone.lab.run.task import SequenceTask
from overtone.lab.run.workers import perform_all

TASKS = [
    SequenceTask("short", 0, "ft-m", METHODS["ft-m"].settings, loss, 0, (mini_lab.edit(),), ("bo cy likes tea",))
    for loss in ("cross_entropy", "overtone:hold=settled")
]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = mini_lab.random_model(), mini_lab.tokenizer()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, Workplace(model, tokenizer)


def comparable(sequences):
    return json.dumps([[replace(made, seconds=0.0).as_json() for made in records] for records in sequences])


class TestPerformAll:
    def test_records_do_not_depend_on_the_number_of_workers(self, saved_model):
        """Two spawned processes and this one compute the same floats."""
        path, workplace = saved_model
        alone = sorted(map(comparable, perform_all(workplace, path, TASKS)))
        threads = torch.get_num_threads()
        together = sorted(map(comparable, perform_all(workplace, path, TASKS, workers=2)))
        assert alone == together
        assert torch.get_num_threads() == threads

    def test_a_worker_refuses_another_model(self, saved_model, monkeypatch):
        """Records of two different models must not be mixed, so the folder is held against what the run began with."""
        path, _ = saved_model
        monkeypatch.setattr(workers.signal, "signal", lambda *arguments: None)
        monkeypatch.setattr(workers.torch, "set_num_threads", lambda count: None)
        with pytest.raises(RuntimeError, match="is not the one that the run began with"):
            workers._start_worker(path, fingerprint(mini_lab.random_model(seed=1)))

    def test_workers_end_with_a_parent_that_was_killed(self, tmp_path):
        """A worker would keep the pipe open for ten minutes; it closes when its parent is gone."""
        script = tmp_path / "parent.py"
        script.write_text(
            "import multiprocessing, os, signal, time\n"
            "from types import SimpleNamespace\n"
            "def work(started):\n"
            "    from overtone.lab.run import workers\n"
            "    workers.Workplace.load = lambda source, **_: SimpleNamespace(fingerprint='same')\n"
            "    workers._start_worker('', 'same')\n"
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


class TestFingerprint:
    def test_sees_a_single_bit(self):
        model = mini_lab.random_model()
        before = fingerprint(model)
        assert fingerprint(mini_lab.random_model()) == before
        with torch.no_grad():
            weight = model.lm_head.weight.view(-1)
            weight[5] = torch.nextafter(weight[5], torch.tensor(9.0))
        assert fingerprint(model) != before

    def test_sees_a_single_bit_on_other_devices(self):
        words = torch.arange(1000, dtype=torch.int32)
        before = _weighted_sum(words)
        words[5] += 1
        assert _weighted_sum(words) != before

    def test_sees_any_change_of_a_word_of_eight_bytes(self):
        """CRC-32 alone does not: its polynomial, shifted into the upper half, leaves it as it was."""
        assert _checksum(torch.tensor([0x1DB710641])) != _checksum(torch.zeros(1, dtype=torch.int64))
