"""The folders that keep trained models: each appears whole or not at all, and broken ones are told and passed over."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from platformdirs import user_cache_dir
from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "OVERTONE_CACHE"
"""The environment variable that names the cache folder."""

_WEIGHTS, _RECORD = "model.safetensors", "knowledge.json"


def cache_folder(chosen: Path | None) -> Path:
    """The folder chosen, else ``$OVERTONE_CACHE``, else the user's cache folder; made if need be.

    Raises:
        OSError: it cannot be made.
    """
    folder = Path(chosen or os.environ.get(CACHE_VARIABLE) or user_cache_dir("overtone"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_entry(entry: Path) -> dict[str, float] | None:
    """What the model of a cache entry knows, or None where there is no entry or its weights are not those written."""
    if not entry.exists():
        return None
    try:
        record = json.loads((entry / _RECORD).read_text(encoding="utf-8"))
        if record.pop("sha256") != digest((entry / _WEIGHTS).read_bytes()):
            raise ValueError(f"{_WEIGHTS} has changed")
        return {str(group): float(share) for group, share in record.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is broken and will be trained anew: %s", entry, error)
        return None


def write_entry(
    entry: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shares: dict[str, float]
) -> None:
    """Keep a model and what it knows."""
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f".{entry.name}-") as folder:
        written = Path(folder) / entry.name
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        record = shares | {"sha256": digest((written / _WEIGHTS).read_bytes())}
        (written / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)
        os.replace(written, entry)


def digest(data: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
