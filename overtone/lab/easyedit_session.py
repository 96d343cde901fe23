"""EasyEdit's own trainers as editing sessions of the lab: FT-M, LoRA, MELO, WISE, ROME and MEMIT.

A session edits a copy of the workplace's model. The copy shares every weight that the method leaves alone, so the model
itself is never changed and the copy costs little more than the weights that are edited.
"""

from __future__ import annotations

import copy
import logging
import random
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor

from overtone.easyedit.patching import Patches
from overtone.lab import easyedit_process as process
from overtone.lab.easyedit_hparams import edited_weights, hparams_values, make_hparams, most_steps
from overtone.lab.easyedit_losses import PRESETS, token_loss
from overtone.lab.easyedit_rows import RowByRow
from overtone.lab.easyedit_state import UnknownStateError, put_together, take_apart
from overtone.lab.easyedit_statistics import second_moment
from overtone.lab.editors import FitTrace
from overtone.lab.losses import NamedLoss
from overtone.lab.registry import look_up
from overtone.lab.sessions import edited_pairs
from overtone.lab.world import Edit

if TYPE_CHECKING:
    from overtone.lab.experiment import Workplace


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Algorithm:
    """What is particular to one of EasyEdit's methods.

    Attributes:
        name: the key in `ALGORITHMS`.
        alg_name: EasyEdit's name.
        edits_in_place: it changes weights of the model, rather than adding modules to it.
        takes_batches: several prompts of one edit go into one call.
        decides_by_batch: at inference it treats all texts of a batch alike.
        needs_texts: it needs texts that the model knows.
    """

    name: str
    alg_name: str
    edits_in_place: bool = False
    takes_batches: bool = False
    decides_by_batch: bool = False
    needs_texts: bool = False


ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("easyedit-ft", "FT", edits_in_place=True, takes_batches=True),
        Algorithm("easyedit-lora", "LoRA", takes_batches=True),
        Algorithm("easyedit-melo", "MELO", decides_by_batch=True),
        Algorithm("easyedit-wise", "WISE", decides_by_batch=True, needs_texts=True),
        Algorithm("rome", "ROME", edits_in_place=True, needs_texts=True),
        Algorithm("memit", "MEMIT", edits_in_place=True, takes_batches=True, needs_texts=True),
    )
}


def unsupported(method: str, loss: NamedLoss) -> str | None:
    """Why a method of `ALGORITHMS` cannot minimise a loss, or None; EasyEdit need not be there."""
    try:
        token_loss(ALGORITHMS[method].alg_name, loss)
    except ValueError as error:
        return str(error)
    return None


_EDITS_MADE, _HPARAMS = "edits made", "hparams"
"""In a state: the random numbers of an edit follow from how many there were before it, and the layers from hparams."""


@contextmanager
def open_easyedit_session(
    workplace: Workplace, method: str, seed: int, texts: Sequence[str] = ()
) -> Iterator[EasyEditSession]:
    """Edit the workplace's model with one of EasyEdit's methods; afterwards it is as before, bit for bit.

    Args:
        workplace: with the model.
        method: one of `ALGORITHMS`.
        seed: of random initial weights and of the prefixes that ROME and MEMIT generate.
        texts: what the model knows. ROME and MEMIT take their statistics from them, WISE its unrelated prompts; the
            other methods do without.

    Raises:
        ValueError: an unknown method, EasyEdit is not there, texts are missing, or the model is built in a way that
            EasyEdit's methods do not know.
    """
    (algorithm,) = look_up(ALGORITHMS, "method", [method])
    if algorithm.needs_texts and not texts:
        raise ValueError(f"texts must hold what the model knows for method {method!r}, got {texts!r}")
    if missing := process.missing():
        raise ValueError(f"method {method!r} needs EasyEdit: {missing}")
    process.import_quietly()
    trainer = algorithm.alg_name if algorithm.alg_name in PRESETS else None
    with (
        process.apart(trainer) as patches,
        tempfile.TemporaryDirectory() as folder,
        _gradients_as_before(workplace.model),
    ):
        workplace.tokenizer.save_pretrained(folder)
        hparams = make_hparams(algorithm.alg_name, workplace.model, Path(folder))
        if algorithm.alg_name in ("ROME", "MEMIT"):
            _answer_for_statistics(patches, workplace, texts)
        session = EasyEditSession(algorithm, workplace, hparams, seed, texts)
        try:
            yield session
        finally:
            session.close()


