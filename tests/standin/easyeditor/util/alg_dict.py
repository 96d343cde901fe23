"""The table of algorithms."""

from ..models.ft import apply_ft_to_model
from ..models.lora import apply_lora_to_model
from ..models.melo import apply_melo_to_model
from ..models.rome import apply_rome_to_model
from ..models.wise import apply_wise_to_model

ALG_DICT = {
    "FT": apply_ft_to_model,
    "LoRA": apply_lora_to_model,
    "MELO": apply_melo_to_model,
    "WISE": apply_wise_to_model,
    "ROME": apply_rome_to_model,
}
ALG_MULTIMODAL_DICT = {"LoRA": apply_lora_to_model}
