"""Texts that a model writes around an edit, and batches of them for an attached model."""

from __future__ import annotations

import copy
import types

import mini_lab
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing

from overtone import Anchors, OverToneConfig, overtone_loss
from overtone.huggingface import EditTexts, WrittenTexts, attach, write_texts

PROMPT, TARGET = "the head of acme is", " bo cy"
WRITTEN = WrittenTexts(
    prefixes=("rain likes bo . ", "eve runs . "),
    neighbours=(("the head of zed is", " ana bo cy"), ("the head of dan is", " tea milk rain")),
    about=(("acme", " runs tea"), ("acme", " likes milk by"), ("acme", " is")),
)


def tokenizer(bos="the", **options):
    """With a BOS, on which no anchor stands."""
    words = mini_lab.tokenizer()
    words.bos_token = bos
    for name, value in options.items():
        setattr(words, name, value)
    return words


def edit_texts(**options):
    return EditTexts(tokenizer(), PROMPT, TARGET, WRITTEN, **options)


@pytest.fixture(scope="module")
def model():
    return mini_lab.random_model()


class TestWriteTexts:
    def test_is_about_the_edit(self, model):
        written = write_texts(model, tokenizer(), PROMPT, "acme", count=4)
        assert 0 < len(written.neighbours) <= 4
        for asked, answer in written.neighbours:
            assert asked.startswith("the head of ")
            assert asked != PROMPT
            assert asked.endswith(" is")
            assert 1 <= len(answer.split()) <= 3
        assert {subject for subject, _ in written.about} == {"acme"}
        assert len(written.prefixes) == 4
        assert all(prefix.endswith(". ") for prefix in written.prefixes)

    def test_answers_are_the_models_own(self, model):
        written = write_texts(model, tokenizer(), PROMPT, "acme", count=4)
        for asked, answer in written.neighbours:
            ids = tokenizer()(asked, return_tensors="pt").input_ids
            said = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
            assert answer == " " + tokenizer().decode(said, skip_special_tokens=True).strip()

    def test_the_seed_decides_and_the_global_random_state_and_the_modes_stay(self, model):
        model = copy.deepcopy(model).train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        before = torch.random.get_rng_state()
        first, same, other = (write_texts(model, tokenizer(), PROMPT, "acme", seed=seed) for seed in (0, 0, 1))
        assert first == same
        assert first != other
        assert torch.equal(before, torch.random.get_rng_state())
        assert modes == [module.training for module in model.modules()]

    def test_padding_is_not_seen(self, model):
        """Whatever the tokenizer's side, and where it has no padding token."""
        words = tokenizer(padding_side="right", pad_token=None)
        assert write_texts(model, words, PROMPT, "acme") == write_texts(model, tokenizer(), PROMPT, "acme")
        assert words.padding_side == "right"

    def test_a_prompt_without_its_subject_has_no_neighbours(self, model):
        with pytest.warns(UserWarning, match="no neighbours .* 'acme': prompt 'it is led by' does not contain it"):
            written = write_texts(model, tokenizer(), "it is led by", "acme", count=2)
        assert written.neighbours == ()
        assert len(written.prefixes) == 2

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"prompt": " "}, "prompt must be a text, got ' '"),
            ({"prompt": f"{PROMPT} "}, "prompt must not end with a space, got 'the head of acme is '"),
            ({"subject": None}, "subject must be a text, got None"),
            ({"count": 0}, "count must be a whole number, 1 or more, got 0"),
            ({"count": True}, "count must be a whole number, 1 or more, got True"),
            ({"seed": 1.5}, "seed must be a whole number, 0 or more, got 1.5"),
        ],
    )
    def test_mistakes(self, model, changed, said):
        with pytest.raises(ValueError, match=said):
            write_texts(model, tokenizer(), **{"prompt": PROMPT, "subject": "acme", **changed})


