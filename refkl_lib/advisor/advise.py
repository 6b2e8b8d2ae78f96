"""Advice: the path through the tree, the bills of all ways, and what would change it.

advice = advise("Qwen2.5-7B", device_memory=80 * 2**30, ranks=8, seq=2048)
advice                 # all of it, as a text
advice.recommended     # "zero3", say; None if nothing fits
advice.bills["clone"]  # what another way would cost
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from refkl_lib.advisor.article import Rule, rule_for
from refkl_lib.advisor.changes import Change, changes
from refkl_lib.advisor.tree import Answer, walk, ways_of
from refkl_lib.advisor.ways import WAYS, Option, Run
from refkl_lib.memory.bill import Bill
from refkl_lib.memory.optimizers import OptimizerName
from refkl_lib.memory.shapes import Model
from refkl_lib.memory.trace import Attention, Precision
from refkl_lib.units import MIB, folded, show_bytes


@dataclass(frozen=True, repr=False)
class Advice:
    """Which way to keep the reference of a run, and why; it shows itself as a text.

    `path` are the answers on the way through the decision tree, `chosen` is what it ends at. The rest is priced when
    first asked for: all `bills` take a second or two, `changes` some more.
    """

    run: Run
    path: tuple[Answer, ...]
    chosen: Option | None

    @property
    def recommended(self) -> str | None:
        """Return the name of the way at the end of the path; None if nothing fits."""
        return self.chosen.way.name if self.chosen else None

    @property
    def parameters(self) -> int:
        """Return how many the model has, an adapter not counted."""
        return self._first_bill.parameters

    @property
    def reason(self) -> str:
        """Return the advice in a sentence or two; if nothing fits, what is missing."""
        if self.chosen is not None:
            return f"{self.chosen.way.name}: {self.chosen.way.does}. It fits: {self.chosen.verdict}."
        # On one rank there are no shares: its bill would be no smaller with a second one that is not there.
        tried = [option for option in ways_of(self.run) if self.run.ranks > 1 or not option.way.shares]
        nearest = max(tried, key=_left)
        return f"Nothing fits. Nearest is {nearest.way.name}: {nearest.lacks if nearest.fit else nearest.verdict}."

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """Return all ways, whether they fit or not."""
        return tuple(Option(self.run, way) for way in WAYS.values())

    @property
    def bills(self) -> Mapping[str, Bill]:
        """Return the bills of the ways that go with the run, by name."""
        return {option.way.name: option.bill for option in self.options if option.bill is not None}

    @property
    def fitting(self) -> tuple[str, ...]:
        """Return the names of all ways that this run could take."""
        return tuple(option.way.name for option in self.options if option.usable)

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """Return what would let a better way fit, or any at all, the smallest change first."""
        return changes(self.run, self.chosen)

    @cached_property
    def rule(self) -> Rule:
        """Return what the article would do."""
        return rule_for(self.run, self.parameters)

    @property
    def differs(self) -> bool:
        """Return whether the article would do something else."""
        return self.rule.option.way.name != self.recommended

    def __repr__(self) -> str:
        """Return the bills as a table, the path, the reason, what would change it, and what the article says."""
        parts = [self._title(), self._table(), self._path(), folded(self.reason)]
        if self.changes:
            parts.append("\n".join(["What would change it:", *(folded(f"- {change}") for change in self.changes)]))
        if self.differs:
            parts.append(folded(f"The article: {self.rule}."))
        return "\n\n".join(parts)

    @property
    def _first_bill(self) -> Bill:
        bill = ways_of(self.run)[0].bill
        assert bill is not None
        return bill

    def _title(self) -> str:
        run, settings, bill = self.run, self.run.settings, self._first_bill
        gpus = f"{run.ranks:,} GPU{'s' if run.ranks > 1 else ''} of {show_bytes(run.device_memory)}"
        how = f"batch {settings['batch']} × {settings['seq']} tokens on each"
        how += f", {settings['dtype']}, {settings['optimizer']}"
        how += ", checkpointing" if settings["checkpointing"] else ""
        return f"{bill.model}, {bill.parameters / 1e9:.2f} billion parameters, {run.trains}\n{gpus}, {how}"

    def _table(self) -> str:
        rows = [("", "reference", "peak", "needed", "fits"), *map(_row, self.options)]
        return "\n".join(
            f"{name:<14}{held:>11}{peak:>12}{needed:>12}  {fits}" for name, held, peak, needed, fits in rows
        )

    def _path(self) -> str:
        return "\n".join(folded(f"{number}. {answer}") for number, answer in enumerate(self.path, 1))


def _left(option: Option) -> int:
    assert option.fit is not None
    return option.fit.left


def _row(option: Option) -> tuple[str, ...]:
    verdict = f"no: {option.lacks}" if option.lacks else "yes"
    if option.bill is None or option.fit is None:
        return option.way.name, "", "", "", verdict
    sizes = (option.bill.reference_bytes, option.bill.peak, option.fit.needed)
    if not option.fit:
        verdict = f"no: {show_bytes(-option.fit.left)} too much"
    return option.way.name, *map(show_bytes, sizes), verdict


def advise(
    model: Model,
    *,
    device_memory: int,
    ranks: int = 1,
    host_memory: int = 0,
    fixed_data: bool = False,
    lora_rank: int | None = None,
    batch: int = 1,
    seq: int = 1024,
    dtype: Precision = "mixed",
    optimizer: OptimizerName = "adamw",
    targets: str | tuple[str, ...] = "all-linear",
    checkpointing: bool = False,
    attention: Attention | None = None,
) -> Advice:
    """Return which way to keep the reference of a run, by its bill.

    `device_memory` and `host_memory` are bytes, for each of `ranks` GPUs. `fixed_data` says that all texts are known
    before training starts. `lora_rank=None` trains all weights. The other arguments are those of `price`; `dtype` is
    "mixed" unless told, bfloat16 weights with float32 masters, as ZeRO-3 has them anyway.
    Raises ValueError or TypeError as `price` does.
    """
    for name, value, least in (("device_memory", device_memory, MIB), ("host_memory", host_memory, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}, but must be a whole number of bytes: write 80 * 2**30 for 80 GiB")
    settings: dict[str, Any] = {"lora_rank": lora_rank, "targets": targets, "batch": batch, "seq": seq}
    settings |= {"dtype": dtype, "optimizer": optimizer, "checkpointing": checkpointing, "attention": attention}
    run = Run(model, device_memory, ranks, host_memory, fixed_data, settings)
    return Advice(run, *walk(run))
