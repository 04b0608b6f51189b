"""
Files that are there whole or not at all.
"""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, writer: str = ""):
    """Open for writing bytes: it appears under its name, on the disk, when the block ends well, else not at all.

    A temporary name in the same directory, flush, fsync, rename, and fsync of the directory, so that the new name, too,
    survives a power cut. OSError as from `open`, `write` and the like; nothing is left behind then.
    writer: goes into the temporary name, for a file that several write at the same time.
    """
    path = Path(path)
    temporary = path.with_name(path.name + writer + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(folder: str | os.PathLike) -> None:
    """Make the names in it last, where the system can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