class Scripted:
    """Says what it is told to, call after call, and keeps what it was called with."""

    def __init__(self, words, *said):
        self._words, self._said = words, list(said)
        self.prompts, self.options = [], []
        self.training = True

    def parameters(self):
        return iter([torch.zeros(1)])

    def modules(self):
        return iter([self])

    def generate(self, input_ids, attention_mask, **options):
        assert not self.training
        self.prompts.append(
            [self._words.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        )
        self.options.append(options)
        new = [self._words(text).input_ids for text in self._said.pop(0)]
        width = max(map(len, new))
        filled = torch.tensor([ids + [self._words.pad_token_id] * (width - len(ids)) for ids in new])
        return torch.cat([input_ids, filled], dim=1)


class TestScripted:
    """What is made of what the model says."""

    SAID = (
        ["milk runs .", "", "tea"],
        ["zed", "acme .", "dan", "dan .", "ana acme bo", ""],
        ["bo cy", ""],
        ["likes rain", "", "is by"],
    )

    @pytest.fixture
    def scripted(self):
        return Scripted(mini_lab.tokenizer(), *self.SAID)

    def test_texts(self, scripted):
        """No empty ones, no name twice, and none that may mean the subject."""
        written = write_texts(scripted, mini_lab.tokenizer(), PROMPT, "acme", count=3)
        assert written == WrittenTexts(
            prefixes=("The milk runs. ", "Because tea. "),
            neighbours=(("the head of zed is", " bo cy"),),
            about=(("acme", " likes rain"), ("acme", " is by")),
        )
        assert scripted.prompts[2] == ["the head of zed is", "the head of dan is"]
        assert scripted.training

    @pytest.mark.parametrize(
        ("after", "said"),
        [
            ("s of it\nand", "s of it"),
            (" of it \nand", " of it"),
            ("\n\nIt is\nand", " It is"),
            (", of it", ", of it"),
            (" half a \ufffd", ""),
            (" \n ", ""),
        ],
    )
    def test_the_first_line_with_words(self, after, said):
        """As the model puts it: a mark or the rest of a word follows without a space."""

        class Letters:
            pad_token_id, eos_token_id = 0, None

            def __call__(self, text):
                return types.SimpleNamespace(input_ids=[ord(letter) for letter in text])

            def decode(self, ids, skip_special_tokens=True):
                return "".join(map(chr, ids))

        model = Scripted(Letters(), ["milk"] * 2, ["zed"] * 4, ["tea"], [after] * 2)
        written = write_texts(model, Letters(), PROMPT, "acme", count=2)
        assert written.about == ((("acme", said),) * 2 if said else ())

    def test_is_asked_by_the_models_distribution_alone(self, scripted):
        write_texts(scripted, mini_lab.tokenizer(), PROMPT, "acme", count=3)
        assert [options["do_sample"] for options in scripted.options] == [True, True, False, True]
        for options in scripted.options:
            assert (options["num_beams"], options["repetition_penalty"], options["min_p"]) == (1, 1.0, None)

    def test_an_end_of_sequence_token_of_the_tokenizers_own_is_taken_off(self, scripted):
        words = mini_lab.tokenizer()
        words.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
        assert words("bo").input_ids[-1] == words.eos_token_id
        written = write_texts(scripted, words, PROMPT, "acme", count=3)
        assert "<eos>" not in " ".join(text for prompts in scripted.prompts for text in prompts)
        batch = EditTexts(words, PROMPT, TARGET, written).batch(0)
        assert (batch["input_ids"][0] != words.eos_token_id).all()
        assert (batch["labels"][0] != -100).sum() == 2


class TestBatch:
    def test_the_edits_own_text_comes_first_in_every_step(self):
        batch = edit_texts().batch(0)
        assert {name: values.shape for name, values in batch.items()} == dict.fromkeys(
            ("input_ids", "attention_mask", "labels", "anchor_groups"), batch["input_ids"].shape
        )
        words = tokenizer()
        ids = words(PROMPT + TARGET).input_ids
        assert batch["input_ids"][0, : len(ids)].tolist() == ids
        assert batch["labels"][0, : len(ids)].tolist() == [-100] * 5 + ids[5:]
        assert batch["anchor_groups"][0, : len(ids)].tolist() == [0, 1, 1, 1, 0, 0, 0]
        assert batch["attention_mask"].sum(dim=1)[0] == len(ids)

    def test_kinds(self):
        """A neighbour's answer and what is said of the subject stay; the target is learned behind a prefix."""
        texts = edit_texts(draw=None)
        assert texts.drawn(0) == list(range(8))
        batch = texts.batch(0)
        assert batch["anchor_groups"].max(dim=1).values.tolist() == [1, 2, 2, 3, 3, 3, 0, 0]
        assert batch["anchor_groups"][1].tolist()[:8] == [0, 0, 0, 0, 2, 2, 2, 0]
        assert (batch["labels"] != -100).sum(dim=1).tolist() == [2, 0, 0, 0, 0, 0, 2, 2]
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()

    def test_a_step_draws_of_each_kind_anew(self):
        drawn = [edit_texts().drawn(step) for step in range(20)]
        assert all(rows[0] == 0 and len(rows) == 4 for rows in drawn)
        assert [{rows[place] for rows in drawn} for place in (1, 2, 3)] == [{1, 2}, {3, 4, 5}, {6, 7}]
        assert edit_texts(draw=5).drawn(0) == list(range(8))

    def test_alone(self):
        assert EditTexts(tokenizer(), PROMPT, TARGET).batch(3)["input_ids"].shape == (1, 7)

    def test_a_text_that_tokenises_otherwise_is_left_out(self):
        written = WrittenTexts(prefixes=("",), neighbours=((PROMPT, ""),), about=(("acme", "runs"),))
        assert len(EditTexts(tokenizer(), PROMPT, TARGET, written).rows) == 2

    def test_a_target_that_does_not_continue_its_prompt(self):
        with pytest.raises(ValueError, match="target must begin with a space after prompt 'the head of acme is'"):
            EditTexts(tokenizer(), PROMPT, "bo")
        with pytest.raises(ValueError, match=r"'\. cy' does not continue prompt 'the head of acme is' token by token"):
            EditTexts(tokenizer(), PROMPT, ". cy")

    @pytest.mark.parametrize("changed", [{"prompt": ""}, {"prompt": None}, {"target": " "}, {"target": 3}])
    def test_no_text(self, changed):
        (name,) = changed
        with pytest.raises(ValueError, match=f"{name} must be a text, got"):
            EditTexts(tokenizer(), **{"prompt": PROMPT, "target": TARGET, **changed})

    def test_without_a_bos_the_first_token_counts(self):
        batch = EditTexts(mini_lab.tokenizer(), PROMPT, TARGET).batch(0)
        assert batch["anchor_groups"][0].tolist() == [1, 1, 1, 1, 0, 0, 0]

    def test_on_a_device(self):
        assert {values.device.type for values in edit_texts().batch(0, "meta").values()} == {"meta"}

    def test_kinds_are_drawn_independently(self):
        """Of two kinds with as many texts a step does not always take the same places."""
        written = WrittenTexts(neighbours=WRITTEN.neighbours, prefixes=WRITTEN.prefixes)
        drawn = [EditTexts(tokenizer(), PROMPT, TARGET, written).drawn(step) for step in range(20)]
        assert len({(rows[1], rows[2] - 2) for rows in drawn}) == 4

    @pytest.mark.parametrize("draw", [0, -1, True, 1.0])
    def test_draw(self, draw):
        with pytest.raises(
            ValueError, match=f"draw must be a whole number, 1 or more, or None for all texts, got {draw}"
        ):
            edit_texts(draw=draw)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral", "gemma3", "gpt2"])
def test_an_attached_model_trains_on_them(arch):
    """The loss is the core's with three groups; after some steps the target is said, and the rest has moved less."""
    model = mini_lab.random_model(arch)
    unedited = copy.deepcopy(model)
    modules = ["c_attn", "c_fc"] if arch == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=modules, fan_in_fan_out=arch == "gpt2"))
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    texts = edit_texts()
    config = OverToneConfig.preset("lora", anchor=1.0)
    with attach(model, config, reference="adapter"):
        for step in range(60):
            batch = texts.batch(step)
            optimizer.zero_grad()
            loss = model(**batch).loss
            if step == 30:
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                with torch.no_grad():
                    before, now = unedited(**inputs).logits, model(**inputs).logits
                anchors = [Anchors.record(before, batch["anchor_groups"] == group) for group in (1, 2, 3)]
                labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
                expected = overtone_loss(now, labels, anchors=anchors, **config.as_kwargs())
                torch.testing.assert_close(loss.detach(), expected)
            loss.backward()
            optimizer.step()
    ids = tokenizer()(PROMPT + TARGET, return_tensors="pt").input_ids
    assert model(input_ids=ids).logits[0, 4:6].argmax(-1).tolist() == ids[0, 5:].tolist()
