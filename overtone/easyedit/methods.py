"""Every editing method of EasyEdit that takes a token loss."""

from __future__ import annotations

from overtone.easyedit.ft import FT, FT_UNS
from overtone.easyedit.grace import DEFER, GRACE
from overtone.easyedit.lora import LORA, LORA_UNS, QLORA
from overtone.easyedit.melo import MELO
from overtone.easyedit.vstar import VSTAR
from overtone.easyedit.wise import WISE

TRAINERS = (FT, LORA, MELO, WISE, QLORA, LORA_UNS, FT_UNS, *VSTAR, GRACE, DEFER)
"""The first four are the paper's, and in every EasyEdit of the supported range."""

BY_NAME = {trainer.name: trainer for trainer in TRAINERS}
