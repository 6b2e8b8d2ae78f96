"""The price of a run that has not happened, read from its own code.

    bill = price("Qwen2.5-7B", "adapter", lora_rank=16, batch=4, seq=2048, checkpointing=True)
    bill                                # a table: bytes by owner, at the peak and at rest
    bill.fits(80 * 2**30)               # true or false, and why
    bill.reference_adds                 # how much lower the peak would be without a reference

One training step runs on tensors that have only a shape: the strategy's code, the KL's, the optimizer's, and a ledger
that counts. Nothing is downloaded but a config.json, and nothing is computed, so that a model of 405 billion parameters
takes seconds. On a CPU, the bill is what a ledger counts of the real step, to the byte.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from transformers import PreTrainedConfig, PreTrainedModel

from refkl_lib.counts import check_counts
from refkl_lib.memory.bill import Bill
from refkl_lib.memory.extrapolate import at_depth, depths_for, period_of
from refkl_lib.memory.meta import Device
from refkl_lib.memory.optimizers import OPTIMIZERS, OptimizerName
from refkl_lib.memory.partition import Zero3, kept_whole, optimizer_transient, zero3_of
from refkl_lib.memory.shapes import Model, config_of
from refkl_lib.memory.trace import Attention, Precision, Step, Trace, layers_of, model_of, trace
from refkl_lib.models.load import ONE_AT_A_TIME
from refkl_lib.step import KLFrom
from refkl_lib.units import show_bytes

STRATEGIES = ("clone", "adapter", "zero3", "plain", "swap", "precomputed")
_OF_A_WHOLE_POLICY = ("clone", "swap", "precomputed")
_NOTES = {
    "swap": "in each rank's host memory wait the reference's weights and, in its pass, the policy's beside them; not "
    "counted: PyTorch takes pinned memory in blocks of a power of two, up to twice as much",
    "precomputed": "the reference's log-probs are on disk, and the KL is estimated from them (k2)",
}


def price(
    model: Model,
    strategy: str,
    *,
    batch: int = 1,
    seq: int = 1024,
    dtype: Precision = "bf16",
    optimizer: OptimizerName = "adamw",
    lora_rank: int | None = None,
    targets: str | tuple[str, ...] = "all-linear",
    ranks: int = 1,
    checkpointing: bool = False,
    attention: Attention | None = None,
    kl: KLFrom | None = None,
    sync: float | None = None,
    ds_config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    offload: str | None = None,
    device: Device = "cuda",
) -> Bill:
    """Return what one step of KL-regularised training will hold, on each rank, when steps have gone before.

    `model` is a name, a folder or a configuration (`config_of`). `strategy` is "clone", "adapter", "swap" (weights that
    wait in host memory) or "precomputed" (log-probs on disk) of a whole policy, one on each of `ranks` GPUs; "zero3",
    policy and reference partitioned over the ranks; "plain", the reference whole beside a partitioned policy; or
    "adapter" with a `ds_config`, of a partitioned policy. `ds_config`, a dict or a JSON file, sizes ZeRO-3's buckets;
    "auto" is what transformers makes of it.

    - `batch` sequences of `seq` tokens on each rank; `lora_rank=None` trains all weights.
    - `dtype`: "fp32"; "bf16", weights, gradients and moments; "mixed", bf16 weights and gradients with float32 master
      weights and moments. ZeRO-3 always has these masters. Adapters are float32, as PEFT makes them.
    - `optimizer`: "adamw" (on a GPU in one kernel, transformers' default), "adamw8bit" (as bitsandbytes 0.45 lays out
      its states), or "sgd".
    - `attention`: "sdpa" or "eager"; if not given, what transformers takes for this model.
    - `kl`: "linear", from hidden states, or "full", from whole logits; ZeRO-3 can do "full" alone.
    - `sync`: the reference follows with this alpha in the step. `offload`: "cpu" or "nvme", where a partitioned
      reference's shards wait.
    - `device`: "cuda", or "cpu" for a bill to hold against a real step.

    Not in the bill: the CUDA context, rounding by its allocator (to 512 bytes a tensor, and its fragments), and scratch
    memory inside a kernel; `Bill.fits` leaves room for them. Raises ValueError or TypeError for arguments that are
    wrong or do not go together, and as `config_of` and the strategy do.
    """
    settings = {name: value for name, value in locals().items() if name != "model"}
    _check(settings)
    config = copy.deepcopy(config_of(model))  # transformers notes in it what a model is made of
    label = config.model_type if isinstance(model, PreTrainedConfig) else os.fspath(model)
    return _bill(config, label, settings)


def _bill(config: PreTrainedConfig, label: str, settings: dict[str, Any], with_reference: bool = True) -> Bill:
    with ONE_AT_A_TIME:
        return _traced_bill(config, label, settings, with_reference)


def _traced_bill(config: PreTrainedConfig, label: str, settings: dict[str, Any], with_reference: bool) -> Bill:
    step = _step_of(config, settings)
    if not with_reference:
        step = replace(step, strategy=None, sync=None)
    whole = model_of(config, step, "meta")
    parameters = sum(weight.numel() for weight in whole.parameters())
    found = _finished(_trace_at_depth(whole, step), step, settings["ranks"], parameters)
    return Bill(
        model=label,
        parameters=parameters,
        trained=found.sizes["trained"],
        settings=settings if with_reference else settings | {"strategy": None},
        owners=max((owners for _, owners in found.moments), key=lambda owners: sum(owners.values())),
        at_rest=found.at_rest,
        moments=found.moments,
        reference_bytes=found.sizes["reference"],
        host=_host(found),
        layers=len(layers_of(whole)),
        assumptions=tuple(_assumptions(whole, step, settings["ranks"])),
        _without=partial(_bill, config, label, settings, False) if with_reference else None,
    )


def _step_of(config: PreTrainedConfig, settings: dict[str, Any]) -> Step:
    zero = None
    if _is_partitioned(settings):
        zero = zero3_of(settings["ds_config"], settings["ranks"], config.get_text_config().hidden_size)
    kl: KLFrom = settings["kl"] or ("linear" if zero is None else "full")
    apart = ("kl", "ranks", "ds_config")
    return Step(config=config, kl=kl, zero=zero, **{k: v for k, v in settings.items() if k not in apart})


def _is_partitioned(settings: dict[str, Any]) -> bool:
    return settings["strategy"] in ("zero3", "plain") or settings["ds_config"] is not None


def _trace_at_depth(model: PreTrainedModel, step: Step) -> Trace:
    """Trace two shallow models of the same layers if that gives the trace of the deep one, else the deep one itself."""
    layers = layers_of(model)
    period = period_of(layers)
    depths = depths_for(len(layers), period)
    if depths is not None:
        shallow, deeper = (trace(replace(step, config=with_layers(step.config, depth))) for depth in depths)
        found = at_depth((shallow, deeper), depths, period, len(layers))
        if found is not None:
            return found
    return trace(step)


def with_layers(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """Return the configuration of the same model with its first `depth` layers alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return config


