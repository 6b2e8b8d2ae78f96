"""ZeRO-3 as far as memory goes: what a rank holds of a model, and what is whole for a while.

The sizes are those of DeepSpeed 0.19 (`DeepSpeedZeroOptimizer_Stage3`): every parameter is cut into pieces of
⌈numel / ranks⌉; of what trains a rank keeps a flat gradient, and a float32 copy with the optimizer's states; gradients
are reduced in a bucket of fixed size. A parameter is whole while its module computes, there and back; a small one
(`stage3_param_persistence_threshold`) from its first use on, unless the model makes two passes a step.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refkl_lib.memory.optimizers import BLOCK
from refkl_lib.ranks.shards import shards
from refkl_lib.tensors import tensors_of


@dataclass(frozen=True)
class Zero3:
    """How a job is partitioned: sizes in elements, and what waits off the device (None: nothing)."""

    ranks: int
    reduce_bucket: int
    prefetch_bucket: int
    persistence_threshold: int
    max_live: int
    max_reuse_distance: int
    sub_group: int
    offload_optimizer: str | None
    offload_param: str | None


def zero3_of(ds_config: Mapping[str, Any] | str | os.PathLike[str] | None, ranks: int, hidden: int) -> Zero3:
    """Return what a DeepSpeed configuration, a dict or the path of a JSON file, says of memory.

    "auto" is what transformers puts in its place, which for sizes that are not given at all is taken as well
    where it depends on the model; the others are DeepSpeed's defaults. Raises ValueError for another stage than 3.
    """
    config = ds_config if isinstance(ds_config, Mapping | None) else json.loads(Path(ds_config).read_text())
    zero = dict((config or {}).get("zero_optimization", {}))
    if (stage := zero.get("stage", 3)) != 3:
        raise ValueError(f'ds_config["zero_optimization"]["stage"] is {stage}, but what is priced here is stage 3')

    def size(key: str, auto: int) -> int:
        return int(auto if zero.get(key, "auto") == "auto" else zero[key])

    return Zero3(
        ranks,
        reduce_bucket=size("reduce_bucket_size", hidden * hidden),
        prefetch_bucket=size("stage3_prefetch_bucket_size", int(0.9 * hidden * hidden)),
        persistence_threshold=size("stage3_param_persistence_threshold", 10 * hidden),
        max_live=size("stage3_max_live_parameters", 10**9),
        max_reuse_distance=size("stage3_max_reuse_distance", 10**9),
        sub_group=size("sub_group_size", 10**9),
        offload_optimizer=_device(zero, "offload_optimizer"),
        offload_param=_device(zero, "offload_param"),
    )


def _device(zero: Mapping[str, Any], key: str) -> str | None:
    device = (zero.get(key) or {}).get("device", "none")
    return None if device == "none" else device


def trained_elements(model: nn.Module, ranks: int) -> int:
    """Return how many elements of what trains one rank holds, with padding."""
    training = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return sum(shard.per_rank for shard in shards(model, ranks) if shard.name in training)


class Gathering:
    """Whole weights: those of the module that computes, one module at a time, forward and backward; small ones stay.

    With `twice`, of a model that makes two passes a step, they do not: DeepSpeed then never learns in which order the
    modules compute, fetches nothing ahead, and lets small weights go with their module until the step is over
    (`PartitionedParameterCoordinator.release_sub_module`).
    """

    def __init__(self, zero: Zero3, own: Callable[[list[Tensor]], object], twice: bool = False) -> None:
        self._zero, self._own, self._twice = zero, own, twice
        self._kept: dict[Tensor, Tensor] = {}
        self._held: list[Tensor] = []

    def keep(self, model: nn.Module) -> None:
        """Gather a model's small weights, as they are between two steps."""
        small = [weight for weight in model.parameters() if self._is_small(weight)] if self._zero.ranks > 1 else []
        self._kept |= {weight: _whole(weight, self._zero.ranks) for weight in small}
        self._own(list(self._kept.values()))

    def let_go(self, model: nn.Module) -> None:
        """Leave a model in pieces, as it is while the optimizer steps."""
        for weight in model.parameters():
            self._kept.pop(weight, None)

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Gather the weights of a model's modules in a block."""
        hooks = []
        for module in model.modules() if self._zero.ranks > 1 else ():
            moving = [w for w in module.parameters(recurse=False) if self._twice or not self._is_small(w)]
            if moving:
                hooks += [module.register_forward_pre_hook(partial(self._gather, moving))]
                hooks += [module.register_forward_hook(partial(self._passed, moving))]
        try:
            yield
        finally:
            self._held = []
            for hook in hooks:
                hook.remove()

    def _is_small(self, weight: Tensor) -> bool:
        return weight.numel() <= self._zero.persistence_threshold

    def _gather(self, weights: list[nn.Parameter], *_: object) -> None:
        self._held = []  # before the next ones are there
        self._held = [_whole(weight, self._zero.ranks) for weight in weights if weight not in self._kept]
        self._own(self._held)

    def _passed(self, weights: list[nn.Parameter], _module: nn.Module, _inputs: object, output: Any) -> None:
        self._held = []
        for weight in weights:
            self._kept.pop(weight, None)
        first = output if isinstance(output, Tensor) else output[0]
        if first.requires_grad:
            first.register_hook(partial(self._gather, weights))


