"""A world of a dozen words and random models of every architecture that the lab edits, for fast tests."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from overtone.lab.data.edit import Edit, Probe

WORDS = [
    *("<pad>", "<eos>", "<unk>", ".", "the", "head", "spouse", "of", "is", "led", "by", "runs", "likes", "Question"),
    *("Answer", "acme", "zed", "ana", "bo", "cy", "dan", "eve", "tea", "milk", "rain"),
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.4,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; the text of a target begins with the space before its first word."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def random_model(arch: str = "llama", seed: int = 0) -> Any:
    """A small random model of the architecture, in evaluation mode."""
    common: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    configs = {
        "llama": lambda: LlamaConfig(**common, **SIZES),
        "qwen2": lambda: Qwen2Config(**common, **SIZES, num_key_value_heads=2),
        "mistral": lambda: MistralConfig(**common, **SIZES, num_key_value_heads=2),
        "gpt2": lambda: GPT2Config(**common, n_embd=32, n_layer=3, n_head=2, n_positions=64, initializer_range=0.4),
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(configs[arch]()).eval()


def edit() -> Edit:
    """The head of acme becomes "bo cy" in place of "ana"."""
    return Edit(
        subject="acme",
        prompt="the head of acme is",
        target_new=" bo cy",
        target_old=" ana",
        generality=(Probe("acme is led by", " bo cy", "rephrase", "bo cy"),),
        portability=(
            Probe(
                "Question the spouse of the head of acme Answer",
                " the head of acme is bo cy . the spouse of bo cy is dan eve .",
                "one_hop",
                "dan eve",
            ),
            Probe("the head of zed is", " bo cy", "alias", "bo cy"),
        ),
        locality=(
            Probe("zed likes", " tea milk", "same_relation", "tea milk"),
            Probe("ana likes", " rain", "same_relation", "rain"),
            Probe("dan likes", " milk", "soft", "milk"),
        ),
    )


def save_world_model(path: Any) -> str:
    """A random model in a folder, with a tokenizer that knows the words of the lab's world of seed 0."""
    from overtone.lab.data.world import build_world
    from overtone.lab.model.tokenizer import train_tokenizer

    words = train_tokenizer(build_world(0).training_texts(), 600)
    torch.manual_seed(0)
    special = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(vocab_size=600, **special, **SIZES, max_position_embeddings=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    words.save_pretrained(path)
    return str(path)