def _finished(found: Trace, step: Step, ranks: int, parameters: int) -> Trace:
    """Return a trace with what comes of several ranks."""
    if step.zero is not None:
        return _with_zero3(found, step, step.zero, parameters)
    if ranks > 1:
        # DistributedDataParallel reduces gradients in buckets that are copies of them (gradient_as_bucket_view=False).
        return _plus(found, "gradients", found.sizes["trained bytes"])
    return found


def _plus(found: Trace, owner: str, nbytes: int) -> Trace:
    at_rest = found.at_rest | {owner: found.at_rest[owner] + nbytes}
    moments = tuple((moment, owners | {owner: owners[owner] + nbytes}) for moment, owners in found.moments)
    return replace(found, at_rest=at_rest, moments=moments)


def _with_zero3(found: Trace, step: Step, zero: Zero3, parameters: int) -> Trace:
    width = 4 if step.dtype == "fp32" else 2
    adapters = 0 if step.lora_rank is None else found.sizes["trained"]
    # Of a policy that makes two passes a step nothing stays (`Gathering`).
    models = [] if step.strategy == "adapter" else [parameters + adapters]
    models += [parameters] if step.strategy == "zero3" else []
    ahead = sum(kept_whole(zero, elements) for elements in models) * width
    *passes, (optimizer, held) = found.moments
    passes = [(moment, owners | {"gathered": owners["gathered"] + ahead}) for moment, owners in passes]
    elements = found.sizes["trained elements"]
    transient = optimizer_transient(zero, elements, width, step.device == "cuda" or step.optimizer != "adamw")
    stepping = held | {"activations": held["activations"] + transient}
    return replace(found, moments=(*passes, (optimizer, stepping)))


def _host(found: Trace) -> dict[str, int]:
    owners = {name.removeprefix("host "): size for name, size in found.sizes.items() if name.startswith("host ")}
    return {owner: size for owner, size in owners.items() if size}


