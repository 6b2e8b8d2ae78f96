"""The ways to keep a reference, and what each would cost a run.

A way is a strategy, and whether the policy is partitioned: an adapter can be switched off under ZeRO-3, too.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from refkl_lib.memory.bill import Bill, Fit
from refkl_lib.memory.price import price
from refkl_lib.memory.shapes import Model, config_of
from refkl_lib.units import show_bytes


@dataclass(frozen=True)
class Way:
    """A way to keep a reference: its name, what one does, and the arguments of `price` that are its own."""

    name: str
    does: str
    arguments: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def shares(self) -> bool:
        """Return whether it shares weights over several ranks."""
        return self.name.endswith("zero3")


WAYS = {
    way.name: way
    for way in (
        Way("clone", "copy the policy, whole, on each GPU", {"strategy": "clone"}),
        Way("adapter", "switch the adapter off", {"strategy": "adapter"}),
        Way("zero3", "load the model again, partitioned over the ranks", {"strategy": "zero3"}),
        Way(
            "adapter, zero3",
            "partition the policy over the ranks, and switch its adapter off",
            {"strategy": "adapter", "ds_config": {}},
        ),
        Way("swap", "keep the reference in host memory, and exchange it in for its pass", {"strategy": "swap"}),
        Way("precomputed", "compute its log-probs once, and let the model go", {"strategy": "precomputed"}),
    )
}


@dataclass(frozen=True)
class Run:
    """What is to be trained, and on what: `device_memory` and `host_memory` in bytes for each of `ranks` GPUs.

    `settings` are those arguments of `price` that say how it trains.
    """

    model: Model
    device_memory: int
    ranks: int
    host_memory: int
    fixed_data: bool
    settings: Mapping[str, Any]

    @property
    def trains_adapter(self) -> bool:
        """Return whether an adapter trains, and not all weights."""
        return self.settings["lora_rank"] is not None

    @property
    def trains(self) -> str:
        """Return what trains, in words."""
        return f"LoRA of rank {self.settings['lora_rank']}" if self.trains_adapter else "all weights"


@dataclass(frozen=True)
class Option:
    """A way for a run. What it costs is priced when first asked for; raises then what `price` raises."""

    run: Run
    way: Way

    @cached_property
    def bill(self) -> Bill | None:
        """Return its bill; None if it does not go with the run."""
        if self._misfit:
            return None
        return priced(self.run.model, {"ranks": self.run.ranks, **self.run.settings, **self.way.arguments})

    @property
    def fit(self) -> Fit | None:
        """Return whether its bill fits a GPU."""
        return None if self.bill is None else self.bill.fits(self.run.device_memory)

    @property
    def usable(self) -> bool:
        """Return whether the run can keep its reference in this way."""
        return not self.lacks

    @property
    def lacks(self) -> str:
        """Return what stands against it, in words; "" if nothing does. It is only priced if nothing else does."""
        if found := self._misfit or self._missing_condition:
            return found
        assert self.bill is not None
        if not self.fit:
            return self.verdict
        waiting = sum(self.bill.host.values())
        if waiting > self.run.host_memory:
            return f"{show_bytes(waiting)} of host memory needed"
        return ""

    @property
    def verdict(self) -> str:
        """Return its sum in words: what it needs with headroom, and how much that leaves or lacks."""
        if self.fit is None:
            return self.lacks
        left = f"{show_bytes(self.fit.left)} to spare" if self.fit else f"{show_bytes(-self.fit.left)} too much"
        return f"{show_bytes(self.fit.needed)} needed, {left}"

    @property
    def _misfit(self) -> str:
        if self.way.arguments["strategy"] == "adapter" and not self.run.trains_adapter:
            return "nothing to switch off (lora_rank)"
        if self.way.name == "swap" and self.run.trains_adapter:
            return "nothing to swap with an adapter"
        return ""

    @property
    def _missing_condition(self) -> str:
        if self.way.shares and self.run.ranks == 1:
            return "there is one rank"
        if self.way.name == "swap" and self.run.host_memory == 0:
            return "no host memory (host_memory)"
        if self.way.name == "precomputed" and not self.run.fixed_data:
            return "texts not known yet (fixed_data)"
        return ""


def priced(model: Model, arguments: Mapping[str, Any]) -> Bill:
    """Return `price(model, **arguments)`, at once if that has been asked before."""
    label = model if isinstance(model, str) else ""
    key = f"{label} {config_of(model).to_json_string()} {sorted(arguments.items())}"
    # A copy, for transformers writes the dtype of a model that it builds into the configuration.
    return _priced(_Asked(key, copy.deepcopy(model), arguments))


@dataclass(frozen=True)
class _Asked:
    """Arguments of `price`, told apart by a text: a configuration cannot be a key."""

    key: str
    model: Model = field(compare=False)
    arguments: Mapping[str, Any] = field(compare=False)


@lru_cache(maxsize=2048)
def _priced(asked: _Asked) -> Bill:
    return price(asked.model, **asked.arguments)
