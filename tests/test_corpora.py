"""Corpora by name: worlds share their model's texts, files need a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from overtone.lab.data.corpora import CORPORA, open_corpus
from overtone.lab.data.world import build_world
from overtone.lab.data.world_corpus import WorldCorpus

ZSRE = Path(__file__).parent / "fixtures" / "zsre.json"


class TestOpenCorpus:
    @pytest.mark.parametrize("name", ["short", "long", "soft"])
    def test_worlds_tell_the_same_texts_and_are_edited_differently(self, name):
        corpus, world = open_corpus(name, seed=1), build_world(1)
        assert corpus.training_texts() == world.training_texts()
        assert corpus.held_out_texts() == world.held_out_texts()
        assert corpus.edits(3, seed=2) == world.edits(3, seed=2, target=name)
        assert corpus.knowledge_probes().keys() == corpus.knowledge_needed.keys()

    def test_a_file_is_read_from_its_path(self):
        corpus = open_corpus("zsre", seed=0, path=ZSRE, size=6)
        assert len(corpus.edits(5, seed=0)) == 5

    @pytest.mark.parametrize("arch", ["llama", "gpt2"])
    @pytest.mark.parametrize("name", ["short", "zsre"])
    def test_learned_positions_take_longer(self, name, arch):
        path = ZSRE if name == "zsre" else None
        corpus = open_corpus(name, seed=0, path=path, size=path and 6)
        llama = corpus.recipe("llama").steps
        assert corpus.recipe(arch).steps == (llama if arch == "llama" else round(llama * 19 / 14))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"name": "zsre"}, "data zsre needs its published file: pass --zsre PATH"),
            ({"name": "huge"}, f"unknown corpus 'huge': choose from {', '.join(CORPORA)}"),
            ({"name": "short", "path": ZSRE}, "path is .*zsre.json, but short is a world of the lab"),
            ({"name": "soft", "size": 3}, "size is 3, but soft is a world of the lab"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            open_corpus(seed=0, **settings)


class TestSoft:
    def test_locality_is_soft_and_half_of_it_near_the_edit(self):
        world = build_world(0)
        for edit in WorldCorpus(world, "soft").edits(100, seed=0):
            objects = {edit.target_new.strip(), edit.target_old.strip()}
            assert {probe.kind for probe in edit.locality} == {"soft", "soft_object"}
            for probe in edit.locality:
                ((told, answers),) = (
                    (told, answers)
                    for (phrasing, told), answers in world.soft_facts.items()
                    if phrasing.format(told) == probe.prompt
                )
                assert probe.answer == answers[0]
                assert (told in objects) == (probe.kind == "soft_object")
