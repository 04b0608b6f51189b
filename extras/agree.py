"""
Ranks that begin and end together. What one rank alone fails at, it says to all before any of them waits for the others:
else they would wait for it until a timeout, and on other nodes nobody would read why.
"""

import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from extras.cli import LocalError, UserError


@contextlib.contextmanager
def all_or_none(store=None, rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """Around what a rank does by itself: an error on one of them is an error on all.

    They tell each other through the process group, or, while there is none, through a store, and that once only.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    said = exchange(f"{kind}{error}" if error else "", store, rank, world_size)
    if error:
        raise error
    for other, text in enumerate(said):
        if text:
            raise UserError(f"rank {other}: {text}")


def exchange(mine, store=None, rank: int = 0, world_size: int = 1) -> list:
    """What every rank has to say, by rank; to a store, text."""
    if store is not None:
        store.set(f"said{rank}", mine)
        said = [store.get(f"said{other}").decode() for other in range(world_size)]
        store.set(f"heard{rank}", "")
        if rank == 0:  # the store may live in this process
            store.wait([f"heard{other}" for other in range(world_size)])
        return said
    said = [mine] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(said) > 1:
        dist.all_gather_object(said, mine)
    return said


def require_same(what: str, value: object) -> None:
    """UserError on every rank unless all of them have the same value."""
    if len(set(everyones := exchange(value))) > 1:
        raise UserError(f"all nodes need the same {what}; rank by rank they have {', '.join(map(str, everyones))}")


def prepare_process(alone: dict[str, str]) -> None:
    """Before the ranks join: keep NCCL's Flight Recorder and, on Linux, end this rank when torchrun is killed.

    LocalError unless the variables that torchrun sets are numbers that fit. alone: each, and what it is without.
    """
    found = [os.environ.get(name, value) for name, value in alone.items()]
    rank, local_rank, W, local_W = (int(value) if value.isdecimal() else -1 for value in found)
    if not (0 <= rank < W and local_rank >= 0 and local_W > 0):
        raise LocalError(f"{' '.join(alone)} are {' '.join(found)}; unset them, or let torchrun set them")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # torch 2.13 has it on by default
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        call_libc("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1 and "torch" not in Path("/proc/1/cmdline").read_text():  # it was killed before that line
            os._exit(137)


def meet(rank: int, world_size: int, limit: timedelta):
    """The store of this start's ranks, when all have come. LocalError that names those who have not within `limit`."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has the store, and ends all ranks if one of them dies
        store, *_ = next(dist.rendezvous("env://", timeout=limit))
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
            return store
        return dist.PrefixStore(name_this_start(store, rank, world_size, limit.total_seconds()), store)
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise LocalError(f"MASTER_ADDR {host!r} and MASTER_PORT {port!r} are no address; let torchrun set them")
    store, keys = None, [f"came{other}" for other in range(world_size)]
    options = {"wait_for_workers": False, "multi_tenant": True, "use_libuv": os.environ.get("USE_LIBUV", "1") == "1"}
    try:
        store = dist.TCPStore(host, int(port), world_size, rank == 0, limit, **options)
        store.set(keys[rank], "")
        store.wait(keys, limit + timedelta(seconds=2 * (rank == 0)))  # rank 0 has the store: it goes last
        return store
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        missing = []
        with contextlib.suppress(RuntimeError):
            missing = [str(other) for other, key in enumerate(keys) if store and not store.check([key])]
        late = f"rank {rank} waited {limit.total_seconds():.0f} s for rank {', '.join(missing) or 0}"  # 0 has the store
        raise LocalError(f"{late}; see what the others say, or start them all by torchrun") from error


def name_this_start(store, rank: int, world_size: int, seconds: float) -> str:
    """A name that the ranks of this start share with no other start. TimeoutError if they don't meet in `seconds`.

    torchrun keeps one store for all its restarts, with all that was written into it: who reads an address before its
    new owner has written it waits for the dead until the timeout. So each rank shows a number that was never used
    before, and believes only an answer that repeats it. Rank 0 answers until all have taken its name.
    """
    mine, deadline, others = uuid.uuid4().hex, time.monotonic() + seconds, range(1, world_size)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if rank:
        store.set(f"hello{rank}", mine)
    while time.monotonic() < deadline:
        if rank == 0:
            for other in others:
                store.set(f"welcome{other}", read(f"hello{other}") + mine)
            if all(read(f"joined{other}") == mine for other in others):
                return mine
        elif (welcome := read(f"welcome{rank}")).startswith(mine):
            store.set(f"joined{rank}", welcome.removeprefix(mine))
            return welcome.removeprefix(mine)
        time.sleep(0.02)
    raise TimeoutError(f"rank {rank}: not all of the {world_size} ranks came within {seconds:.0f} s")


def call_libc(function: str, *arguments: int) -> None:
    """Call a function of the C library, where it has one of that name: prctl on Linux, mallopt in glibc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), function)(*arguments)


def note(step: int, what: str) -> None:
    """Tell the other ranks what this one does, for `blame`; on one process, nothing."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.distributed_c10d._get_default_store().set(f"at{dist.get_rank()}", f"{what} {step}\n{time.time()}")


def blame(error: Exception, directory: str) -> None:
    """LocalError, if `error` comes of a rank that never came, or that stopped answering: which, since when and at what.

    Writes this rank's Python stack into the directory.
    """
    W, why = os.environ.get("WORLD_SIZE", "1"), str(error).split("\n")[0]
    if W != "1" and not dist.is_initialized() and isinstance(error, (dist.DistError, TimeoutError)):
        raise LocalError(f"not all {W} ranks came in time ({why}); see what the others say, or use torchrun") from error
    silent = re.search("[Tt]imed out|[Tt]imeout|closed by peer|reset by peer", str(error))
    if not (dist.is_initialized() and isinstance(error, RuntimeError) and silent):  # not that of a file system
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which has seen the dead rank: speak first
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, f"stack_rank{dist.get_rank()}.txt"), "w") as file:
        faulthandler.dump_traceback(file)
        traceback.print_exception(error, file=file)
    try:
        silent = "; ".join(silent_ranks()) or "all of them do now: one was too slow, or a connection was lost"
    except RuntimeError:
        silent = "rank 0, or its node"  # the store was there
    waits = f"the ranks wait for one that does not answer: {silent}"
    raise LocalError(f"{waits}; what this one did is in {file.name}") from error


def silent_ranks() -> list[str]:
    """The ranks that don't say within 3 seconds that they, too, wait in vain, and what each was last heard of."""
    store, mine, found = dist.distributed_c10d._get_default_store(), dist.get_rank(), []
    store.set(f"waits{mine}", "")
    time.sleep(3 + 3 * (mine == 0))  # the store may be in rank 0, and end with it, while others still ask
    for rank in range(dist.get_world_size()):
        if not store.check([f"waits{rank}"]):
            ago = "which never began"
            if store.check([f"at{rank}"]):
                what, when = store.get(f"at{rank}").decode().split("\n")
                ago = f"last heard of {time.time() - float(when):.0f} s ago: {what}"
            found.append(f"rank {rank}, {ago}")
    return found
