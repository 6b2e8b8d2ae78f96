"""ZeRO-3: load the checkpoint again, partitioned over the ranks.

Under DeepSpeed ZeRO-3 a rank holds one shard of each parameter, so there is nothing whole to clone. The
reference is loaded from the checkpoint a second time, partitioned as well: it costs each of G ranks N/G,
where a model loaded plainly would cost each of them N.

    engine, *_ = deepspeed.initialize(model=policy, config=ds_config)      # on every rank of a job
    reference = ZeRO3Reference("smollm2", ds_config=ds_config)
    reference.logits(**batch)                                              # (B, T, V), no gradient

Whatever touches the weights gathers them from all ranks, so every rank has to call it: the passes,
`fingerprint` and `sync`.
"""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from refkl_lib.models import load_model
from refkl_lib.reference.base import Reference, evaluating
from refkl_lib.reference.mix import mix_weights

Offload = Literal["none", "cpu", "nvme"]

# What a job's configuration says about training; a model that only looks has no use for it.
TRAINING_KEYS = (
    "optimizer",
    "scheduler",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "elasticity",
    "flops_profiler",
)


class ZeRO3Reference(Reference):
    """A checkpoint loaded again as ZeRO-3 partitions, in a DeepSpeed engine without an optimizer.

    `source` is what the policy was loaded from (see `load_model`): changes made to the policy in memory,
    resized embeddings say, are not in it. `ds_config` is the job's own configuration, a dict or the path of a
    JSON file, or else the one that transformers holds (`HfDeepSpeedConfig`). `dtype` and `offload` (where the
    shards wait: "none" keeps them on the device) are the job's unless given. On "nvme" DeepSpeed keeps shards of less
    than 1 MiB in memory, and leaves its files in `nvme_path` when the job ends.
    Raises ImportError without deepspeed, RuntimeError outside of a distributed job or for "nvme" where DeepSpeed
    cannot reach it, ValueError for an offload that is unknown or lacks its `nvme_path`, and as `load_model` does.
    """

    strategy = "zero3"

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        ds_config: dict[str, Any] | str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        offload: Offload | None = None,
        nvme_path: str | os.PathLike[str] | None = None,
    ) -> None:
        deepspeed = _deepspeed_in_a_job()
        config = reference_config(_read(ds_config), dtype, offload, nvme_path)
        _check_nvme(config)
        with _loading_partitioned(config):
            model = load_model(source, dtype=_dtype_of(config))
        _size_buckets(config, model.config.get_text_config().hidden_size)
        self.engine = deepspeed.initialize(model=model.requires_grad_(False), config=config)[0]
        self.engine.eval()

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """Give the engine, which gathers each layer for as long as the layer computes."""
        try:
            with evaluating(self.engine) as engine:
                yield engine
        except BaseException as error:
            # A pass that broke off leaves its layers gathered and marked as in use.
            try:
                self.engine.empty_partition_cache()
            except Exception as second:  # with a rank lost, this fails as well, and would hide why
                error.add_note(f"and its layers could not be let go: {second}")
            raise

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Return the parameters, gathered one at a time, and the buffers; every rank has to come along."""
        return gathered_weights(self.engine.module)

    def held(self) -> nn.Module:
        """Return the model: this rank's shards and, after a pass, the small persistent weights."""
        return self.engine.module

    def sync(self, policy: nn.Module, alpha: float = 1.0) -> None:
        """Move every weight towards the policy's, one at a time; the policy may be an engine or a module.

        Raises ValueError if alpha is not in [0, 1] or the two models do not have the same weights.
        """
        mix_weights(self.engine.module, getattr(policy, "module", policy), alpha, whole=_both_gathered)


def source_of(policy: nn.Module) -> str:
    """Return the checkpoint that a policy, its adapter's base or an engine's module was loaded from.

    transformers notes it in the configuration (`name_or_path`); TRL finds it there as well. Raises ValueError if there
    is no such note.
    """
    source = getattr(getattr(policy, "module", policy), "name_or_path", "")
    if not source:
        raise ValueError(
            "a zero3 reference loads the policy's checkpoint again, and this policy was not loaded from one: save it "
            'first, and give the folder, create_reference(policy, "zero3", source=folder)'
        )
    return source


def gathered_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a partitioned module's parameters, gathered one at a time, and its buffers; on every rank."""
    for name, parameter in module.named_parameters():
        with gathered(parameter):
            yield name, parameter
    yield from module.named_buffers()


