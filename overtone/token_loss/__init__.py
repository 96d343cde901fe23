"""Losses of single tokens under the names that command lines, hparams and results use; one grammar for all of them.

    spec = parse("overtone:lam=0.5+hold=0.2")                    # or {"name": "overtone", "lam": 0.5, "hold": 0.2}
    spec.name                                                    # the canonical spelling, as results carry it
    spec.title                                                   # what tables and figures say
    loss = spec.build("lora")                                    # for one edit; fields left out come from the method
    values, held = loss(logits, labels)                          # one loss a token, and whether nothing is left to do
    loss.mean(logits, labels).backward()                         # for loops of one's own: held, it gives no gradient

`NAMED_LOSSES` has every name with its fields and their defaults.
"""

from overtone.token_loss.catalogue import NAMED_LOSSES
from overtone.token_loss.edit_loss import EditLoss, TokenLoss
from overtone.token_loss.spec import LossSpec, parse

__all__ = ["NAMED_LOSSES", "EditLoss", "LossSpec", "TokenLoss", "parse"]
