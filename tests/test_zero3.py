"""ZeRO3Reference: its configuration here, everything else from inside a job of two real ranks (zero3_rank.py)."""

import copy
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from refkl_lib import add_lora, create_reference, load_model
from refkl_lib.ranks.job import Job
from refkl_lib.ranks.launch import command_for
from refkl_lib.reference.zero3 import ZeRO3Reference, reference_config, source_of

RANKS = 2
CHECKS = re.findall(r"^@check\ndef (\w+)", Path(__file__).with_name("zero3_rank.py").read_text(), re.MULTILINE)

JOB = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
        "stage3_prefetch_bucket_size": 1000,
        "stage3_param_persistence_threshold": "auto",
    },
    "wall_clock_breakdown": False,
}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What both ranks of one job have found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        with Job(*command_for(RANKS, "zero3_rank", [])) as job:
            return [event for event in job.events(RANKS, timeout=250) if event["event"] == "checked"]


@pytest.mark.skipif(sys.platform != "linux", reason="real ranks need Linux")
@pytest.mark.parametrize("name", CHECKS)
def test_in_a_job(name: str, found: list[dict[str, Any]]) -> None:
    faults = {event["rank"]: event["fault"] for event in found if event["name"] == name}
    assert set(faults) == set(range(RANKS))
    for rank, fault in faults.items():
        assert fault is None, f"rank {rank}:\n{fault}"


def test_a_reference_takes_from_the_job_what_is_not_training() -> None:
    job = copy.deepcopy(JOB)
    assert reference_config(job) == {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 1000,
            "memory_efficient_linear": False,
        },
        "wall_clock_breakdown": False,
    }
    assert job == JOB


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"),
    [(None, True, False), (torch.float32, False, False), (torch.float16, False, True)],
)
def test_its_dtype_is_the_jobs_unless_given(dtype: torch.dtype | None, bf16: bool, fp16: bool) -> None:
    config = reference_config(JOB, dtype)
    assert (config["bf16"], config["fp16"]) == ({"enabled": bf16}, {"enabled": fp16})


def test_its_offload_is_the_jobs_unless_given() -> None:
    job = {"zero_optimization": {"offload_param": {"device": "cpu"}}}
    assert reference_config(job)["zero_optimization"]["offload_param"] == {"device": "cpu"}
    none = reference_config(job, offload="none")
    assert none["zero_optimization"]["offload_param"] == {"device": "none"}
    nvme = reference_config({}, offload="nvme", nvme_path=Path("/fast"))
    assert nvme["zero_optimization"]["offload_param"] == {"device": "nvme", "nvme_path": "/fast"}


def test_an_offload_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="offload is 'disk'"):
        reference_config({}, offload="disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs nvme_path="):
        reference_config({}, offload="nvme")


def test_what_a_policy_was_loaded_from_is_found(tmp_path: Path) -> None:
    load_model("pocket").save_pretrained(tmp_path)
    policy = load_model(tmp_path)
    engine = torch.nn.Module()
    engine.module = policy
    assert source_of(policy) == source_of(engine) == source_of(add_lora(load_model(tmp_path), 4)) == str(tmp_path)


def test_a_policy_that_was_not_loaded_has_no_checkpoint_to_load_again() -> None:
    tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    for policy in (LlamaForCausalLM(tiny), torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="was not loaded from one: save it"):
            create_reference(policy, "zero3")


def test_outside_of_a_job_it_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(RuntimeError, match="launcher"):
        ZeRO3Reference("pocket")


def test_without_deepspeed_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match="needs deepspeed"):
        ZeRO3Reference("pocket")


class LostEngine(torch.nn.Module):
    """The engine of a rank that has lost the others."""

    def empty_partition_cache(self) -> None:
        raise RuntimeError("expected to be released")


def test_what_broke_a_pass_off_is_not_hidden_by_the_clean_up() -> None:
    reference = object.__new__(ZeRO3Reference)
    reference.engine = LostEngine()
    with pytest.raises(ConnectionError, match="reset by peer") as caught, reference.as_reference():
        raise ConnectionError("reset by peer")
    assert caught.value.__notes__ == ["and its layers could not be let go: expected to be released"]
