"""The ledger: what lives now and what lived at the peak, by owner, to the byte.

    with MemoryLedger() as ledger:
        policy = ledger.own("policy", load_model("pocket"))
        optimizer = ledger.own("optimizer", torch.optim.AdamW(policy.parameters()))
        policy(input_ids).logits.logsumexp(-1).mean().backward()
    ledger.now()   # {"policy": …, "reference": 0, "gradients": …, "optimizer": 0, "activations": …}

Every operation passes a dispatch mode on the way to its kernel, so each new storage is seen as it is
born; a weak reference tells when it is freed. The device is asked nothing, so tensors on the CPU and on
a GPU are counted alike; and with `MemoryLedger(meta=True)` those on "meta", which only have a shape, as if
they were real.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import cache
from itertools import chain, zip_longest
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from refkl_lib.reference.base import Reference
from refkl_lib.tensors import storages_of, tensors_of

OWNERS = ("policy", "reference", "gradients", "optimizer", "activations")
GRADIENTS, REST = "gradients", "activations"

Point = tuple[float, dict[str, int]]
Thing = TypeVar("Thing")


class MemoryLedger:
    """Count the storages that live, each once, while a `with` block runs.

    An owner is a name: those given with `own` (of two, the first: a layer that policy and reference
    share belongs to the one owned first), "gradients" for the `.grad` of what is owned, "activations"
    for all else that operations made.

    Counted are the storages made by operations of the thread that entered the block, its backward
    passes included, and all that is owned. Not counted are scratch memory inside a kernel or a compiled
    function, the rounding of an allocator, sparse gradients, and older storages that nobody owned. A
    storage resized with `untyped_storage().resize_`, which is no operation, keeps the size it had.
    While a dispatch mode is on, PyTorch's backward pass adds up gradients that meet in a new tensor where
    it would do so in place (torch 2.13), so a step may hold one such sum more than it would unseen.

    With `meta`, tensors on the meta device count as well. Without, they do not: loaders build a model there
    before they read its weights.

    The ledger keeps no tensor alive. After the block it notices what is freed but nothing new; entered
    again, it goes on. Another ledger may run inside. Any thread may call `now`, `peak` and `timeline`.
    """

    def __init__(self, meta: bool = False) -> None:
        self._meta = meta
        # Re-entrant, for garbage collection inside a locked section may run code that makes tensors.
        self._lock = threading.RLock()
        self._recorder = _Recorder(self._note)
        self._recording = False
        self._growing: MutableMapping[Any, str] = WeakIdKeyDictionary()
        self._hooks: MutableMapping[Any, RemovableHandle | None] = WeakIdKeyDictionary()
        self._bytes = dict.fromkeys(OWNERS, 0)
        self._live: dict[int, _Record] = {}
        self._freed: deque[_Record] = deque()
        self._total = self._births = 0
        self._peak_total = self._peak_births = 0
        self._freed_since_peak: list[_Record] = []
        self._timeline = _Timeline()

    def __enter__(self) -> Self:
        """Start recording. Raises RuntimeError if this ledger is recording already."""
        if self._recording:
            raise RuntimeError("this ledger is recording already; use another MemoryLedger inside it")
        self._recorder.__enter__()
        self._recording = True
        self._hook(self._growing.items())
        return self

    def __exit__(self, *exception: object) -> None:
        self._recording = False
        self._recorder.__exit__(*exception)
        for hook in self._hooks.values():
            if hook is not None:
                hook.remove()
        self._hooks.clear()

    def own(self, name: str, thing: Thing) -> Thing:
        """Put the storages that `thing` holds now under `name`, and return `thing`.

        `thing` is a tensor, module, optimizer, mapping or iterable of these (an iterator is used up).
        The gradients its parameters get and the state an optimizer makes follow by themselves; a module
        that was moved, or has got an adapter, has new storages: own it again. A `Reference` stands for what
        it holds. Raises TypeError for anything else, ValueError for tensors on meta that do not count.
        """
        held = thing.held() if isinstance(thing, Reference) else thing
        _check_own(name, held)
        tensors = list(tensors_of(held))
        if not self._meta and any(tensor.is_meta for tensor in tensors):
            raise ValueError(
                f"{name!r} is on the meta device, where tensors have no memory: MemoryLedger(meta=True) "
                "counts them as if they were real"
            )
        leaves = [tensor for tensor in tensors if tensor.is_leaf]
        with self._lock:
            self._label(name, tensors)
            self._label(GRADIENTS, [leaf.grad for leaf in leaves])
            growing: list[tuple[Any, str]] = [(leaf, GRADIENTS) for leaf in leaves]
            growing += [(thing, name)] if isinstance(thing, Optimizer) else []
            self._growing.update(growing)
            if self._recording:
                self._hook(growing)
        return thing

    def after(self, operation: OpOverload, call: Callable[..., object]) -> None:
        """From now on, whenever the ledger has counted what `operation` made, give `call` its arguments."""
        self._recorder.after[operation] = call

    def now(self) -> dict[str, int]:
        """Return the bytes that live now, by owner; the five usual owners are always there."""
        with self._lock:
            self._settle()
            return dict(self._bytes)

    def peak(self) -> dict[str, int]:
        """Return the bytes, by owner, of the moment when their sum was highest.

        Who owns what is decided when asked: a storage that got its owner after the peak counts for it.
        """
        with self._lock:
            self._settle()
            before_peak = (r for r in self._live.values() if r.birth <= self._peak_births)
            owners = dict.fromkeys(self._bytes, 0)
            for record in chain(self._freed_since_peak, before_peak):
                owners[record.owner] += record.nbytes
            return owners

    def reset_peak(self) -> None:
        """Forget the peak so far: from now on `peak` speaks of what comes after this moment."""
        with self._lock:
            self._settle()
            self._peak_total, self._peak_births = self._total, self._births
            self._freed_since_peak = []

    @property
    def timeline(self) -> list[Point]:
        """Return (seconds since the ledger was made, bytes by owner) points, the last one for now.

        There are about a thousand at most, each the highest of its slice of time: peaks stay when
        slices grow. As in `peak`, a storage that got its owner later counts for it. Memory freed between
        operations is noticed by the next one, or when the ledger is asked.
        """
        with self._lock:
            self._settle()
            return [*self._timeline.points, (self._timeline.seconds(), dict(self._bytes))]

    def _label(self, name: str, held: object) -> None:
        """Give `name` the storages behind `held` that have no owner yet."""
        # A sparse tensor has no storage: its indices and values are tensors of their own.
        strided = [tensor for tensor in tensors_of(held) if tensor.layout is torch.strided]
        with self._lock:
            self._bytes.setdefault(name, 0)
            for storage in storages_of(strided).values():
                self._give(self._note(storage), name)

    def _give(self, record: "_Record | None", name: str) -> None:
        if record is not None and record.owner == REST:
            self._bytes[REST] -= record.nbytes
            self._bytes[name] += record.nbytes
            record.owner = name
            self._timeline.relabel(record, name)

    def _hook(self, growing: Iterable[tuple[Any, str]]) -> None:
        """Label what a parameter or an optimizer grows as soon as it has; one hook each."""
        for thing, name in growing:
            if self._hooks.get(thing) is None:
                self._hooks[thing] = self._hook_one(thing, name)

    def _hook_one(self, thing: Any, name: str) -> RemovableHandle | None:
        if isinstance(thing, Optimizer):
            return thing.register_step_post_hook(lambda optimizer, *_: self._label(name, optimizer))
        if thing.requires_grad:
            return thing.register_post_accumulate_grad_hook(lambda parameter: self._label(GRADIENTS, parameter.grad))
        return None

    def _note(self, storage: torch.UntypedStorage) -> "_Record | None":
        """Return the record of a storage that counts, a new one if the storage or its size is new."""
        with self._lock:
            if self._freed:
                self._settle()
            record = self._live.get(storage._cdata)
            if record is None:
                counts = self._meta or storage.device.type != "meta"
                return self._open(storage, REST) if counts else None
            if record.nbytes == storage.nbytes():
                return record
            self._settle()
            self._close(record)
            return self._open(storage, record.owner)

    def _open(self, storage: torch.UntypedStorage, owner: str) -> "_Record":
        # All that happens when a storage is freed, in whatever thread that is, is this append: it is
        # atomic and needs no lock. Handling it later misses nothing: no peak lies between two releases.
        record = _Record(storage, self._freed.append)
        self._births += 1
        record.key, record.nbytes = storage._cdata, storage.nbytes()
        record.owner, record.birth = owner, self._births
        self._live[record.key] = record
        self._bytes[owner] += record.nbytes
        self._total += record.nbytes
        record.seconds = self._timeline.add(self._total, self._bytes)
        return record

    def _close(self, record: "_Record") -> None:
        if self._live.get(record.key) is not record:
            return  # Closed before, when its storage was resized.
        del self._live[record.key]
        self._bytes[record.owner] -= record.nbytes
        self._total -= record.nbytes
        if record.birth <= self._peak_births:
            self._freed_since_peak.append(record)

    def _settle(self) -> None:
        """Close the records of freed storages; just before that the total is at a local high."""
        self._timeline.add(self._total, self._bytes)
        if self._total > self._peak_total:
            self._peak_total, self._peak_births = self._total, self._births
            self._freed_since_peak = []
        while self._freed:
            self._close(self._freed.popleft())


class _Record(weakref.ref[torch.UntypedStorage]):
    """What is known of one storage; weak, so that it keeps nothing alive."""

    __slots__ = ("birth", "key", "nbytes", "owner", "seconds")
    birth: int
    key: int
    nbytes: int
    owner: str
    seconds: float


class _Recorder(TorchDispatchMode):
    """Pass every operation on and hand the storages it may have made to `note`."""

    def __init__(self, note: Callable[[torch.UntypedStorage], object]) -> None:
        super().__init__()
        self._note = note
        self.after: dict[OpOverload, Callable[..., object]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # By default each call below is wrapped in `torch._disable_dynamo`, which takes several times as
        # long as all the rest of a ledger (torch 2.13); the next method keeps torch.compile out instead.
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if _may_allocate(func):
            for tensor in (result,) if isinstance(result, Tensor) else tensors_of(result):
                if tensor.layout is torch.strided:
                    self._note(tensor.untyped_storage())
            if func in self.after:
                self.after[func](*args)
        return result


@cache
def _may_allocate(operation: Any) -> bool:
    """Tell whether an operation can return a storage of new identity or size; a view, for one, cannot."""
    schema = operation._schema
    # These return an argument, but its storage was made out of sight (torch.tensor, torch.load) or resized.
    unseen = schema.name.startswith(("aten::lift", "aten::set_", "aten::resize"))
    return unseen or schema.overload_name == "out" or any(not r.alias_info for r in schema.returns)


class _Timeline:
    """At most LIMIT points, each the highest of its slice of time; slices double when they are full."""

    LIMIT = 1024

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._started = time.perf_counter()
        self._slice, self._slice_ends = 1e-3, 0.0
        self._high = 0

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def add(self, total: int, owners: Mapping[str, int]) -> float:
        """Note the bytes by owner, whose sum is `total`, and return the moment; called for each new storage."""
        seconds = self.seconds()
        if seconds >= self._slice_ends:
            self._slice_ends = seconds + self._slice
            self.points.append((seconds, dict(owners)))
        elif total > self._high:
            self.points[-1] = (seconds, dict(owners))
        else:
            return seconds
        self._high = total
        if len(self.points) > self.LIMIT:
            self._thin()
        return seconds

    def relabel(self, record: _Record, name: str) -> None:
        """Give `name` the bytes of a record that lives, in every point since its birth."""
        for seconds, owners in reversed(self.points):
            if seconds < record.seconds:
                return
            owners[REST] -= record.nbytes
            owners[name] = owners.get(name, 0) + record.nbytes

    def _thin(self) -> None:
        pairs = zip_longest(self.points[::2], self.points[1::2])
        self.points = [max(filter(None, pair), key=_total) for pair in pairs]
        self._slice *= 2


def _total(point: Point) -> int:
    return sum(point[1].values())


def _check_own(name: object, thing: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f'the name of an owner is a {type(name).__name__}; write own("policy", model)')
    if isinstance(thing, str) or not isinstance(thing, (Tensor, nn.Module, Optimizer, Iterable)):
        raise TypeError(
            f"{name!r} cannot own a {type(thing).__name__}: give a module, an optimizer, a tensor, "
            "or a mapping or list of these"
        )