def held_by_a_rank(
    zero: Zero3,
    policy: nn.Module,
    reference: nn.Module | None,
    partitioned: bool,
    offload: str | None,
    optimizer: str,
    on_gpu: bool,
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Return tensors of the sizes that a rank holds between two steps, by owner: on its device, and in host memory.

    `partitioned` says whether the reference's own model is, `offload` where its shards wait.
    """
    elements = trained_elements(policy, zero.ranks)
    width = next(policy.parameters()).dtype
    # In full precision on a GPU, DeepSpeed's optimizer works on the shards themselves.
    copied = not (width == torch.float32 and on_gpu and zero.offload_optimizer is None)
    states = optimizer_states(elements, optimizer, copied)
    flat, bucket = _empty(elements, width), _empty(zero.reduce_bucket, width)
    device: dict[str, list[Tensor]] = {"policy": [], "reference": [], "gradients": [bucket], "optimizer": []}
    host: dict[str, list[Tensor]] = {"policy": [], "reference": [], "gradients": [], "optimizer": []}
    (host if zero.offload_param == "cpu" else device)["policy"] += _cut(policy, zero.ranks)
    device["policy"] += policy.buffers()
    if zero.offload_optimizer is None:
        device["gradients"].append(flat)
        device["optimizer"] = states
    elif zero.offload_optimizer == "cpu":
        host["gradients"] += [flat, _empty(elements, torch.float32)]  # as they come, and as the optimizer takes them
        host["optimizer"] = states
    if reference is not None and partitioned:
        waits = offload or zero.offload_param
        if waits != "nvme":
            (host if waits == "cpu" else device)["reference"] += _cut(reference, zero.ranks)
        device["reference"] += reference.buffers()
    elif reference is not None:
        device["reference"] = list(tensors_of(reference))
    return device, host


def optimizer_states(elements: int, name: str, copied: bool) -> list[Tensor]:
    """Return tensors of the sizes that an optimizer keeps of flat weights, on meta; float32 masters if `copied`."""
    flats = [_empty(elements, torch.float32)] if copied else []
    if name == "sgd":
        return flats
    if name == "adamw8bit":
        scales = [_empty(-(-elements // BLOCK), torch.float32) for _ in range(2)]
        return [*flats, *(_empty(elements, torch.uint8) for _ in range(2)), *scales]
    steps = _empty(1, torch.float32)
    return [*flats, *(_empty(elements, torch.float32) for _ in range(2)), steps]


def kept_whole(zero: Zero3, elements: int) -> int:
    """Return how many of a model's elements may be whole beside the module that computes.

    They are fetched ahead, or not yet released. It is what DeepSpeed may keep, and so the most it will.
    """
    if zero.ranks == 1:
        return 0
    return min(elements, max(zero.prefetch_bucket, min(zero.max_live, zero.max_reuse_distance)))


def optimizer_transient(zero: Zero3, elements: int, width: int, in_one_kernel: bool) -> int:
    """Return the bytes that a step of the optimizer makes on the device: one group's gradients, and its arithmetic."""
    if zero.offload_optimizer is not None:
        return 0
    gradient = 4 if in_one_kernel else 12  # PyTorch's AdamW in single operations: two more of that size
    return min(elements, zero.sub_group) * max(gradient, 4 + width if width < 4 else 0)


def _cut(model: nn.Module, ranks: int) -> list[Tensor]:
    """Return tensors of the sizes of one rank's shards."""
    return [_empty(shard.per_rank, shard.dtype) for shard in shards(model, ranks)]


def _empty(elements: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(elements, dtype=dtype, device="meta")


def _whole(weight: Tensor, ranks: int) -> Tensor:
    """Return a tensor of the size that a weight is gathered into: all pieces, with their padding."""
    return _empty(-(-weight.numel() // ranks) * ranks, weight.dtype)