class EasyEditSession:
    """One of EasyEdit's methods on a copy of a model, edit after edit."""

    def __init__(
        self, algorithm: Algorithm, workplace: Workplace, hparams: Any, seed: int, texts: Sequence[str]
    ) -> None:
        """Use `open_easyedit_session`."""
        self._algorithm = algorithm
        self._clean = workplace.model
        self._hparams = hparams
        self._seed = seed
        self._texts = texts
        self._names = edited_weights(hparams) if algorithm.edits_in_place else []
        self._shared = frozenset(map(id, workplace.model.parameters()))
        # As EasyEdit's editor sets it.
        self._tokenizer = copy.deepcopy(workplace.tokenizer)
        self._tokenizer.padding_side = "right" if algorithm.alg_name in ("ROME", "MEMIT") else "left"
        self._apply = process.module("util.alg_dict").ALG_DICT[algorithm.alg_name]
        self._begin()

    def _begin(self) -> None:
        """Nothing is edited yet."""
        self._edits_made = 0
        self._copy = _sharing_copy(self._clean, self._names)
        # EasyEdit finds a model's family, and its statistics, under this name, which is otherwise a path.
        self._copy.config._name_or_path = self._copy.name_or_path = self._hparams.model_name
        self._use_cache = self._copy.config.use_cache
        self._editable: Any = self._copy
        self._generate_prefixes()

    @property
    def model(self) -> Any:
        """The edited model, for scoring."""
        return RowByRow(self._copy) if self._algorithm.decides_by_batch else self._copy

    def apply(self, edit: Edit, loss: NamedLoss, observe: Callable[[int], None] | None = None) -> FitTrace:
        """Make one more edit.

        Args:
            edit: what to say; its further pairs go into the same call where the method takes batches, and into calls
                of their own where it does not.
            loss: what is minimised.
            observe: must be None.

        Returns:
            How it went, without the losses, which EasyEdit keeps to itself. "held" says that the loss asked for no
            further change, "stopped" that early stopping or a rule of the method's own ended the edit.

        Raises:
            ValueError: the method cannot minimise the loss or has no place for the subject; observe is given.
        """
        if observe is not None:
            raise ValueError("observe must be None: EasyEdit's loops cannot be watched step by step")
        requests = self._requests(edit)
        calls = [requests] if self._algorithm.takes_batches else [[request] for request in requests]
        hparams = copy.copy(self._hparams)
        hparams.batch_size = len(calls[0])
        if self._algorithm.alg_name == "WISE":
            hparams.sequential_edit = True  # else WISE drops what was edited before
        choice = token_loss(self._algorithm.alg_name, loss)
        if choice is not None:
            hparams.token_loss = choice
        with process.seeded(self._seed_now()), process.silenced(), process.counted_steps() as steps:
            start = time.perf_counter()
            for call in calls:
                self._call(call, hparams)
            seconds = time.perf_counter() - start
        self._edits_made += 1
        self._copy.eval()
        self._copy.config.use_cache = self._use_cache
        return FitTrace((), steps[0], self._ended(steps[0], len(calls), loss), seconds)

    def state(self) -> dict[str, Any] | None:
        """What the edits left, by which hparams, and how many there were; None where that is no plain data."""
        try:
            left = take_apart(self._copy, self._shared)
        except UnknownStateError as error:
            if self._edits_made == 1:
                logger.warning("a killed sequence of %s would start anew: %s", self._algorithm.name, error)
            return None
        return {_EDITS_MADE: self._edits_made, _HPARAMS: self._hparams_values, **left}

    @cached_property
    def _hparams_values(self) -> dict[str, Any]:
        """Without the folder of the tokenizer, which is another one in each session."""
        return hparams_values(self._algorithm.alg_name, self._clean, Path("tokenizer"))

    def restore(self, state: Mapping[str, Any], edit: Edit, loss: NamedLoss) -> None:
        """Go on from a state; see `Session`."""
        if state[_HPARAMS] != self._hparams_values:
            raise ValueError(f"state must be made with hparams {self._hparams_values}, got {state[_HPARAMS]}")
        try:
            if not self._algorithm.edits_in_place:
                self.apply(edit, loss)  # adds the layers; what is in them is of the state
            put_together(self._copy, self._shared, state)
            self._edits_made = int(state[_EDITS_MADE])
        except Exception:
            process.set_state(process.fresh_state())
            self._begin()
            raise

    def close(self) -> None:
        """Let go of the models."""
        self._clean = self._editable = self._copy = None

    def _call(self, requests: list[dict[str, Any]], hparams: Any) -> None:
        edited, _ = self._apply(
            self._editable, self._tokenizer, requests, hparams, copy=False, keep_original_weight=False
        )
        if self._algorithm.alg_name == "MELO":
            self._editable = edited  # MELO's edits are in its wrapper; the others find theirs in the model

    def _requests(self, edit: Edit) -> list[dict[str, Any]]:
        return [self._request(edit, prompt, target) for prompt, target in edited_pairs(edit)]

    def _request(self, edit: Edit, prompt: str, target: str) -> dict[str, Any]:
        request = {"prompt": prompt, "target_new": target.strip(), "subject": edit.subject, "case_id": 0}
        if self._algorithm.alg_name in ("ROME", "MEMIT"):
            if edit.subject not in prompt:
                raise ValueError(
                    f"{self._algorithm.name} edits at the subject, but {edit.subject!r} does not stand in the prompt "
                    f"{prompt!r}"
                )
            request["prompt"] = prompt.replace(edit.subject, "{}", 1)
        if self._algorithm.alg_name == "WISE":
            request["loc_prompt"] = self._unrelated(edit, f"{prompt}{target}")
        return request

    def _unrelated(self, edit: Edit, text: str) -> str:
        """The beginning of a known text that has nothing to do with the edit.

        It is shorter than the edit: WISE pads the two to one length, and lets the padding of a shorter edit into its
        loss.
        """
        length = len(self._tokenizer(text).input_ids)
        probes = (*edit.generality, *edit.portability, *edit.locality)
        taboo = {edit.subject, edit.target_new.strip(), edit.target_old.strip(), *(probe.prompt for probe in probes)}
        # As many tries as it takes, of as many texts as there are, always in the same order.
        for known in random.Random(f"{self._seed} {text}").sample(self._texts, len(self._texts)):
            words = [] if any(told in known for told in taboo) else known.split()
            while words and len(self._tokenizer(" ".join(words)).input_ids) >= length:
                words.pop()
            if words:
                return " ".join(words)
        raise ValueError(f"texts hold nothing unrelated to {edit.prompt!r}, which WISE needs one of")

    def _ended(self, steps: int, calls: int, loss: NamedLoss) -> str:
        if steps >= calls * most_steps(self._hparams):
            return "steps"
        config = None if loss.overtone is None else loss.config(PRESETS[self._algorithm.alg_name])
        return "stopped" if config is None or config.hold_settled is False else "held"

    def _seed_now(self) -> int:
        return zlib.crc32(f"{self._seed} {self._edits_made}".encode())

    def _generate_prefixes(self) -> None:
        """From the unedited model, so that a sequence that goes on after a restart finds the same ones."""
        name = self._algorithm.alg_name.lower()
        if name not in ("rome", "memit"):
            return
        main = process.module(f"models.{name}.{name}_main")
        lengths = (self._hparams.context_template_length_params,) if name == "rome" else ()
        with process.seeded(self._seed_now()), process.silenced():
            main.get_context_templates(self._copy, self._tokenizer, *lengths)


