"""Traps of the token loss itself, with the rule by which a trainer stops."""

from __future__ import annotations

from collections.abc import Iterator

from overtone.easyedit.hparams import KEY
from overtone.easyedit.methods import BY_NAME
from overtone.easyedit.traps.trap import Config, Trap
from overtone.easyedit.vstar import VSTAR
from overtone.token_loss.grammar import read


def token_loss(config: Config) -> Iterator[Trap]:
    """A value that cannot be used, and a loss that the trainer's own stop does not fit."""
    if config.get(KEY) is None:
        return
    method = config["alg_name"]
    try:
        loss = BY_NAME[method].choose(config[KEY]).loss
    except (TypeError, ValueError) as error:
        yield Trap(str(error), f"mend {KEY}", fatal=True)
        return
    if loss is None:
        return
    if method == "FT" and not callable(config[KEY]) and (name := read(config[KEY])[0]) in ("dft", "eaft"):
        yield Trap(
            f"{name} is near 0 where the target is improbable, and FT-M takes no step below a mean loss of 1e-2",
            "another method for it, or another loss",
        )
    if loss.hold:
        return
    floor = loss.epsilon + loss.anchor * loss.anchor_epsilon
    end = "leave hold out" if loss.epsilon > 0 else "give a mean loss at which to hold, hold: 0.01 say"
    if method != "WISE" and loss.epsilon > 0:
        yield Trap(
            "hold is false: Adam goes on moving every weight on the zero gradients of settled tokens",
            "leave hold out, or give a mean loss at which to hold",
        )
    if method == "FT" and floor >= 1e-2:
        yield Trap(
            f"FT-M stops below a mean loss of 1e-2, at or below the loss's floor of {floor:g}, so all steps run",
            f"{end}: a held step reports 0, which ends the edit",
        )
    if BY_NAME[method] in VSTAR and floor >= 0.05:
        yield Trap(
            f"{method} stops below a total of 0.05, at or below the loss's floor of {floor:g}, so all steps run",
            "leave hold out: a held step ends the edit",
        )
    if method == "WISE" and floor > 0.02:
        yield Trap(
            f"WISE stops at a total loss of 0.02, below the loss's floor of {floor:g}, so all n_iter run",
            f"{end}: a held step reports 0, which lets the stop fire",
        )
