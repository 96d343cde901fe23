"""OverTone in EasyEdit: one key in the hparams of its trainers, nothing changed without it.

FT-M, LoRA, MELO and WISE, as in the paper; their twins; ROME, MEMIT and the others that optimise one vector; GRACE and
DEFER. Others refuse the key.

    import overtone.easyedit
    overtone.easyedit.install()                        # once; easyeditor importable

    # in the hparams yaml:   token_loss: overtone
    #                  or:   token_loss: overtone_recommended
    #                  or:   token_loss: {name: overtone, epsilon: 0.1, hold: [correct, 0.2]}
    #                  or:   token_loss: overtone:epsilon=0.1+hold=correct,0.2
    #                  or:   token_loss: cross_entropy:hold=0.1
    # or in code:            hparams.token_loss = any callable(logits (N, V), labels (N,)) -> loss (N,)

`overtone doctor my.yaml` says what would be hooked, and which known trap the file would fall into.
"""

from overtone.easyedit.installation import install, uninstall
from overtone.easyedit.trainers import SeamError

__all__ = ["SeamError", "install", "uninstall"]
