"""Output folders."""

from __future__ import annotations

import tempfile
from pathlib import Path


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
