"""The results folder: what is on disk, what a killed run leaves, and which other runs it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from result_records import HEADER, TRACE, record, scores, sequence, write

from overtone.lab.report.frame import load_results
from overtone.lab.results import files
from overtone.lab.results import folder as folder_module
from overtone.lab.results.files import write_whole
from overtone.lab.results.folder import EDITS, ResultsFolder
from overtone.lab.results.folder import HEADER as HEADER_FILE
from overtone.lab.results.header import merged

RECORDS = [
    *sequence([1.0, 0.5], trace=TRACE),
    record(None, loss="overtone"),
    record(loss="overtone", sequence=1, index=1, answers={"a": 1.0}),
]

MODEL = HEADER["models"][0]

SCORES = asdict(scores(1.0))

MISSING = object()


def header(**changes):
    return {**HEADER, "data": ["short"], "methods": ["lora"], "losses": ["overtone"], **changes}


def _check_refused(folder, changes, named, read):
    """The file is refused by name, with the fields and what to do, and stays as it was."""
    file = folder / HEADER_FILE
    changed = {**json.loads(file.read_text()), **changes}
    text = json.dumps({name: value for name, value in changed.items() if value is not MISSING})
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"{HEADER_FILE} .* wrong type: {named}\): .* remove this file"):
        read(folder)
    assert file.read_text() == text


class TestSequences:
    def test_are_read_as_they_were_written(self, tmp_path):
        folder = ResultsFolder(write(tmp_path, RECORDS[:3]))
        assert all(folder.has(made.key) for made in RECORDS[:3])
        assert folder.read(RECORDS[0].key) == RECORDS[:2]
        assert sorted(folder.read_all()[1], key=RECORDS.index) == RECORDS[:3]

    @pytest.mark.parametrize(
        "changes", [{"seed": 1}, {"loss": "overtone"}, {"sequence": 1}, {"settings": {"lr": 0.001, "steps": 50}}]
    )
    def test_of_another_kind_are_other_files(self, tmp_path, changes):
        folder = ResultsFolder(write(tmp_path, [record()]))
        other = record(**changes)
        assert not folder.has(other.key)
        folder.write([other])
        assert len(folder.read_all()[1]) == 2

    def test_a_file_is_whole_or_not_there(self, tmp_path, monkeypatch):
        """A run that is killed while it writes leaves the sequence to be made again."""
        folder = ResultsFolder(write(tmp_path, RECORDS[:2]))

        def killed(source, target):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                folder.write(RECORDS[3:])
        assert not folder.has(RECORDS[3].key)
        assert len(folder.read_all()[1]) == 2

    def test_a_number_that_json_does_not_have_is_refused(self, tmp_path):
        folder = ResultsFolder(write(tmp_path, RECORDS[:2]))
        with pytest.raises(ValueError, match="JSON compliant"):
            folder.write([record(perplexity=float("nan"), loss="overtone")])
        assert not folder.has(record(loss="overtone").key)

    @pytest.mark.parametrize(
        "text", ["", "hello", "{}", "[1]", '[{"data": "short"}]', '[{"scores": null, "trace": 3}]']
    )
    def test_a_broken_file_is_named(self, tmp_path, text):
        folder = ResultsFolder(write(tmp_path, RECORDS[:2]))
        (file,) = (tmp_path / EDITS).iterdir()
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"{file.name} is not a results file of overtone .* remove this file"):
            folder.read_all()

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"settings": [1]}, "settings"),
            ({"loss": None}, "loss"),
            ({"length": "x"}, "length"),
            ({"steps": "x"}, "steps"),
            ({"steps": True}, "steps"),
            ({"prompt": MISSING}, "prompt"),
            ({"perplexity": "x"}, "perplexity"),
            ({"scores": 3}, "scores"),
            ({"scores": {**SCORES, "accuracy": None}}, "scores.accuracy"),
            ({"scores": {**SCORES, "accuracy": {"rel": "x"}}}, r"scores.accuracy\['rel'\]"),
            ({"scores": {**SCORES, "accuracy": {"rel": float("nan")}}}, r"scores.accuracy\['rel'\]"),
            ({"trace": {**asdict(TRACE), "steps": [0, "x"]}}, r"trace.steps\[1\]"),
        ],
    )
    def test_a_field_of_another_type_is_named_with_its_file(self, tmp_path, changes, field):
        write(tmp_path, [record()])
        (file,) = (tmp_path / EDITS).iterdir()
        changed = {**record().as_json(), **changes}
        file.write_text(json.dumps([{name: value for name, value in changed.items() if value is not MISSING}]))
        with pytest.raises(ValueError, match=rf"{file.name} .* wrong type: \[0\].{field}\): .* remove this file"):
            load_results(tmp_path)

    def test_fields_that_have_a_default_may_be_missing(self, tmp_path):
        """As in a folder of before they were added."""
        write(tmp_path, [record()])
        (file,) = (tmp_path / EDITS).iterdir()
        values = record().as_json()
        del values["answers"], values["scores"]["said"]
        file.write_text(json.dumps([values]))
        assert ResultsFolder(tmp_path).read_all()[1] == [record()]

    @pytest.mark.parametrize("kept", [0, 1])
    def test_a_file_of_fewer_edits_than_its_sequence_is_named(self, tmp_path, kept):
        folder = ResultsFolder(write(tmp_path, RECORDS[:2]))
        (file,) = (tmp_path / EDITS).iterdir()
        file.write_text(json.dumps([made.as_json() for made in RECORDS[:kept]]))
        with pytest.raises(ValueError, match=rf"{file.name} .* {kept} edits are not a whole sequence"):
            folder.read(RECORDS[0].key)


class TestHeader:
    def test_a_larger_run_adds_to_it(self, tmp_path):
        """Commands, data, methods and losses in the order in which they came, and the models of both."""
        first = header(commands=[["first"]])
        model = {**HEADER["models"][0], "seed": 1}
        second = header(
            commands=[["second"]], losses=["cross_entropy", "overtone"], models=[model], versions={"easyedit": "abc"}
        )
        for part in (first, second, first):
            ResultsFolder(tmp_path).begin(part)
        found, _ = ResultsFolder(tmp_path).read_all()
        assert found["commands"] == [["first"], ["second"]]
        assert found["losses"] == ["overtone", "cross_entropy"]
        assert [described["seed"] for described in found["models"]] == [0, 1]
        assert found["versions"] == {"torch": "2", "easyedit": "abc"}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"versions": {"torch": "3"}}, "another version of torch"),
            ({"recommended": {"lora": "y"}}, "another recommended setting of lora"),
            ({"held_out_texts": 3}, "another number of held-out texts"),
            ({"models": [{**HEADER["models"][0], "fingerprint": "b"}]}, "another fingerprint of short with seed 0"),
            ({"models": [{**HEADER["models"][0], "file": "b"}]}, "another file of short with seed 0"),
        ],
    )
    def test_refuses_a_run_on_which_other_things_had_a_bearing(self, tmp_path, changes, message):
        ResultsFolder(tmp_path).begin(header(recommended={"lora": "x"}))
        before = (tmp_path / HEADER_FILE).read_bytes()
        with pytest.raises(ValueError, match=f"{message}: choose another folder"):
            ResultsFolder(tmp_path).begin(header(**changes))
        assert (tmp_path / HEADER_FILE).read_bytes() == before

    @pytest.mark.parametrize("text", ['{"format": "something else"}', "[]", "", '{"a": 1}\n{"b": 2}'])
    def test_refuses_a_file_of_something_else_and_keeps_it(self, tmp_path, text):
        (tmp_path / HEADER_FILE).write_text(text)
        with pytest.raises(ValueError, match=f"{HEADER_FILE} is not .*: choose another folder"):
            ResultsFolder(tmp_path).begin(header())
        assert (tmp_path / HEADER_FILE).read_text() == text

    @pytest.mark.parametrize("name", ["data", "methods", "losses", "commands", "versions", "machine", "recommended"])
    @pytest.mark.parametrize("read", [load_results, lambda folder: ResultsFolder(folder).begin(header())])
    def test_a_field_that_is_missing_is_named(self, tmp_path, name, read):
        _check_refused(write(tmp_path, RECORDS[:2]), {name: MISSING}, name, read)

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"held_out_texts": MISSING}, "held_out_texts"),
            ({"held_out_texts": None}, "held_out_texts"),
            ({"losses": "overtone"}, "losses"),
            ({"versions": ["2"]}, "versions"),
            ({"models": MISSING}, "models"),
            ({"models": {}}, "models"),
            ({"models": ["llama"]}, r"models\[0\]"),
            *[
                ({"models": [{key: value for key, value in MODEL.items() if key != name}]}, rf"models\[0\].{name}")
                for name in MODEL
            ],
            ({"models": [MODEL, {**MODEL, "knowledge": 0.9}]}, r"models\[1\].knowledge"),
            ({"models": [{**MODEL, "knowledge": {"x": "y"}}]}, r"models\[0\].knowledge\['x'\]"),
            ({"commands": [1]}, r"commands\[0\]"),
        ],
    )
    def test_a_field_of_another_type_and_one_of_a_model_are_named(self, tmp_path, changes, field):
        _check_refused(write(tmp_path, RECORDS[:2]), changes, field, load_results)

    def test_all_that_is_wrong_is_named_at_once(self, tmp_path):
        changes = {"losses": MISSING, "machine": 2, "models": [{**MODEL, "seed": "0"}]}
        _check_refused(write(tmp_path, RECORDS[:2]), changes, r"losses, machine, models\[0\].seed", load_results)

    def test_a_command_that_begins_at_the_same_time_is_kept(self, tmp_path, monkeypatch):
        """Its header is written in place of this one's, from what both had read before."""
        ours, theirs = header(commands=[["ours"]]), header(commands=[["theirs"]], losses=["cross_entropy"])
        texts = []

        def write_and_be_replaced(path, text):
            texts.append(text)
            write_whole(path, text if len(texts) > 1 else json.dumps(theirs))

        monkeypatch.setattr(folder_module, "write_whole", write_and_be_replaced)
        ResultsFolder(tmp_path).begin(ours)
        found, _ = ResultsFolder(tmp_path).read_all()
        assert (found["commands"], found["losses"]) == ([["theirs"], ["ours"]], ["cross_entropy", "overtone"])

    def test_edits_that_it_does_not_name_are_reported(self, tmp_path):
        write(tmp_path, RECORDS)
        ResultsFolder(tmp_path).write([record(loss="dft", method="ft-m", data="long")])
        edits = load_results(tmp_path).edits
        assert len(edits) == len(RECORDS) + 1
        assert not edits[["loss", "method", "data"]].isna().any(axis=None)
        assert list(edits["loss"].cat.categories) == ["cross_entropy", "overtone", "dft"]

    def test_only_one_of_several_processes_writes_it(self, tmp_path):
        ResultsFolder(tmp_path).begin(header(), is_writer=False)
        assert not (tmp_path / HEADER_FILE).exists()
        with pytest.raises(FileNotFoundError, match="there are no results"):
            ResultsFolder(tmp_path).read_all()

    def test_is_json_alone(self, tmp_path):
        """What was merged with a header that was read is compared with what was read."""
        once = json.loads(json.dumps(header()))
        assert merged(once, once, tmp_path / HEADER_FILE) == once


def test_a_write_that_fails_keeps_the_old_text(tmp_path):
    path = tmp_path / "table.csv"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "old"
