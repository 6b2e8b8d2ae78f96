"""Section C of the article: DeepSpeed ZeRO-3, where the reference is loaded again."""

import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import disk_offload
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.utils import logging

from refkl_lib.lessons.claims.claim import CONDITION, FAILS, HOLDS, Claim, Figures, Verdict, within
from refkl_lib.lessons.claims.trials import copied, job, small_batch
from refkl_lib.models import load_model
from refkl_lib.models.load import model_folder, without_progress_bars
from refkl_lib.ranks.copies import SUCCEEDS
from refkl_lib.ranks.launch import run_ranks
from refkl_lib.reference import create_reference
from refkl_lib.tensors import storage_bytes
from refkl_lib.units import show_bytes


# --------------------------------------------------------------------------------------------------- C1
def _shards() -> Figures:
    reports = {ranks: job(ranks).ranks for ranks in (1, 2, 4)}
    [whole] = reports[1]
    return {
        "shares": {
            ranks: (each[0].policy_bytes / whole.policy_bytes, each[0].optimizer_bytes / whole.optimizer_bytes)
            for ranks, each in reports.items()
        },
        "gathered": max(report.gather_peak for report in reports[4]),
        "shard": reports[4][0].policy_bytes,
    }


def _judge_shards(f: Figures) -> Verdict:
    right = [within(share, 1 / ranks, 0.05) for ranks, shares in f["shares"].items() for share in shares]
    return HOLDS if all(right) else FAILS


SHARDS = Claim(
    "C1",
    "1/G a rank",
    "With 8 GPUs, each holds about an eighth of the parameters and of the optimizer's state.",
    lesson="04_zero3_reload.ipynb#A-real-job",
    measure=_shards,
    judge=_judge_shards,
    shows=lambda f: (
        "share of parameters and of states: "
        + ", ".join(f"{weights:.3f} and {states:.3f} at {ranks}" for ranks, (weights, states) in f["shares"].items())
        + f" ranks; gathered on top at the peak, {f['gathered'] / f['shard']:.1f} of a shard"
    ),
    ranks=True,
)


# --------------------------------------------------------------------------------------------------- C2
def _deepcopy() -> Figures:
    model, module, gathered = copied("model"), copied("engine.module"), copied("model", gathered=True)
    return {
        "deepcopy": [model.copied, module.copied],
        "shape": next(iter(model.shapes.values())),
        "bytes": model.copy_bytes,
        "original afterwards": module.original[0],
        "gathered, same logits": bool(gathered.same_logits),
        "gathered, bytes": gathered.copy_bytes,
        "original bytes": gathered.original_bytes,
    }


def _judge_deepcopy(f: Figures) -> Verdict:
    refused = [said.startswith("RuntimeError") for said in f["deepcopy"]]
    if all(refused):
        return HOLDS
    return CONDITION if any(refused) else FAILS


DEEPCOPY = Claim(
    "C2",
    "deepcopy raises",
    "deepcopy is impossible under ZeRO-3: it raises a RuntimeError.",
    lesson="04_zero3_reload.ipynb#The-clone-that-is-nothing",
    measure=_deepcopy,
    judge=_judge_deepcopy,
    shows=lambda f: (
        f"deepcopy {' and '.join(dict.fromkeys(f['deepcopy']))}; the copy's first weight has the shape {f['shape']}; "
        f"after a pass of the copy of an engine's module, that engine {_in_short(f['original afterwards'])}"
    ),
    ranks=True,
)


def _in_short(said: str) -> str:
    return said if said == SUCCEEDS else f"raises {said.split(':')[0]}"


# --------------------------------------------------------------------------------------------------- C3
def _reload() -> Figures:
    clone = create_reference(load_model("pocket", device="cpu"), "clone")
    in_force = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    refused = _load(device_map="auto")
    del in_force  # transformers loads as ZeRO-3 wants it for as long as this object lives
    return {
        "the same weights": {report.reference_fingerprint for report in job(2).ranks} == {clone.fingerprint()},
        "device_map, ZeRO-3": refused,
        "torch_dtype": _load(torch_dtype=torch.bfloat16),
    }


def _load(**options: Any) -> str:
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # that `torch_dtype` has a new name is logged once, and need not be seen here
    try:
        with without_progress_bars():
            AutoModelForCausalLM.from_pretrained(model_folder("pocket"), **options)
    except ValueError as error:
        return str(error)
    finally:
        logging.set_verbosity(said)
    return SUCCEEDS


def _judge_reload(f: Figures) -> Verdict:
    if not f["the same weights"]:
        return FAILS
    return HOLDS if f["device_map, ZeRO-3"] == f["torch_dtype"] == SUCCEEDS else CONDITION


