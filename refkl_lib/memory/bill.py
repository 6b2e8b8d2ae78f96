"""The bill: what a training step that has not happened will hold, by owner."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from refkl_lib.memory.trace import Moment, Phase
from refkl_lib.units import GIB, show_bytes

Owners = dict[str, int]

# A CUDA context, its libraries' workspaces and what an allocator cannot use of its blocks, as a rule of thumb.
HEADROOM, HEADROOM_SHARE = GIB, 0.05
_IN_WORDS = {
    "reference": "in the reference's pass",
    "forward": "in the policy's forward pass",
    "loss": "while loss and KL are computed",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer's step",
    "sync": "while the reference follows the policy",
}


@dataclass(frozen=True)
class Fit:
    """Whether a bill fits a device: true if `needed`, the peak and the headroom, is at most `device_memory`; bytes."""

    peak: int
    headroom: int
    device_memory: int

    @property
    def needed(self) -> int:
        """Return peak and headroom."""
        return self.peak + self.headroom

    @property
    def left(self) -> int:
        """Return what remains of the device; negative if that much is lacking."""
        return self.device_memory - self.needed

    def __bool__(self) -> bool:
        return self.left >= 0

    def __str__(self) -> str:
        """Return the sum in words."""
        asked = f"{show_bytes(self.peak)} and {show_bytes(self.headroom)} of headroom"
        end = f"{show_bytes(self.left)} to spare" if self else f"{show_bytes(-self.left)} too much"
        return f"{'fits' if self else 'does not fit'}: {asked} in {show_bytes(self.device_memory)}, {end}"


@dataclass(frozen=True, repr=False)
class Bill:
    """What one training step of a model holds on each rank, in bytes.

    `owners` is by owner at the highest moment of a step, `at_rest` between two steps; "gathered", under ZeRO-3 alone,
    is what is whole for a while. `moments` has every stretch of the step in order, each with the bytes of its own
    highest moment. `reference_bytes` is what the reference holds beyond the policy, `host` what waits in host memory
    instead of on the device. `settings` are the arguments of `price`; `assumptions` say what the numbers rest on.
    """

    model: str
    parameters: int
    trained: int
    settings: dict[str, Any]
    owners: Owners
    at_rest: Owners
    moments: tuple[tuple[Moment, Owners], ...]
    reference_bytes: int
    host: Owners
    layers: int
    assumptions: tuple[str, ...]
    _without: Callable[[], "Bill"] | None = field(default=None, compare=False)

    @property
    def peak(self) -> int:
        """Return the bytes at the highest moment of a step."""
        return sum(self.owners.values())

    @property
    def moment(self) -> Moment:
        """Return the stretch of the step in which the peak is (the first, if there are several)."""
        return max(self.moments, key=lambda point: sum(point[1].values()))[0]

    @property
    def where(self) -> str:
        """Return where in the step the peak is, in words."""
        phase, layer, _ = self.moment
        place = "" if layer is None else f", at layer {layer + 1} of {self.layers}"
        return _IN_WORDS[phase] + place

    @property
    def phases(self) -> dict[Phase, Owners]:
        """Return bytes by owner at the highest moment of each phase, in the order of the step."""
        highest: dict[Phase, Owners] = {}
        for moment, owners in self.moments:
            if sum(owners.values()) > sum(highest.get(moment.phase, {}).values()):
                highest[moment.phase] = owners
        return highest

    @cached_property
    def without_reference(self) -> "Bill":
        """Return the bill of the same run without a reference: cross-entropy alone, and no second pass."""
        return self if self._without is None else self._without()

    @property
    def reference_adds(self) -> int:
        """Return how many bytes the peak is higher for the reference: what it holds, its pass, the KL."""
        return self.peak - self.without_reference.peak

    def fits(self, device_memory: int, headroom: int | None = None) -> Fit:
        """Return whether the peak and a headroom fit the bytes of a device; the result is true or false, and says why.

        `headroom` is 1 GiB and 5 % of the peak unless given: a rule of thumb for a CUDA context, workspaces and
        fragments. Raises ValueError if a number is not one of bytes.
        """
        if device_memory < 2**20:
            raise ValueError(
                f"device_memory is {device_memory}, but it is counted in bytes: write 80 * 2**30 for 80 GiB"
            )
        if headroom is None:
            headroom = HEADROOM + int(HEADROOM_SHARE * self.peak)
        if headroom < 0:
            raise ValueError(f"headroom is {headroom}, but it is a number of bytes, 0 or more")
        return Fit(self.peak, headroom, device_memory)

    def __repr__(self) -> str:
        """Return a table: a line for each owner."""
        return "\n".join([self._title(), *self._table(), "", self._peak_line(), *self._notes()])

    def _title(self) -> str:
        said = {name: value for name, value in self.settings.items() if value not in (None, False, {})}
        shown = ", ".join(f"{name}={value!r}" for name, value in said.items() if not isinstance(value, dict))
        return f"{self.model}: {self.parameters:,} parameters, {self.trained:,} of them train\n{shown}\n"

    def _table(self) -> list[str]:
        rows = [("per rank", "at the peak", "at rest")]
        rows += [(owner, show_bytes(self.owners[owner]), show_bytes(self.at_rest[owner])) for owner in self.owners]
        rows += [("together", show_bytes(self.peak), show_bytes(sum(self.at_rest.values())))]
        rows += [(f"{owner}, in host memory", "", show_bytes(count)) for owner, count in self.host.items()]
        width = max(len(row[0]) for row in rows)
        return [f"{name:<{width}}{peak:>14}{rest:>14}" for name, peak, rest in rows]

    def _peak_line(self) -> str:
        return f"The peak is {self.where}; the reference holds {show_bytes(self.reference_bytes)}."

    def _notes(self) -> list[str]:
        return [f"- {assumption}" for assumption in self.assumptions]
