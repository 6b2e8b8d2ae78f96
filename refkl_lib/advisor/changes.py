"""What would change an advice: the smallest changes of a run with which a better way fits, found by pricing."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from refkl_lib.advisor.article import LORA_RANK
from refkl_lib.advisor.tree import LADDERS, step_of
from refkl_lib.advisor.ways import WAYS, Option, Run, Way
from refkl_lib.units import show_bytes

MOST_RANKS = 1024


@dataclass(frozen=True)
class Change:
    """A change of a run, in words, and the way that fits with it."""

    what: str
    option: Option

    def __str__(self) -> str:
        """Return both, with the peak."""
        assert self.option.bill is not None
        return f"{self.what}: {self.option.way.name} fits, {show_bytes(self.option.bill.peak)} at the peak"


class _Changed(NamedTuple):
    what: str
    run: Run


class _Kind(NamedTuple):
    """A kind of change: what it makes of a run, the smallest change first, and which ways it can help.

    A change needs less memory than the ones before it.
    """

    of: Callable[[Run], list[_Changed]]
    helps: Callable[[Way], bool] = lambda way: True

    def smallest(self, run: Run, step: int) -> Change | None:
        """Return the smallest change with which a way above a step of its ladder fits."""
        changed = self.of(run)
        if not changed or self._above(changed[-1], step) is None:
            return None
        place = bisect_left(changed, True, key=lambda one: self._above(one, step) is not None)
        option = self._above(changed[place], step)
        assert option is not None
        return Change(changed[place].what, option)

    def _above(self, changed: _Changed, step: int) -> Option | None:
        ladder = LADDERS[changed.run.trains_adapter][:step]
        options = (Option(changed.run, question.way) for question in ladder if self.helps(question.way))
        return next((option for option in options if option.usable), None)


def changes(run: Run, option: Option | None) -> tuple[Change, ...]:
    """Return what would let a better way than `option` fit, the smallest changes first.

    Each is enough by itself. If nothing fits, and no single change helps, it is one: as many of them together as it
    takes. Empty if there is no better way, or if no change of these kinds leads to one.
    """
    found = [change for kind in KINDS if (change := kind.smallest(run, step_of(option)))]
    return tuple(found) if found or option is not None else _together(run)


def _together(run: Run) -> tuple[Change, ...]:
    words: Sequence[str] = ()
    for kind in KINDS:
        if change := kind.smallest(run, step_of(None)):
            return (Change(", ".join([*words, change.what]), change.option),)
        if changed := kind.of(run):
            words, run = (*words, changed[-1].what), changed[-1].run
    return ()


def _with(run: Run, **settings: Any) -> Run:
    return replace(run, settings={**run.settings, **settings})


def _checkpointing(run: Run) -> list[_Changed]:
    if run.settings["checkpointing"]:
        return []
    return [_Changed("with gradient checkpointing", _with(run, checkpointing=True))]


def _smaller_batches(run: Run) -> list[_Changed]:
    halves = [run.settings["batch"] >> shift for shift in range(1, run.settings["batch"].bit_length())]
    return [_Changed(f"at batch {batch}", _with(run, batch=batch)) for batch in halves]


def _host_memory(run: Run) -> list[_Changed]:
    swap = Option(run, WAYS["swap"])
    if swap.bill is None or not swap.fit or swap.usable:
        return []
    waiting = sum(swap.bill.host.values())
    return [_Changed(f"with {show_bytes(waiting)} of host memory for each GPU", replace(run, host_memory=waiting))]


def _more_ranks(run: Run) -> list[_Changed]:
    more = [run.ranks << shift for shift in range(1, MOST_RANKS.bit_length())]
    return [_Changed(f"on {ranks:,} ranks", replace(run, ranks=ranks)) for ranks in more if ranks <= MOST_RANKS]


def _small_states(run: Run) -> list[_Changed]:
    if run.settings["optimizer"] != "adamw":
        return []
    return [_Changed("with the optimizer's states in 8 bits", _with(run, optimizer="adamw8bit"))]


def _no_masters(run: Run) -> list[_Changed]:
    if run.settings["dtype"] != "mixed" or run.trains_adapter:
        return []
    return [_Changed("without float32 master weights", _with(run, dtype="bf16"))]


def _lora(run: Run) -> list[_Changed]:
    if run.trains_adapter:
        return []
    return [_Changed(f"with LoRA of rank {LORA_RANK}", _with(run, lora_rank=LORA_RANK))]


# First what costs time alone, then what takes more of a machine, at last what changes the training.
KINDS = (
    _Kind(_checkpointing),
    _Kind(_smaller_batches),
    _Kind(_host_memory, lambda way: way.name == "swap"),
    _Kind(_more_ranks, lambda way: way.shares),
    _Kind(_small_states),
    _Kind(_no_masters, lambda way: not way.shares),
    _Kind(_lora),
)