RELOAD = Claim(
    "C3",
    "reload",
    'The reference is loaded again, by from_pretrained(…, device_map="auto", torch_dtype=torch.bfloat16).',
    lesson="04_zero3_reload.ipynb#Load-it-again,-but-how?",
    measure=_reload,
    judge=_judge_reload,
    shows=lambda f: (
        f"loaded again it is {'the same' if f['the same weights'] else 'another'} model on each rank; with device_map: "
        f"{f['device_map, ZeRO-3']}"
    ),
    ranks=True,
)


# --------------------------------------------------------------------------------------------------- C4
def _offload() -> Figures:
    model, batch = load_model("pocket", device="cpu"), small_batch()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        want, before = model(**batch, use_cache=False).logits, storage_bytes(list(model.parameters()))
        disk_offload(model, folder)
        kept = storage_bytes([weight for weight in model.parameters() if not weight.is_meta])
        same = torch.equal(model(**batch, use_cache=False).logits, want)
    return {"before": before, "kept": kept, "same logits": same, "ranks": _offload_on_ranks()}


@cache
def _offload_on_ranks() -> dict[str, Any]:
    events = run_ranks(2, "refkl_lib.lessons.claims.offloading", {}, None, 300.0).events
    done = next(event for event in events if event["event"] == "done")
    return {name: done[name] for name in ("before", "after", "written", "forward")}


def _judge_offload(f: Figures) -> Verdict:
    if not f["same logits"] or f["kept"] > 0.5 * f["before"]:
        return FAILS
    return HOLDS if f["ranks"]["forward"] == SUCCEEDS else CONDITION


OFFLOAD = Claim(
    "C4",
    "disk_offload",
    "accelerate's disk_offload relieves the memory of a reference.",
    lesson="04_zero3_reload.ipynb#Load-it-again,-but-how?",
    measure=_offload,
    judge=_judge_offload,
    shows=lambda f: (
        f"one process keeps {show_bytes(f['kept'])} of {show_bytes(f['before'])}; under ZeRO-3 it writes "
        f"{f['ranks']['written']} bytes, drops the shards, and a pass {_in_short(f['ranks']['forward'])}"
    ),
    ranks=True,
)


# --------------------------------------------------------------------------------------------------- C5
def _broadcast() -> Figures:
    files = list(_home_of_deepspeed().rglob("*.py"))
    return {
        "files": len(files),
        "files that name it": sum(b"broadcast_parameters" in file.read_bytes() for file in files),
        "models on two ranks": len({report.reference_fingerprint for report in job(2).ranks}),
    }


def _home_of_deepspeed() -> Path:
    spec = find_spec("deepspeed")  # not imported: that would take seconds, and print
    if spec is None or spec.origin is None:
        raise ImportError("there is no deepspeed to look into: pip install deepspeed")
    return Path(spec.origin).parent


def _judge_broadcast(f: Figures) -> Verdict:
    if not f["files that name it"]:
        return FAILS
    return HOLDS if f["models on two ranks"] == 1 else CONDITION


BROADCAST = Claim(
    "C5",
    "broadcast",
    "deepspeed.utils.broadcast_parameters(ref_model.state_dict()) makes all ranks equal.",
    lesson="04_zero3_reload.ipynb#Are-the-ranks-of-one-mind?",
    measure=_broadcast,
    judge=_judge_broadcast,
    shows=lambda f: (
        f"{f['files that name it']} of DeepSpeed's {f['files']} files have that name; a checksum over the ranks finds "
        f"{f['models on two ranks']} model"
    ),
    ranks=True,
)


# --------------------------------------------------------------------------------------------------- C6
def _cheap() -> Figures:
    whole = storage_bytes(load_model("pocket", device="cpu"))
    return {
        "partitioned": job(2).ranks[0].reference_bytes / whole,
        "plain": job(2, reference="plain").ranks[0].reference_bytes / whole,
    }


def _judge_cheap(f: Figures) -> Verdict:
    if not within(f["partitioned"], 0.5):
        return FAILS
    return HOLDS if within(f["plain"], 0.5) else CONDITION


CHEAP = Claim(
    "C6",
    "a cheap reload",
    "A reference that is loaded again is cheap.",
    lesson="04_zero3_reload.ipynb#Load-it-again,-but-how?",
    measure=_cheap,
    judge=_judge_cheap,
    shows=lambda f: (
        f"on each of two ranks: {f['partitioned']:.2f} N if it is partitioned, {f['plain']:.2f} N if it is not"
    ),
    ranks=True,
)

CLAIMS = (SHARDS, DEEPCOPY, RELOAD, OFFLOAD, BROADCAST, CHEAP)