def _assumptions(model: PreTrainedModel, step: Step, ranks: int) -> Iterator[str]:
    """Yield what the numbers of a bill rest on."""
    yield {
        "fp32": "weights, gradients and the optimizer's states are float32",
        "bf16": "weights, gradients and the optimizer's states are bfloat16; adapters and theirs float32",
        "mixed": "weights and gradients are bfloat16; master weights and the optimizer's states are float32",
    }["mixed" if step.zero is not None and step.dtype == "bf16" else step.dtype]
    yield f"attention is {_attention(model, step)}"
    whose = "the policy's" if step.strategy in (None, "precomputed") else "both models'"
    yield "no logits (B, T, V) are kept" if step.kl == "linear" else f"{whose} logits (B, T, V) are whole"
    if step.strategy in _NOTES:
        yield _NOTES[step.strategy]
    if step.device == "cuda" and step.optimizer == "adamw":
        yield "the optimizer's step is one kernel, without memory of its own"
    if step.optimizer == "adamw8bit":
        yield "the optimizer's states have 8 bits and a float32 scale for each 256 (bitsandbytes)"
    if step.zero is not None:
        yield from _zero3_assumptions(step.zero, twice=step.strategy == "adapter")
    elif ranks > 1:
        yield f"each of {ranks} ranks holds all of this; gradients are counted twice, for buckets of them are reduced"
    if step.device == "cuda":
        yield f"not counted: the CUDA context, the allocator's rounding and fragments, and {_scratch(model, step)}"


def _zero3_assumptions(zero: Zero3, twice: bool) -> Iterator[str]:
    yield f"weights, gradients and states are cut over {zero.ranks} ranks, padded as DeepSpeed does"
    yield f"a bucket of {zero.reduce_bucket:,} elements reduces the gradients"
    if twice:
        yield "with two passes a step DeepSpeed keeps no weight gathered for its next use, and fetches none ahead"
    elif zero.ranks > 1 and min(zero.max_live, zero.max_reuse_distance) > 0:
        yield "of each model all that may stay gathered (stage3_max_live_parameters) is counted: the most there can be"


def _attention(model: PreTrainedModel, step: Step) -> str:
    chosen = model.config.get_text_config()._attn_implementation
    if chosen == "eager":
        return "eager: scores of every token pair are whole"
    if step.device == "cuda" and step.dtype == "fp32":
        return (
            "sdpa: no flash kernel takes float32, so where queries share keys the scores of all token pairs are whole"
        )
    return "sdpa in one kernel: no scores of token pairs are kept"


def _scratch(model: PreTrainedModel, step: Step) -> str:
    """Return what a backward pass through flash attention keeps of dQ in float32, in words."""
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return (
        "a kernel's scratch memory: in attention's backward pass "
        f"{show_bytes(4 * step.batch * step.seq * text.num_attention_heads * width)} for one layer at a time"
    )


def _check(settings: dict[str, Any]) -> None:
    _check_choice("strategy", settings["strategy"], STRATEGIES)
    _check_choice("dtype", settings["dtype"], get_args(Precision))
    _check_choice("optimizer", settings["optimizer"], OPTIMIZERS)
    _check_choice("device", settings["device"], get_args(Device))
    _check_choice("attention", settings["attention"], (None, *get_args(Attention)))
    _check_choice("kl", settings["kl"], (None, *get_args(KLFrom)))
    _check_choice("offload", settings["offload"], (None, "cpu", "nvme"))
    check_counts(batch=settings["batch"], ranks=settings["ranks"])
    if settings["lora_rank"] is not None:
        check_counts(lora_rank=settings["lora_rank"])
    check_counts(2, "a token, and the one that follows it", seq=settings["seq"])
    _check_together(settings)


def _check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {choices}")


def _check_together(settings: dict[str, Any]) -> None:
    strategy, partitioned = settings["strategy"], _is_partitioned(settings)
    if strategy == "adapter" and settings["lora_rank"] is None:
        raise ValueError('strategy "adapter" has no adapter to switch off: give lora_rank=16, say')
    if strategy == "swap" and settings["lora_rank"] is not None:
        raise ValueError(
            f"lora_rank is {settings['lora_rank']}, but with an adapter there is nothing to swap: use "
            'strategy="adapter", which switches it off'
        )
    if strategy in _OF_A_WHOLE_POLICY and partitioned:
        raise ValueError(
            f"ds_config partitions the policy, and of shards there is no {strategy} reference here: use "
            'strategy="zero3", "adapter" with a lora_rank, or "plain", a whole copy on every rank'
        )
    if partitioned and settings["kl"] == "linear":
        raise ValueError(
            'kl="linear" needs the head in one piece, which ZeRO-3 has only during a forward pass: use kl="full"'
        )
    if settings["offload"] is not None and strategy != "zero3":
        raise ValueError(
            f'offload={settings["offload"]!r} is for the shards of strategy="zero3", but strategy is {strategy!r}'
        )
    if settings["sync"] is not None and (partitioned or strategy != "clone"):
        raise ValueError(
            f'sync={settings["sync"]} is priced for strategy="clone" alone, but strategy is {strategy!r}: leave it out'
        )
