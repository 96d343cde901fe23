"""Files that are whole or not there, and folders that can be written to."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a run killed here, sees the old text or the new text, never a part."""
    # The process in the name: two processes may write the same file.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def require_writable(folder: Path) -> None:
    """Refuse a folder that is not writable and cannot be made; nothing is made yet.

    Raises:
        OSError: it is not.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"out must be a folder that can be written to, got {str(folder)!r} ({error.strerror})") from error
