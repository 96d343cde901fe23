"""What `hparams.token_loss` has to say for one of EasyEdit's methods to minimise a loss."""

from __future__ import annotations

from typing import Any

from overtone.token_loss import LossSpec

OVERTONE_METHODS = {"FT": "ft-m", "LoRA": "lora", "MELO": "melo", "WISE": "wise"}
"""EasyEdit's name of each method whose loss can be replaced, and whose values of the paper it takes."""


def hparams_token_loss(alg_name: str, loss: LossSpec) -> dict[str, Any] | None:
    """The value of the key.

    A loss with a hold changes nothing any more once it is held: FT-M then ends as it does of itself, LoRA and MELO go
    on without effect, and WISE still follows its activation loss.

    Args:
        alg_name: EasyEdit's name of the method.
        loss: from `overtone.token_loss.parse`.

    Returns:
        None for the method's own cross-entropy.

    Raises:
        ValueError: EasyEdit's method cannot minimise this loss; the message says why.
    """
    if loss.name == "cross_entropy":
        return None
    if alg_name not in OVERTONE_METHODS:
        raise ValueError(
            f"{alg_name} cannot minimise {loss.name!r}: it optimises its value vector by a cross-entropy of its own; "
            "use the loss cross_entropy for it"
        )
    if not loss.is_dynamic:
        raise ValueError(
            f"{alg_name} cannot minimise {loss.name!r}: EasyEdit's trainers keep no logits from before the edit"
        )
    # The adapters hold OverTone by default; a spec without a hold means none.
    unheld = {"hold": None} if loss.kind == "overtone" else {}
    return {"name": loss.kind, **unheld, **loss.fields}