def _sharing_copy(model: Any, own: Sequence[str]) -> Any:
    """A copy of a model with weights of its own under these names, and the model's under all others."""
    shared = {id(parameter): parameter for name, parameter in model.named_parameters() if name not in own}
    return copy.deepcopy(model, shared)


@contextmanager
def _gradients_as_before(model: Any) -> Iterator[None]:
    """EasyEdit freezes the weights that it leaves alone, which the copy shares with the model."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None


@dataclass
class _Statistics:
    """One model's, kept as long as its workplace: every single edit opens a session."""

    moments: dict[str, Tensor]
    rome: dict[Any, Tensor]
    memit: dict[Any, Tensor]


_statistics: WeakKeyDictionary[Workplace, _Statistics] = WeakKeyDictionary()


def _answer_for_statistics(patches: Patches, workplace: Workplace, texts: Sequence[str]) -> None:
    """Let ROME and MEMIT ask for the second moments on these texts, where they would compute them on Wikipedia."""
    known = _statistics.setdefault(workplace, _Statistics({}, {}, {}))

    def layer_stats(model: Any, tok: Any, layer_name: str, *_: Any, **__: Any) -> Any:
        if layer_name not in known.moments:
            known.moments[layer_name] = second_moment(workplace.model, workplace.tokenizer, layer_name, texts)
        return SimpleNamespace(mom2=SimpleNamespace(moment=lambda: known.moments[layer_name]))

    rome, memit = process.module("models.rome.compute_u"), process.module("models.memit.memit_main")
    patches.attribute(rome, "layer_stats", layer_stats)
    patches.attribute(memit, "layer_stats", layer_stats)
    patches.attribute(rome, "inv_mom2_cache", known.rome)
    patches.attribute(memit, "COV_CACHE", known.memit)
