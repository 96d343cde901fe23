"""What the adapters know of EasyEdit's trainers: where each computes its loss, and when it would not use ours."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from overtone.easyedit.hparams import KEY, Choice, announce, choose
from overtone.easyedit.patching import Patches
from overtone.token_loss import EditLoss

MODELS = "easyeditor.models"


class SeamError(RuntimeError):
    """EasyEdit's code is not where, or not what, an adapter was written for."""


@dataclass(frozen=True)
class Trainer:
    """One of EasyEdit's trainers and the way into it.

    Attributes:
        name: as in ALG_DICT and in the yaml's alg_name, where the trainer has one.
        preset: whose values of the paper it takes.
        module: where its loss is computed.
        hparams_class: the class whose loader reads its yaml files, in the trainer's package.
        way_in: how its loss is replaced, for people.
        problem: what is wrong with the seam, given the imported module, or None.
        hook: replaces what has to be replaced, given this trainer, the imported module and where to note it.
        optional: not in every EasyEdit of the supported range.
        takes_anchor: whether it shows the prompt's own tokens to its loss.
    """

    name: str
    preset: str
    module: str
    hparams_class: str
    way_in: str
    problem: Callable[[ModuleType], str | None]
    hook: Callable[[Trainer, ModuleType, Patches], None]
    optional: bool = False
    takes_anchor: bool = True

    def choose(self, value: object) -> Choice:
        """What a value of `token_loss` asks of it; errors as of `overtone.easyedit.hparams.choose`."""
        return choose(value, self.preset, takes_anchor=self.takes_anchor)

    def choice_of(self, hparams: Any) -> Choice | None:
        """What the hparams of an edit ask for; None without the key. Each different choice is logged once.

        Raises:
            ValueError, TypeError: as of `choose`.
        """
        value = getattr(hparams, KEY, None)
        if value is None:
            return None
        choice = self.choose(value)
        announce(f"{self.name}: minimises {choice.loss.description if choice.loss else 'its own cross-entropy'}")
        return choice

    def loss_of(self, hparams: Any, model: Any) -> EditLoss | None:
        """The loss that the hparams of an edit ask for; None where the trainer is to run as it is.

        Raises:
            ValueError, TypeError: for a token loss that cannot be used, or an encoder-decoder model.
        """
        choice = self.choice_of(hparams)
        if choice is None or choice.loss is None:
            return None
        refuse_encoder_decoder(model, hparams)
        return choice.loss

    def load(self) -> ModuleType:
        """The trainer's module; the package attribute of that name may be something else."""
        return importlib.import_module(f"{MODELS}.{self.module}")

    def seam_problem(self) -> str | None:
        """What is wrong with the seam in the EasyEdit at hand, or None."""
        try:
            module = self.load()
        except ModuleNotFoundError as error:
            return (
                f"{error.name} is missing" if (error.name or "").startswith("easyeditor") else f"import fails: {error}"
            )
        return self.problem(module)


def lacks(owner: Any, names: Iterable[str]) -> str | None:
    """The first of the names that the module or class does not define."""
    for name in names:
        if not hasattr(owner, name):
            return f"{owner.__name__} has no {name}"
    return None


def lacks_arguments(function: Callable[..., Any], names: Iterable[str]) -> str | None:
    """The first of the names that is no argument of the function."""
    arguments = inspect.signature(inspect.unwrap(function)).parameters
    for name in names:
        if name not in arguments:
            return f"{function.__qualname__} has no argument {name}"
    return None


def does_not_use(function: Callable[..., Any], name: str) -> str | None:
    """Whether the function's code never mentions the global or attribute."""
    if name not in inspect.unwrap(function).__code__.co_names:
        return f"{function.__qualname__} does not use {name}"
    return None


def wrap(patches: Patches, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace ``owner.name``, wherever it was imported to, by a call of ``around(original, *args, **kwargs)``."""
    original = vars(owner)[name]

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    if isinstance(owner, ModuleType):
        patches.everywhere("easyeditor", name, wrapper, original)
    else:
        patches.attribute(owner, name, wrapper)


def arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    """The values that a call of the function gives to some of its arguments."""
    bound = inspect.signature(function).bind(*args, **kwargs).arguments
    return [bound[name] for name in names]


def refuse_encoder_decoder(model: Any, hparams: Any) -> None:
    """Raise a ValueError for T5: its trainers and models compute the loss on a path of their own."""
    name = getattr(hparams, "model_name", "")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or "t5" in str(name).lower():
        raise ValueError(
            f"token_loss is not used for encoder-decoder models (model_name {name!r}): edit a causal language model, "
            "or leave token_loss out"
        )
