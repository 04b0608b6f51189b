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
    if os.name == "posix":  # elsewhere directories can't be synced
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def exclusive(path: Path):
    """Hold the lock file `path` during the block. Raises UserError, naming the process that already holds it.

    The operating system's lock (flock, or a locked byte on Windows) ends with its owner, so a file left behind locks
    nothing. Between hosts it works where the file system supports locks, as NFS does.
    """
    with open(path, "a+b", 0) as file:  # not truncated: it may name the owner
        try:
            if os.name == "posix":
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                import msvcrt

                file.seek(2**20)  # others can't read a locked byte, so not one of those that name the owner
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                file.seek(0)
                owner = file.read(200).decode(errors="replace") or "another process"
                raise UserError(f"{path.parent} is being written by {owner}; wait for it, or end it") from None
            print(f"{path.parent} can't be locked ({error.strerror}); make sure that nothing else writes there")
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path))):
            raise UserError(f"{path.parent} was written by another process just now; run again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows can't remove an open file
                path.unlink()
