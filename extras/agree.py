"""
Ranks that end together. What one rank alone fails at, it says to all before any of them waits for the others: else they
would wait for it until a timeout, and on other nodes nobody would read why.
"""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from extras.cli import UserError


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


def exchange(text: str, store, rank: int, world_size: int) -> list[str]:
    """What every rank has to say, by rank."""
    if store is not None:
        store.set(f"said{rank}", text)
        said = [store.get(f"said{other}").decode() for other in range(world_size)]
        store.set(f"heard{rank}", "")
        if rank == 0:  # the store may live in this process
            store.wait([f"heard{other}" for other in range(world_size)])
        return said
    said = [text] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(said) > 1:
        dist.all_gather_object(said, text)
    return said
