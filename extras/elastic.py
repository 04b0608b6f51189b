"""
How the ranks of an elastic launch (torchrun --max-restarts) find each other after a restart.
"""

import os
import time
import uuid

import torch.distributed as dist


def store_of_this_start(store, rank: int, world_size: int, seconds: float):
    """The store as the ranks of this start alone see it; the store itself unless torchrun may restart them."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return store
    return dist.PrefixStore(name_this_start(store, rank, world_size, seconds), store)


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
