"""What one rank trains: a policy partitioned by ZeRO-3, and its reference.

All ranks work on the same batch, where a real job would give each its own, so that their KL is the one
that a single process computes.
"""

import argparse
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from refkl_lib.memory.ledger import MemoryLedger
from refkl_lib.models import load_model
from refkl_lib.ranks.checkpoint import check_same_checkpoint
from refkl_lib.ranks.config import job_config
from refkl_lib.ranks.events import tell
from refkl_lib.ranks.plain import PlainReference
from refkl_lib.ranks.save import save_policy
from refkl_lib.ranks.watch import tell_held, watching
from refkl_lib.reference.base import Reference, fingerprint_of
from refkl_lib.reference.zero3 import ZeRO3Reference, gathered_weights
from refkl_lib.step import TimedReference, policy_loss
from refkl_lib.tensors import storage_bytes
from refkl_lib.text import sample_batch


def train(settings: argparse.Namespace) -> None:
    """Load policy and reference, take the steps, and tell at each phase what was held and computed."""
    connect(settings.comm_timeout)
    tell("imported")
    check_same_checkpoint(settings.model)
    config = job_config(settings.learning_rate)
    policy = load_policy(settings, config)
    tell_held(policy=policy)
    reference = load_reference(settings, policy, config)
    tell("loaded")
    tell_held(policy=policy, reference=reference.held())
    engine = make_engine(policy, config)
    tell(
        "initialised",
        policy_bytes=storage_bytes(engine.module),
        reference_bytes=reference.owned_bytes(),
        reference_fingerprint=reference.fingerprint(),
    )
    with MemoryLedger() as ledger, watching(ledger) as gathers:
        own(ledger, engine, reference)
        for facts in steps(engine, reference, settings):
            tell("step", **facts)
        optimizer, gradients = optimizer_and_gradients(engine)
        held = {
            "optimizer_bytes": storage_bytes(optimizer),
            "gradient_bytes": storage_bytes(gradients),
            "gather_peak": gathers.peak,
            "peak": ledger.peak(),
        }
        if settings.save_to is not None:
            save_policy(engine.module, settings.model, Path(settings.save_to))
            tell("saved")
        policy_fingerprint = fingerprint_of(gathered_weights(engine.module))
        reference_fingerprint = reference.fingerprint()
    tell("done", **held, policy_fingerprint=policy_fingerprint, reference_fingerprint=reference_fingerprint)
    torch.distributed.destroy_process_group()


def connect(timeout: float = 600.0) -> None:
    """Join the other ranks; RuntimeError if, now or later, one keeps this one waiting for `timeout` seconds."""
    if get_accelerator().device_name() == "cpu":
        # An operator for inference alone: it takes a compiler and a minute to build, and leaves shared
        # memory behind when a rank is killed. Training talks through gloo with it or without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Models are loaded to the current GPU, which else would be the same one for all ranks of a host.
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout))


def load_policy(settings: argparse.Namespace, config: dict[str, Any]) -> nn.Module:
    """Return the policy, partitioned, with an adapter if one is to be trained."""
    in_force = HfDeepSpeedConfig(config)  # transformers loads partitioned for as long as this lives
    policy = load_model(settings.model)
    del in_force
    if settings.lora_rank is None:
        return policy
    from refkl_lib.reference.adapter import add_lora

    torch.manual_seed(settings.seed)
    return add_lora(policy, settings.lora_rank)


def load_reference(settings: argparse.Namespace, policy: nn.Module, config: dict[str, Any]) -> Reference:
    """Return the reference, kept as the settings say; for an adapter that is switched off nothing is loaded."""
    if settings.reference == "plain":
        return PlainReference(settings.model)
    if settings.reference == "adapter":
        from refkl_lib.reference.adapter import AdapterReference

        return AdapterReference(policy)
    return ZeRO3Reference(settings.model, ds_config=config, offload=settings.offload, nvme_path=settings.nvme_path)


def make_engine(policy: nn.Module, config: dict[str, Any]) -> Any:
    """Return the DeepSpeed engine that trains what is trainable in the policy."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=policy, model_parameters=trained, config=config)
    return engine


def own(ledger: MemoryLedger, engine: Any, reference: Reference) -> None:
    """Tell the ledger whose the storages are that a ZeRO-3 job keeps."""
    optimizer, gradients = optimizer_and_gradients(engine)
    ledger.own("policy", engine.module)
    ledger.own("reference", reference)
    ledger.own("optimizer", engine.optimizer.optimizer)
    ledger.own("optimizer", optimizer)
    ledger.own("gradients", gradients)


def optimizer_and_gradients(engine: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return what DeepSpeed keeps beside this rank's shards to train them, in two lists.

    The optimizer's are AdamW's two moments and the float32 weights it works on (on CPU ranks a copy of the
    shards); the gradients come with the buffer they are reduced in.
    """
    zero = engine.optimizer
    state = [t for entry in zero.optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
    buffers = [bucket.buffer for bucket in zero.ipg_buckets.values()]
    return [*zero.fp32_partitioned_groups_flat, *state], [zero.grad_partitions_flat_buffer, *buffers]


def steps(engine: Any, reference: Reference, settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train, and yield for each step its loss, its KL (nats per token, before the step) and its seconds."""
    text = sample_batch(settings.model, settings.batch, settings.seq)
    batch = {name: tensor.to(engine.device) for name, tensor in text.items()}
    timed = TimedReference(reference)
    for step in range(settings.steps):
        start = time.perf_counter()
        loss, kl = policy_loss(engine, timed, batch, settings.beta)
        engine.backward(loss)
        engine.step()
        get_accelerator().synchronize()
        yield {
            "step": step,
            "loss": loss.item(),
            "kl": kl.item(),
            "seconds": time.perf_counter() - start,
            "reference_seconds": timed.seconds[-1],
        }
