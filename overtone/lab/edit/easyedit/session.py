"""EasyEdit's own trainers as editing sessions of the lab: FT-M, LoRA, MELO, WISE, ROME and MEMIT.

A session edits a copy of the workplace's model. The copy shares every weight that the method leaves alone, so the model
itself is never changed and the copy costs little more than the weights that are edited.
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from overtone.lab.data.edit import Edit
from overtone.lab.edit.easyedit import process
from overtone.lab.edit.easyedit.algorithms import ALGORITHMS, Algorithm, require_easyedit
from overtone.lab.edit.easyedit.hparams import edited_weights, make_hparams, most_steps
from overtone.lab.edit.easyedit.losses import OVERTONE_METHODS, hparams_token_loss
from overtone.lab.edit.easyedit.rows import RowByRow
from overtone.lab.edit.easyedit.statistics import answer_for_statistics
from overtone.lab.edit.fit import FitTrace
from overtone.lab.model.workplace import Workplace
from overtone.lab.registry import look_up
from overtone.token_loss import LossSpec


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
    require_easyedit(method)
    process.import_quietly()
    trainer = algorithm.alg_name if algorithm.alg_name in OVERTONE_METHODS else None
    with (
        process.apart(trainer) as patches,
        tempfile.TemporaryDirectory() as folder,
        _gradients_as_before(workplace.model),
    ):
        workplace.tokenizer.save_pretrained(folder)
        hparams = make_hparams(algorithm.alg_name, workplace.model, Path(folder))
        if algorithm.alg_name in ("ROME", "MEMIT"):
            answer_for_statistics(patches, workplace, texts)
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
        self._hparams = hparams
        self._seed = seed
        self._texts = texts
        # As EasyEdit's editor sets it.
        self._tokenizer = copy.deepcopy(workplace.tokenizer)
        self._tokenizer.padding_side = "right" if algorithm.alg_name in ("ROME", "MEMIT") else "left"
        self._apply = process.module("util.alg_dict").ALG_DICT[algorithm.alg_name]
        self._edits_made = 0
        own = edited_weights(hparams) if algorithm.edits_in_place else []
        self._copy = _sharing_copy(workplace.model, own)
        # EasyEdit finds a model's family, and its statistics, under this name, which is otherwise a path.
        self._copy.config._name_or_path = self._copy.name_or_path = self._hparams.model_name
        self._use_cache = self._copy.config.use_cache
        self._editable: Any = self._copy
        self._generate_prefixes()

    @property
    def model(self) -> Any:
        """The edited model, for scoring."""
        return RowByRow(self._copy) if self._algorithm.decides_by_batch else self._copy

    def apply(self, edit: Edit, loss: LossSpec, observe: Callable[[int], None] | None = None) -> FitTrace:
        """Make one more edit.

        Args:
            edit: what to say; its further pairs go into the same call where the method takes batches, and into calls
                of their own where it does not.
            loss: what is minimised.
            observe: must be None.

        Returns:
            How it went, without the losses, which EasyEdit keeps to itself. "held" says that the loss asked for no
            further change, "stopped" that a rule of the method's own ended the edit.

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
        choice = hparams_token_loss(self._algorithm.alg_name, loss)
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

    def close(self) -> None:
        """Let go of the models."""
        self._editable = self._copy = None

    def _call(self, requests: list[dict[str, Any]], hparams: Any) -> None:
        edited, _ = self._apply(
            self._editable, self._tokenizer, requests, hparams, copy=False, keep_original_weight=False
        )
        if self._algorithm.alg_name == "MELO":
            self._editable = edited  # MELO's edits are in its wrapper; the others find theirs in the model

    def _requests(self, edit: Edit) -> list[dict[str, Any]]:
        return [self._request(edit, prompt, target) for prompt, target in edit.pairs]

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

    def _ended(self, steps: int, calls: int, loss: LossSpec) -> str:
        if steps >= calls * most_steps(self._hparams):
            return "steps"
        method = OVERTONE_METHODS.get(self._algorithm.alg_name)
        return "held" if method is not None and loss.build(method).hold else "stopped"

    def _seed_now(self) -> int:
        return zlib.crc32(f"{self._seed} {self._edits_made}".encode())

    def _generate_prefixes(self) -> None:
        """The texts that ROME and MEMIT put before a prompt, from the unedited model."""
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
