"""The known ways in which an EasyEdit hparams file spoils an edit or a comparison, each with its mend.

Found by running and reading EasyEdit; every check reads the file alone, and the installed versions where they matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from overtone.easyedit.hparams import KEY
from overtone.easyedit.methods import BY_NAME
from overtone.easyedit.traps import any_method, ft, lora, melo, vstar, wise
from overtone.easyedit.traps.loss import token_loss
from overtone.easyedit.traps.trap import Config, Trap
from overtone.easyedit.vstar import VSTAR

__all__ = ["Trap", "traps"]

_CHECKS: Mapping[str, tuple[Callable[[Config], Iterator[Trap]], ...]] = {
    **{trainer.name: vstar.CHECKS for trainer in VSTAR},
    **dict.fromkeys(("MEMIT", "MEMIT-FE", "CORE", "EAMET"), vstar.LAYER_CHECKS),
    "EMMET": vstar.EMMET_CHECKS,
    "AlphaEdit": vstar.ALPHAEDIT_CHECKS,
    "SPHERE": vstar.SPHERE_CHECKS,
    "FT": ft.CHECKS,
    "LoRA": lora.CHECKS,
    "QLoRA": lora.QLORA_CHECKS,
    "MELO": melo.CHECKS,
    "WISE": wise.CHECKS,
}


def traps(config: Config, hparams_class: type | None = None) -> list[Trap]:
    """The traps that a file would fall into.

    Args:
        config: the file's content.
        hparams_class: the class that will load it, where known; its fields are checked then.
    """
    method = str(config.get("alg_name"))
    if method not in BY_NAME:
        return [Trap(f"alg_name is {method!r}", f"the adapters know {', '.join(BY_NAME)}", fatal=KEY in config)]
    found = [*any_method.model(config), *token_loss(config), *any_method.single_edits(config)]
    for check in _CHECKS.get(method, ()):
        found.extend(check(config))
    if hparams_class is not None:
        found.extend(any_method.hparams_fields(config, hparams_class))
    return [*found, *any_method.evaluation(config)]
