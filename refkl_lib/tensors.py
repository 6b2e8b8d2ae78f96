"""Storages: the bytes that tensors are views of.

Two tensors can share one storage (tied embeddings, views, a layer shared by policy and reference), so
bytes are counted by storage, never by tensor or by name.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

Storages = dict[int, torch.UntypedStorage]
_STANDS_FOR = ContextVar("_STANDS_FOR", default="meta")


def tensors_of(thing: object) -> Iterable[Tensor]:
    """Yield every tensor held by a tensor, module, optimizer, mapping or iterable of these."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from thing.parameters()
        yield from thing.buffers()
    elif isinstance(thing, torch.optim.Optimizer):
        yield from tensors_of(thing.state)
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from tensors_of(value)
    elif isinstance(thing, Iterable) and not isinstance(thing, str):
        for value in thing:
            yield from tensors_of(value)


def storages_of(thing: object) -> Storages:
    """Return the storages behind `thing`, each once, by identity; under ZeRO-3 this rank's shards."""
    held = [storage for tensor in tensors_of(thing) for storage in _behind(tensor)]
    return {storage._cdata: storage for storage in held}


def storage_bytes(thing: object, beyond: object = ()) -> int:
    """Return the bytes of storage behind `thing`, without those that `beyond` holds as well."""
    already = storages_of(beyond)
    return sum(s.nbytes() for key, s in storages_of(thing).items() if key not in already)


def device_type(tensor: Tensor) -> str:
    """Return "cpu", "cuda" …; of a tensor on meta that of the device it stands for (`meta_stands_for`)."""
    return _STANDS_FOR.get() if tensor.is_meta else tensor.device.type


@contextmanager
def meta_stands_for(device: str) -> Iterator[None]:
    """Let tensors on meta be taken for tensors on a device, "cpu" or "cuda", by what sizes its work by that."""
    token = _STANDS_FOR.set(device)
    try:
        yield
    finally:
        _STANDS_FOR.reset(token)


def is_partitioned(module: nn.Module) -> bool:
    """Tell whether any parameter is a ZeRO-3 partition (DeepSpeed marks those with `ds_id`)."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def _behind(tensor: Tensor) -> list[torch.UntypedStorage]:
    # A ZeRO-3 parameter is an empty tensor whose shard hangs on it as `ds_tensor`.
    shard = getattr(tensor, "ds_tensor", None)
    parts = [tensor] if shard is None else [tensor, shard]
    return [part.untyped_storage() for part in parts]
