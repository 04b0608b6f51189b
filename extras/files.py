"""
Files that are there whole or not at all, and directories that one process at a time writes into.
"""

import contextlib
import errno
import os
import socket
from pathlib import Path

from extras.cli import UserError


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


@contextlib.contextmanager
def exclusive(path: Path):
    """Hold the lock file `path` during the block. Raises UserError, naming the process that holds it already.

    The lock is the system's (flock, or a locked byte on Windows), so it ends with its owner, however that ends; a file
    left behind locks nothing. Between hosts it works where the file system passes locks on, as NFS does. Where it has
    no locks, we say so and go on.
    """
    with open(path, "a+b", 0) as file:  # not truncated: it may name the owner
        try:
            lock(file)
        except OSError as error:
            file.seek(0)
            owner = file.read(200).decode(errors="replace") or "another process"
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise UserError(f"{path.parent} is being written by {owner}; wait for it, or end it") from None
            print(f"{path.parent} can't be locked ({error.strerror}): start nothing else that writes there")
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path))):
            raise UserError(f"{path.parent} was written by another process just now; run again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file; whoever comes next takes it over
                path.unlink()


def lock(file) -> None:
    """Raises OSError at once if another process has it."""
    if os.name == "posix":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(2**20)  # a locked byte can't be read by others: not one of those that name the owner
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
