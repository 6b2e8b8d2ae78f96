"""A rank of test_zero3.py: it looks at a ZeRO3Reference from inside a real job, and tells what it found.

All ranks make the same checks in the same order: whatever gathers weights needs every one of them.
"""

import os
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from torch import Tensor, nn
from transformers.integrations import deepspeed as integration

from refkl_lib.models import load_model
from refkl_lib.ranks.config import job_config
from refkl_lib.ranks.events import tell
from refkl_lib.ranks.training import connect, make_engine
from refkl_lib.reference.adapter import add_lora
from refkl_lib.reference.clone import CloneReference
from refkl_lib.reference.zero3 import ZeRO3Reference
from refkl_lib.tensors import is_partitioned
from refkl_lib.text import sample_batch

JOB = job_config(learning_rate=1e-3)
RANKS = int(os.environ["WORLD_SIZE"])
Check = Callable[[], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def make(**options: Any) -> ZeRO3Reference:
    return ZeRO3Reference("pocket", **{"ds_config": JOB} | options)


def clone(dtype: torch.dtype = torch.float32) -> CloneReference:
    return CloneReference(load_model("pocket", dtype=dtype))


def batch() -> dict[str, Tensor]:
    return sample_batch("pocket", 2, 16)


def pass_twice(reference: ZeRO3Reference) -> list[nn.Parameter]:
    """Make two passes (DeepSpeed learns from the first what to keep), and return the weights kept whole."""
    reference.logits(**batch())
    reference.logits(**batch())
    return [p for p in reference.engine.module.parameters() if p.ds_status.name == "AVAILABLE"]


def trained(model: nn.Module) -> nn.Module:
    """Return the model with every weight and buffer moved, the same on every rank."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in (*model.parameters(), *model.buffers()):
            weight.add_(torch.randn_like(weight) * 0.05)
    return model


def is_model_of(reference: ZeRO3Reference, original: CloneReference) -> None:
    assert reference.fingerprint() == original.fingerprint()
    torch.testing.assert_close(reference.log_probs(**batch()), original.log_probs(**batch()), rtol=0, atol=1e-5)


@check
def it_is_the_same_model_as_a_clone() -> None:
    reference = make()
    is_model_of(reference, clone())
    assert {p.ds_numel for p in pass_twice(reference)} == {128}  # the norms: below the threshold, kept whole
    is_model_of(reference, clone())


@check
def it_is_the_same_model_in_bfloat16() -> None:
    reference = make(dtype=torch.bfloat16)
    assert {p.dtype for p in reference.engine.module.parameters()} == {torch.bfloat16}
    is_model_of(reference, clone(torch.bfloat16))


@check
def it_takes_the_dtype_of_the_job() -> None:
    reference = make(ds_config=JOB | {"bf16": {"enabled": True}})
    assert {p.dtype for p in reference.engine.module.parameters()} == {torch.bfloat16}


@check
def it_is_the_same_model_offloaded() -> None:
    is_model_of(make(offload="cpu"), clone())


@check
def it_owns_its_shards() -> None:
    reference, model = make(), load_model("pocket")
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    shards = sum(-(-parameter.numel() // RANKS) * 4 for parameter in model.parameters())
    assert reference.owned_bytes() == shards + buffers
    kept = pass_twice(reference)
    assert reference.owned_bytes() == shards + buffers + sum(p.numel() * 4 for p in kept)


@check
def it_sizes_its_buckets_by_the_model_unless_the_job_does() -> None:
    zero = make(ds_config={"zero_optimization": {"stage": 2}}).engine._config.zero_config
    assert (zero.stage, zero.param_persistence_threshold, zero.prefetch_bucket_size) == (3, 1280, 14745)
    zero = make().engine._config.zero_config
    assert (zero.stage, zero.param_persistence_threshold, zero.prefetch_bucket_size) == (3, 6000, 0)


@check
def it_never_gives_a_gradient() -> None:
    reference = make()
    embedded = torch.zeros(1, 4, 128, requires_grad=True)
    assert not reference.logits(inputs_embeds=embedded).requires_grad
    assert not any(p.requires_grad for p in reference.engine.parameters())
    assert not any(module.training for module in reference.engine.module.modules())


@check
def it_works_on_after_a_pass_that_failed() -> None:
    reference = make()
    pass_twice(reference)
    with pytest.raises(IndexError):
        reference.logits(input_ids=batch()["input_ids"] + 10_000)
    is_model_of(reference, clone())


@check
def the_job_keeps_its_own_configuration() -> None:
    job = integration.HfDeepSpeedConfig(JOB | {"zero_optimization": {"stage": 2}})
    make()
    assert integration._hf_deepspeed_config_weak_ref() is job
    assert not is_partitioned(load_model("pocket"))
    with pytest.raises(ValueError, match="holds no model"):
        ZeRO3Reference(os.path.dirname(__file__))
    assert integration._hf_deepspeed_config_weak_ref() is job


@check
def the_job_keeps_its_own_torch() -> None:
    linear = torch.nn.functional.linear
    make(ds_config={"zero_optimization": {"stage": 2}})
    assert torch.nn.functional.linear is linear


@check
def without_a_configuration_it_takes_the_jobs() -> None:
    in_force = integration.HfDeepSpeedConfig(JOB | {"bf16": {"enabled": True}})
    reference = ZeRO3Reference("pocket")
    assert {p.dtype for p in reference.engine.module.parameters()} == {torch.bfloat16}
    del in_force


@check
def it_follows_a_policy_that_is_whole() -> None:
    reference, expected, policy = make(), clone(), trained(load_model("pocket"))
    assert pass_twice(reference)
    for alpha in (0.0, 0.25, 1.0):
        reference.sync(policy, alpha)
        expected.sync(policy, alpha)
        is_model_of(reference, expected)
    assert reference.fingerprint() == CloneReference(policy).fingerprint()


@check
def it_follows_a_policy_that_is_partitioned() -> None:
    reference, expected = make(), clone()
    in_force = integration.HfDeepSpeedConfig(JOB)
    engine = make_engine(load_model("pocket"), JOB)
    del in_force
    engine.backward(engine(**batch(), labels=batch()["input_ids"], use_cache=False).loss)
    engine.step()
    assert pass_twice(reference)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        expected.sync(engine.module, 0.25)
    reference.sync(engine, 0.25)
    is_model_of(reference, expected)
    assert reference.fingerprint() != clone().fingerprint()
    before = engine(**batch(), use_cache=False).logits
    assert torch.isfinite(before).all()  # the policy goes on


@check
def it_follows_no_other_model() -> None:
    reference = make()
    before = reference.fingerprint()
    with pytest.raises(ValueError, match="not the same model"):
        reference.sync(add_lora(load_model("pocket"), rank=2))
    with pytest.raises(ValueError, match="alpha is 2"):
        reference.sync(load_model("pocket"), alpha=2)
    assert reference.fingerprint() == before


@check
def nvme_without_its_operator_is_refused() -> None:
    with (
        mock.patch("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", return_value=False),
        pytest.raises(RuntimeError, match="apt install libaio-dev"),
    ):
        make(offload="nvme", nvme_path="/tmp")


def main() -> None:
    tell("started", pid=os.getpid())
    connect()
    for name, make_check in CHECKS.items():
        try:
            make_check()
        except Exception:
            tell("checked", name=name, fault=traceback.format_exc()[-2000:])
        else:
            tell("checked", name=name, fault=None)
    tell("done")


if __name__ == "__main__":
    main()
