"""A language model from a GGUF file, dequantised into an ordinary one."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def is_gguf(source: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return str(source).lower().endswith(".gguf")


def load_gguf(path: Path) -> tuple[Any, Any]:
    """The model in float32, and its tokenizer, of one file.

    Without its dequantising transformers would mark the model as quantised, which can neither be saved nor trained.

    Args:
        path: a causal language model of an architecture that transformers reads from GGUF.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        ImportError: the gguf package is not there, or transformers is older than 5.
        FileNotFoundError: there is no such file.
        ValueError: the file's architecture is none that transformers reads.
    """
    try:
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise ImportError('GGUF files need transformers>=5 and gguf: pip install "overtone[lab]" gguf') from error
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no GGUF file {path}")
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return model.eval(), AutoTokenizer.from_pretrained(**where)
