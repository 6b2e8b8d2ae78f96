"""What a rank holds while it trains, told while it does."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from refkl_lib.memory.ledger import OWNERS, MemoryLedger
from refkl_lib.ranks.events import tell
from refkl_lib.tensors import storage_bytes

GATHERED = "gathered"
EVERY = 0.2  # seconds between two "memory" events


def tell_held(**held: Any) -> None:
    """Tell the bytes of storage that each owner holds, before there is a ledger."""
    tell("memory", owners=dict.fromkeys([*OWNERS, GATHERED], 0) | {o: storage_bytes(t) for o, t in held.items()})


@contextmanager
def watching(ledger: MemoryLedger) -> Iterator["Gathers"]:
    """Tell the ledger's bytes by owner five times a second, from a thread, until the block ends.

    Each event shows the highest moment since the one before, so that no peak is missed. The block is given
    what it gathers.
    """
    over = threading.Event()
    thread = threading.Thread(target=_tell_highs, args=(ledger, over), daemon=True)
    gathers = Gathers(ledger)
    thread.start()
    try:
        yield gathers
    finally:
        over.set()
        thread.join()


def _tell_highs(ledger: MemoryLedger, over: threading.Event) -> None:
    told = -1.0
    while True:
        last = over.wait(EVERY)
        recent = [point for point in ledger.timeline if point[0] > told]
        told = recent[-1][0]
        tell("memory", owners=max((owners for _, owners in recent), key=lambda owners: sum(owners.values())))
        if last:
            return


class Gathers:
    """Give the buffers that all-gathers fill to the ledger's owner "gathered"; `peak` is the most bytes at once.

    Under ZeRO-3 these are the weights that are whole for a moment, and the small ones that stay so.
    """

    def __init__(self, ledger: MemoryLedger) -> None:
        self.peak = 0
        self._ledger = ledger
        ledger.own(GATHERED, ())
        ledger.after(torch.ops.c10d._allgather_base_.default, self._own)

    def _own(self, buffer: Tensor, *_: object) -> None:
        self._ledger.own(GATHERED, buffer)
        self.peak = max(self.peak, self._ledger.now()[GATHERED])
