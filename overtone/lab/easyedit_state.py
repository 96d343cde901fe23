"""What edits have left in a model and in EasyEdit's modules, as plain data.

The data holds tensors, numbers, texts and containers only, so that a file of it can be read without trusting whoever
wrote it. Objects are taken apart into their attributes, and only those of a few classes are ever put together again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from overtone.lab import easyedit_process as process

_PACKAGE = "easyeditor."
_MELO = f"{_PACKAGE}models.melo.peft_egg.src.peft.tuners.melo"
_OBJECTS = (f"{_PACKAGE}models.wise.utils.EditingMeanAct", f"{_MELO}.VecDB", f"{_MELO}.mem_point")
"""EasyEdit's classes whose attributes are nothing but data."""

_OBJECT = "object of EasyEdit"
"""The first of the three entries that stand for an object; the others are its class and its attributes."""

_NOT_KEPT = {"config", "device", "original_layer", "original_layer_output", "new_weight_layer_output"}
"""What EasyEdit's layers hold the same after every edit, or write before they read it."""


class UnknownStateError(ValueError):
    """Something that is no data, or data that does not fit."""


def take_apart(model: Any, shared: frozenset[int]) -> dict[str, Any]:
    """What there is beyond the clean model.

    Args:
        model: the edited one.
        shared: ids of the parameters that it shares with the clean one.

    Raises:
        UnknownStateError: something is not made of tensors, numbers, texts and containers.
    """
    return {
        "weights": {name: _encoded(weight) for name, weight in _own_weights(model, shared).items()},
        "layers": {name: _encoded(_data_of(layer)) for name, layer in _layers(model).items()},
        "process": {name: _encoded(values) for name, values in process.state().items()},
    }


def put_together(model: Any, shared: frozenset[int], state: Mapping[str, Any]) -> None:
    """Put the model, and EasyEdit's modules, where `take_apart` found them.

    Args:
        model: the clean one with the layers that the method adds, on which any edit was made.
        shared: ids of the parameters that it shares with the clean one.
        state: from `take_apart`.

    Raises:
        UnknownStateError: the state is not of such a model; nothing of it is in place.
        LookupError, TypeError, AttributeError, ValueError: it is no state; some of it may be in place.
    """
    weights = {name: _decoded(weight) for name, weight in state["weights"].items()}
    layers = {name: _decoded(data) for name, data in state["layers"].items()}
    _check_weights(_own_weights(model, shared), weights)
    there = _layers(model)
    _check_names("layers", there, layers)
    for name, layer in there.items():
        _check_names(f"attributes of {name}", _data_of(layer), layers[name])
    process.set_state({name: _decoded(values) for name, values in state["process"].items()})
    for name, weight in weights.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, weight)
    for name, data in layers.items():
        vars(there[name]).update(data)


def _check_weights(expected: Mapping[str, nn.Parameter], found: Mapping[str, Any]) -> None:
    _check_names("weights", expected, found)
    for name, weight in expected.items():
        other = found[name]
        if not isinstance(other, nn.Parameter) or (other.shape, other.dtype) != (weight.shape, weight.dtype):
            raise UnknownStateError(f"state must hold a weight {tuple(weight.shape)}, {weight.dtype}, as {name}")


def _check_names(what: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    if expected.keys() != found.keys():
        raise UnknownStateError(f"state must hold the {what} {list(expected)}, got {list(found)}")


def _own_weights(model: Any, shared: frozenset[int]) -> dict[str, nn.Parameter]:
    return {
        name: weight
        for name, weight in model.named_parameters()
        if id(weight) not in shared and not _NOT_KEPT & set(name.split("."))
    }


def _layers(model: Any) -> dict[str, nn.Module]:
    """The layers of EasyEdit's own making, by name."""
    return {name: module for name, module in model.named_modules() if type(module).__module__.startswith(_PACKAGE)}


def _data_of(layer: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if name[0] != "_" and name not in _NOT_KEPT}


def _encoded(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return type(value)(map(_encoded, value))
    if isinstance(value, dict):
        return {key: _encoded(kept) for key, kept in value.items()}
    name = f"{type(value).__module__}.{type(value).__name__}"
    if name in _OBJECTS:
        return _OBJECT, name, _encoded(vars(value))
    raise UnknownStateError(f"a {name} is no data")


def _decoded(value: Any) -> Any:
    if isinstance(value, tuple) and value[:1] == (_OBJECT,):
        _, name, attributes = value
        if name not in _OBJECTS:
            raise UnknownStateError(f"state must hold objects of {_OBJECTS}, got {name!r}")
        path, _, class_name = name.removeprefix(_PACKAGE).rpartition(".")
        decoded: Any = object.__new__(getattr(process.module(path), class_name))
        vars(decoded).update(_decoded(attributes))
        return decoded
    if isinstance(value, list | tuple):
        return type(value)(map(_decoded, value))
    if isinstance(value, dict):
        return {key: _decoded(kept) for key, kept in value.items()}
    return _encoded(value)  # a copy: the state can be put in place twice
