"""
Files that are there whole or not at all, and directories that one process at a time writes into.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

from extras.cli import UserError


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, writer: str = ""):
    """Open for writing bytes: the file gets its name when the block succeeds; otherwise nothing is left behind.

    File and directory are synced, so the new name survives a power cut. Raises OSError, as `open` and `write` do.
    writer: part of the temporary name, for a file that several processes may write at the same time.
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
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """So that a new name in it survives a power cut."""
    if os.name == "posix":  # elsewhere directories can't be synced
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(file, owner: Callable[[], str]) -> None:
    """Lock an open file until it is closed. UserError with what `owner` says if another process has it.

    The operating system's lock (flock, or a locked byte on Windows) ends with its owner, so a file left behind locks
    nothing. Between hosts it works where the file system supports locks, as NFS version 4 does.
    """
    folder = os.path.dirname(file.name)
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            file.seek(2**30)  # others can't read a locked byte, so one that isn't there
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise UserError(f"{folder} is being written by {owner()}; wait for it, or end it") from None
        print(f"{folder} can't be locked ({error.strerror}); make sure that nothing else writes there")


@contextlib.contextmanager
def exclusive(path: Path):
    """Hold the lock file `path` during the block. UserError, naming the process that already holds it."""
    with open(path, "a+b", 0) as file:  # not truncated: it may name the owner
        lock(file, lambda: path.read_bytes()[:200].decode(errors="replace") or "another process")
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path))):
            raise UserError(f"{path.parent} was written by another process just now; run again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows can't remove an open file
                path.unlink()
