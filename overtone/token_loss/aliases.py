"""Spellings of before, which results and files carry: they mean what they meant."""

from __future__ import annotations

import warnings
from typing import Any

from overtone.hold import HoldValue
from overtone.old_hold_names import OLD_NAMES, replace_old_names


def modernise(name: str, fields: dict[str, Any], hold: HoldValue) -> tuple[str, dict[str, Any]]:
    """The name and the fields in the words of today, still unjudged.

    `early_stopping:stop_below=x` is cross_entropy held at x, `overtone_held` is overtone held once settled,
    label_smoothing's field had the loss's name, and a hold was two fields, hold_settled and hold_correct, for which
    there is a DeprecationWarning.

    Args:
        name: as it was read.
        fields: as they were read.
        hold: of overtone where the fields do not say.
    """
    fields = dict(fields)
    if name == "early_stopping":
        name, fields = "cross_entropy", {"hold": fields.pop("stop_below", 0.1), **fields}
    if name == "label_smoothing" and name in fields:
        fields["smoothing"] = fields.pop(name)
    if name == "overtone_held":
        name, hold = "overtone", "settled"
    old = {key: fields.pop(key) for key in OLD_NAMES if key in fields}
    if old:
        if "hold" in fields:
            raise ValueError(f"hold and {next(iter(old))} are both given: keep hold alone")
        warnings.warn(
            "hold_settled and hold_correct are now one field: hold=settled, hold=0.2 or hold=correct,0.2",
            DeprecationWarning,
            stacklevel=4,
        )
        fields["hold"] = replace_old_names(hold, old)
    if name == "overtone":
        fields.setdefault("hold", hold)
    return name, fields
