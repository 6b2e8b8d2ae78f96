"""A deep model's step from two shallow ones.

Layers repeat, so what lives while layer u of N runs is A + B·u + C·N bytes, for each owner and each stretch of a step:
B is what a layer adds when it has been passed, C what each layer holds throughout. Two depths give A, B and C, and the
other layers of the deeper one to check them by. The first and last layers are taken from the ends: bytes linear in N.
"""

from collections.abc import Iterator
from itertools import groupby

from torch import nn

from refkl_lib.memory.trace import Moment, Trace

Owners = dict[str, int]


def period_of(layers: nn.ModuleList) -> int:
    """Return after how many layers a stack begins again; its length, if it does not."""
    kinds = [_kind(layer) for layer in layers]
    depth = len(kinds)
    return next((p for p in range(1, depth) if all(kinds[i] == kinds[i - p] for i in range(p, depth))), depth)


def depths_for(depth: int, period: int) -> tuple[int, int] | None:
    """Return the two depths to trace, None if that would not be less work than the whole model."""
    shallow = 4 * period + depth % period
    return (shallow, shallow + period) if 2 * shallow + period < depth else None


def at_depth(traces: tuple[Trace, Trace], depths: tuple[int, int], period: int, depth: int) -> Trace | None:
    """Return the trace of a model of `depth` layers; None if the two that are given do not follow the rule."""
    if not all(_is_plain(trace) for trace in traces):
        return None
    line = _Line(traces, depths, period)
    try:
        if line.moments(depths[1]) != traces[1].moments:
            return None
        return Trace(line.moments(depth), line.at_rest(depth), line.sizes(depth))
    except KeyError:  # the one has a stretch that the other has not
        return None


def _kind(layer: nn.Module) -> object:
    shapes = tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())
    marks = [(name, value) for name, value in vars(layer).items() if isinstance(value, str | int | float)]
    inner = [
        getattr(module, "layer_type", None) or getattr(module, "sliding_window", None) for module in layer.modules()
    ]
    return type(layer), shapes, [mark for mark in marks if mark[0] not in ("layer_idx", "training")], inner


def _is_plain(trace: Trace) -> bool:
    return len(dict(trace.moments)) == len(trace.moments)


class _Line:
    """Bytes as a function of depth, and of how deep a layer lies."""

    def __init__(self, traces: tuple[Trace, Trace], depths: tuple[int, int], period: int) -> None:
        self._shallow, self._deeper = (dict(trace.moments) for trace in traces)
        self._traces, self._depths, self._period = traces, depths, period

    def moments(self, depth: int) -> tuple[tuple[Moment, Owners], ...]:
        order = self._order(depth)
        return tuple((moment, self._owners(moment, depth)) for moment in order)

    def at_rest(self, depth: int) -> Owners:
        return self._by_depth(self._traces[0].at_rest, self._traces[1].at_rest, depth)

    def sizes(self, depth: int) -> dict[str, int]:
        return self._by_depth(self._traces[0].sizes, self._traces[1].sizes, depth)

    def _by_depth(self, shallow: Owners, deeper: Owners, depth: int) -> Owners:
        steps = (depth - self._depths[0]) // self._period
        return {owner: shallow[owner] + steps * (deeper[owner] - shallow[owner]) for owner in shallow}

    def _owners(self, moment: Moment, depth: int) -> Owners:
        layer = moment.layer
        if layer is None or not self._period <= layer < depth - self._period:
            at = [moment._replace(layer=self._from_end(layer, depth, d)) for d in self._depths]
            return self._by_depth(self._shallow[at[0]], self._deeper[at[1]], depth)
        first = self._period + layer % self._period
        here, next_one = moment._replace(layer=first), moment._replace(layer=first + self._period)
        base = self._by_depth(self._shallow[here], self._deeper[here], depth)
        units = (layer - first) // self._period
        return {o: base[o] + units * (self._shallow[next_one][o] - self._shallow[here][o]) for o in base}

    def _from_end(self, layer: int | None, depth: int, other: int) -> int | None:
        """Return which layer of another depth stands where this one does."""
        return layer if layer is None or layer < self._period else layer - depth + other

    def _order(self, depth: int) -> Iterator[Moment]:
        """Yield the stretches of a step of `depth` layers in order, from those of the shallow trace."""
        for (_phase, layers), group in groupby(self._shallow, lambda m: (m.phase, m.layer is not None)):
            stretches = list(group)
            if not layers:
                yield from stretches
                continue
            parts: dict[int, list[Moment]] = {}
            for moment in stretches:
                assert moment.layer is not None
                parts.setdefault(moment.layer, []).append(moment)
            numbers = range(depth) if next(iter(parts)) == 0 else range(depth - 1, -1, -1)
            for number in numbers:
                yield from (moment._replace(layer=number) for moment in parts[self._template(number, depth)])

    def _template(self, number: int, depth: int) -> int:
        if number < self._period:
            return number
        if number >= depth - self._period:
            return number - depth + self._depths[0]
        return self._period + number % self._period
