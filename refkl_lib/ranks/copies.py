"""Why a ZeRO-3 policy cannot be cloned: `deepcopy` of it on real ranks, and what became of copy and original.

    copy_under_zero3("engine.module")
    copy_under_zero3("model", gathered=True)

A partitioned parameter is an empty tensor with the shard hung on it. `deepcopy` takes the empty tensor, leaves the
shard, and complains about nothing (read in torch 2.13, `Parameter.__deepcopy__`). The hooks that gather weights for
a forward pass do come along, and they still are those of the original's engine (DeepSpeed 0.19). An
engine that is new records the order of its layers in the first pass that it sees, and that is the copy's. Later, with
a record to compare with, it often notices the strangers and records anew.
"""

from dataclasses import dataclass
from typing import Literal

from refkl_lib.counts import check_counts
from refkl_lib.ranks.launch import check_system, run_ranks
from refkl_lib.units import show_bytes

Copied = Literal["model", "engine.module", "engine"]
COPIED = ("model", "engine.module", "engine")
SUCCEEDS, NOT_TRIED = "succeeds", "not tried"

WORKER = "refkl_lib.ranks.copying"


@dataclass(frozen=True, repr=False)
class CopyOutcome:
    """What became of a copy and of its original, as rank 0 saw it.

    `copied`, `forward` (a forward pass of the copy) and each of the two passes of the `original` that follow are
    "succeeds", "not tried" or the error. `shapes` are those of the copy's first parameters, by name. `copy_bytes`
    and `original_bytes` are what this rank holds. `same_logits` tells whether copy and original agree, None unless
    both have computed.
    """

    what: str
    gathered: bool
    ranks: int
    copied: str
    shapes: dict[str, tuple[int, ...]]
    copy_bytes: int
    original_bytes: int
    forward: str
    original: tuple[str, str]
    same_logits: bool | None

    def __repr__(self) -> str:
        """Return a line each for the copy, its parameters, its pass and the original's."""
        within = "with GatheredParameters(…): " if self.gathered else ""
        lines = [f"{within}deepcopy({self.what}), {self.ranks} ranks", f"  the copy: {self.copied}"]
        if self.copied == SUCCEEDS:
            name, shape = next(iter(self.shapes.items()))
            lines += [
                f"  its {name}: shape {shape}",
                f"  a rank holds: {show_bytes(self.copy_bytes)}, of the original {show_bytes(self.original_bytes)}",
                f"  its forward pass: {self.forward}{_LOGITS[self.same_logits]}",
            ]
        return "\n".join([*lines, f"  the original's next passes: {'; then '.join(dict.fromkeys(self.original))}"])


_LOGITS = {None: "", True: ", with the original's logits", False: ", with other logits than the original's"}


def copy_under_zero3(
    what: Copied,
    ranks: int = 2,
    model: str = "pocket",
    *,
    gathered: bool = False,
    forward: bool = True,
    timeout: float = 300.0,
) -> CopyOutcome:
    """Start `ranks` processes, `deepcopy` in each a policy that they share, and return what became of it.

    `what` is copied: "model" right after it was loaded partitioned, before it gets its engine, "engine.module" or
    "engine" right after the engine was made. With `gathered`, the copy is made inside `GatheredParameters`, where
    all weights are whole. `forward=False` makes the copy and lets it be.

    Raises ValueError for anything else to copy; RankError, RuntimeError and ImportError as `launch_zero3` does.
    """
    if what not in COPIED:
        raise ValueError(f"what is {what!r}, but must be one of {COPIED}")
    check_counts(ranks=ranks)
    check_system()
    settings = {"what": what, "model": model, "gathered": int(gathered), "forward": int(forward)}
    events = run_ranks(ranks, WORKER, settings, None, timeout).events
    told = next(event for event in events if event["event"] == "done" and event["rank"] == 0)
    return CopyOutcome(
        what=what,
        gathered=gathered,
        ranks=ranks,
        copied=told["copied"],
        shapes={name: tuple(shape) for name, shape in told["shapes"].items()},
        copy_bytes=told["copy_bytes"],
        original_bytes=told["original_bytes"],
        forward=told["forward"],
        original=tuple(told["original"]),
        same_logits=told["same_logits"],
    )