def gathered(weight: Tensor, modifier_rank: int | None = None) -> AbstractContextManager[object]:
    """Gather one weight whole for a block, on every rank; one that is not partitioned is whole already.

    With `modifier_rank`, the weight is that rank's after the block, on all of them.
    """
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=modifier_rank)


def reference_config(
    job: dict[str, Any],
    dtype: torch.dtype | None = None,
    offload: Offload | None = None,
    nvme_path: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a reference beside a job's: stage 3, nothing that trains.

    Raises ValueError for an offload that is unknown or lacks its `nvme_path`.
    """
    config = _without_auto({key: v for key, v in deepcopy(job).items() if key not in TRAINING_KEYS})
    config.setdefault("train_micro_batch_size_per_gpu", 1)
    dtype = dtype or _dtype_of(config)
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    config["fp16"] = {"enabled": dtype == torch.float16}
    # The keys are nested: DeepSpeed overlooks "zero_optimization.stage" without a word.
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = 3
    zero.pop("offload_optimizer", None)
    # Spares the backward pass memory by exchanging torch's linear for the whole process; here is no backward.
    zero.setdefault("memory_efficient_linear", False)
    if offload is not None:
        zero["offload_param"] = _offload(offload, nvme_path)
    return config


def _offload(where: Offload, nvme_path: str | os.PathLike[str] | None) -> dict[str, Any]:
    if where not in ("none", "cpu", "nvme"):
        raise ValueError(f'offload is {where!r}, but must be "none", "cpu" or "nvme"')
    if where != "nvme":
        return {"device": where}
    if nvme_path is None:
        raise ValueError('offload="nvme" needs nvme_path=, a folder on the disk that is to hold the shards')
    return {"device": where, "nvme_path": os.fspath(nvme_path)}


def _size_buckets(config: dict[str, Any], hidden: int) -> None:
    """Size what is kept and fetched ahead by the model, as transformers' "auto" does, unless the job says."""
    zero = config["zero_optimization"]
    zero.setdefault("stage3_param_persistence_threshold", 10 * hidden)
    zero.setdefault("stage3_prefetch_bucket_size", int(0.9 * hidden * hidden))


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config without the values that a transformers `Trainer` would have filled in."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != "auto"
    }


def _dtype_of(config: dict[str, Any]) -> torch.dtype:
    if config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if config.get("fp16", {}).get("enabled") else torch.float32


def _read(ds_config: dict[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    from transformers.integrations.deepspeed import deepspeed_config

    if ds_config is None:
        return deepspeed_config() or {}
    return ds_config if isinstance(ds_config, dict) else json.loads(Path(ds_config).read_text())


def _deepspeed_in_a_job() -> ModuleType:
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            "a ZeRO-3 reference needs deepspeed, which this environment lacks (it runs on Linux; on Windows use "
            'WSL). Everywhere else keep a "clone" or an "adapter" reference'
        ) from error
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError(
            "ZeRO-3 partitions a model over the ranks of a job, and this process is not one of them. Start it "
            "with a launcher (deepspeed --num_gpus 2 script.py), call launch_zero3(), or in a single process keep "
            'a "clone" or an "adapter" reference'
        )
    return deepspeed


def _check_nvme(config: dict[str, Any]) -> None:
    if config["zero_optimization"].get("offload_param", {}).get("device") != "nvme":
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise RuntimeError(
            'offload="nvme" needs DeepSpeed\'s async_io operator, which cannot be built here: install libaio '
            '(on Debian and Ubuntu: apt install libaio-dev) and a C++ compiler, or use offload="cpu"'
        )


@contextmanager
def _loading_partitioned(config: dict[str, Any]) -> Iterator[None]:
    """Make transformers load models as partitions for a block, then put back what the job had set."""
    from transformers.integrations import deepspeed as integration

    before = integration._hf_deepspeed_config_weak_ref
    # transformers only keeps a weak reference: the configuration is in force while this name holds it.
    ours = integration.HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        del ours
        integration._hf_deepspeed_config_weak_ref = before


@contextmanager
def _both_gathered(weight: Tensor, policys: Tensor) -> Iterator[None]:
    """Gather a weight of the reference, to be changed, and the policy's."""
    # On leaving, rank 0's result goes to all ranks and the shards are cut anew. A persistent weight gives up
    # its full copy, too, and is gathered again by the next pass.
    with gathered(weight, modifier_rank=0), gathered(policys):
        yield
