"""Section A of the article: full fine-tuning, with a clone of the model as the reference."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from refkl_lib.comparison import run_strategy
from refkl_lib.lessons.claims.claim import CONDITION, FAILS, GB, HOLDS, Claim, Figures, Verdict, within
from refkl_lib.lessons.claims.trials import kl, small_batch, train
from refkl_lib.memory.price import price
from refkl_lib.models import load_model
from refkl_lib.reference.clone import create_reference_model
from refkl_lib.tensors import storages_of
from refkl_lib.units import GIB


# --------------------------------------------------------------------------------------------------- A1
def _copy() -> Figures:
    model = load_model("pocket", device="cpu")
    clone = create_reference_model(model)
    return {
        "storages": len(storages_of(model)),
        "storages of the copy": len(storages_of(clone)),
        "shared": len(storages_of(model).keys() & storages_of(clone).keys()),
        "trains": sum(weight.requires_grad for weight in clone.parameters()),
        "in training mode": sum(module.training for module in clone.modules()),
    }


def _judge_copy(f: Figures) -> Verdict:
    if f["shared"] or f["trains"] or f["in training mode"]:
        return FAILS
    return HOLDS if f["storages of the copy"] == f["storages"] else CONDITION


COPY = Claim(
    "A1",
    "deepcopy",
    "deepcopy, requires_grad_(False) and eval() make a reference that is independent of the model.",
    lesson="02_full_clone.ipynb#By-hand-first",
    measure=_copy,
    judge=_judge_copy,
    shows=lambda f: (
        f"{f['shared']} of {f['storages']} storages shared; the copy has {f['storages of the copy']} (what is tied "
        f"stays tied), {f['trains']} of its weights train"
    ),
)


# --------------------------------------------------------------------------------------------------- A2
def _freeze() -> Figures:
    policy = load_model("pocket", device="cpu")
    reference, batch = create_reference_model(policy), small_batch()
    from_ids = reference(**batch, use_cache=False).logits
    embedded = policy.get_input_embeddings()(batch["input_ids"])
    from_embeddings = reference(inputs_embeds=embedded, use_cache=False).logits
    from_embeddings.sum().backward()
    return {
        "reference weights with a gradient": _with_gradient(reference),
        "graph from token ids": from_ids.requires_grad,
        "graph from embeddings": from_embeddings.requires_grad,
        "policy weights with a gradient": _with_gradient(policy),
    }


def _with_gradient(model: nn.Module) -> int:
    return sum(weight.grad is not None for weight in model.parameters())


def _judge_freeze(f: Figures) -> Verdict:
    if f["reference weights with a gradient"] or f["graph from token ids"]:
        return FAILS
    return CONDITION if f["graph from embeddings"] else HOLDS


FREEZE = Claim(
    "A2",
    "freezing",
    "requires_grad_(False) keeps back-propagation away from the reference.",
    lesson="02_full_clone.ipynb#Two-locks",
    measure=_freeze,
    judge=_judge_freeze,
    shows=lambda f: (
        f"{f['reference weights with a gradient']} weights of the reference get a gradient; but through it, from "
        f"embeddings that require one, {f['policy weights with a gradient']} of the policy does"
    ),
)


# --------------------------------------------------------------------------------------------------- A3
def _evaluate() -> Figures:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 259, "initializer_range": 0.1}
        gpt2 = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2))  # dropout 0.1, as it comes
        norm = nn.BatchNorm1d(2).eval()
        norm(torch.randn(8, 2))
        return {
            "train": _between_passes(gpt2.train()),
            "eval": _between_passes(gpt2.eval()),
            "train, no dropout": _between_passes(load_model("pocket", device="cpu").train()),
            "running mean moved": norm.get_buffer("running_mean").abs().max().item(),
        }


@torch.no_grad()
def _between_passes(model: Any) -> float:
    """Return the KL between two answers of one model to one batch."""
    first, second = (model(**small_batch(), use_cache=False).logits for _ in range(2))
    return kl(first, second)


def _judge_evaluate(f: Figures) -> Verdict:
    if f["eval"] or f["running mean moved"]:
        return FAILS
    return HOLDS if f["train"] else CONDITION  # a model that eval() changes nothing about cannot tell


EVALUATE = Claim(
    "A3",
    "eval()",
    "eval() switches dropout and BatchNorm off, so the reference's outputs are stable.",
    lesson="02_full_clone.ipynb#Break-it:-eval()-forgotten",
    measure=_evaluate,
    judge=_judge_evaluate,
    shows=lambda f: (
        f"KL between two passes: {f['train']:.2f} in training mode with dropout 0.1, {f['eval']:.0f} after eval(); "
        f"{f['train, no dropout']:.0f} in a Llama either way"
    ),
)


# --------------------------------------------------------------------------------------------------- A4
def _twice() -> Figures:
    run = run_strategy("clone", model="smollm2", lora_rank=None, steps=1)
    one = run.owners["policy"]
    return {"weights": (one + run.owners["reference"]) / one, "step": run.peak / one}


def _judge_twice(f: Figures) -> Verdict:
    if not within(f["weights"], 2, 0.05):
        return FAILS
    return HOLDS if within(f["step"], 2) else CONDITION


TWICE = Claim(
    "A4",
    "2N",
    "With the clone, the total memory is about twice that of the model.",
    lesson="02_full_clone.ipynb#The-whole-bill",
    measure=_twice,
    judge=_judge_twice,
    shows=lambda f: (
        f"{f['weights']:.3f} N for the weights of both; {f['step']:.1f} N at the peak of a full fp32 AdamW step"
    ),
)


# --------------------------------------------------------------------------------------------------- A5
def _seven() -> Figures:
    bills = {dtype: price("Qwen2.5-7B", "clone", dtype=dtype) for dtype in ("fp32", "bf16")}
    return {dtype: bill.reference_bytes for dtype, bill in bills.items()}


SEVEN = Claim(
    "A5",
    "7B in 14 GB, fp32",
    "A 7B model takes about 14 GB in FP32.",
    lesson="02_full_clone.ipynb#The-whole-bill",
    measure=_seven,
    judge=lambda f: HOLDS if within(f["fp32"], 14 * GB) else FAILS,
    shows=lambda f: (
        f"one copy of Qwen2.5-7B: {f['fp32'] / GIB:.1f} GiB in fp32, {f['bf16'] / GIB:.1f} GiB in bf16; with its clone "
        f"{2 * f['fp32'] / GIB:.1f} and {2 * f['bf16'] / GIB:.1f} GiB"
    ),
)


# --------------------------------------------------------------------------------------------------- A6
def _follow() -> Figures:
    free, _ = _distances(beta=0.0, follows=False)
    held, _ = _distances(beta=1.0, follows=False)
    synced, gap = _distances(beta=1.0, follows=True)
    distances = {"β = 0": free, "β = 1": held, "β = 1, synced": synced}
    return distances | {"gap after a sync": gap, "buffers left behind": _buffers_left_behind()}


def _distances(beta: float, follows: bool) -> tuple[float, float]:
    """Return how far training leads a policy from its start, and from its reference, in nats per token."""
    policy = load_model("pocket", device="cpu")
    start, reference = create_reference_model(policy), AsPrinted(create_reference_model(policy))

    def after_step() -> None:
        if follows:
            reference.on_step_end(policy)

    train(policy, reference, beta=beta, learning_rate=1e-3, after_step=after_step)
    return _apart(policy, start), _apart(policy, reference.model)


class AsPrinted:
    """The article's way to let a reference follow: copy all parameters, after each step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def logits(self, **inputs: Any) -> Tensor:
        """Return the logits of the model that follows."""
        return self.model(**inputs, use_cache=False).logits

    def on_step_end(self, policy: nn.Module) -> None:
        """Copy the policy's parameters."""
        for ours, theirs in zip(self.model.parameters(), policy.parameters(), strict=True):
            ours.data.copy_(theirs.data)


@torch.no_grad()
def _apart(policy: Any, reference: Any) -> float:
    return kl(*(model(**small_batch(), use_cache=False).logits for model in (policy, reference)))


def _buffers_left_behind() -> int:
    norm = nn.BatchNorm1d(1)
    reference = create_reference_model(norm)
    norm(torch.tensor([[15.0], [25.0]]))
    AsPrinted(reference).on_step_end(norm)
    return sum(not torch.equal(*pair) for pair in zip(norm.buffers(), reference.buffers(), strict=True))


def _judge_follow(f: Figures) -> Verdict:
    if f["gap after a sync"] > 1e-3:
        return FAILS
    restrains = f["β = 1, synced"] < 0.9 * f["β = 0"]
    return HOLDS if restrains and not f["buffers left behind"] else CONDITION


FOLLOW = Claim(
    "A6",
    "sync each step",
    "A callback that copies all parameters at the end of a step lets the reference follow the training.",
    lesson="02_full_clone.ipynb#A-reference-that-follows",
    measure=_follow,
    judge=_judge_follow,
    shows=lambda f: (
        f"nats from the start after 6 steps: {f['β = 1']:.1f} with β = 1; {f['β = 1, synced']:.1f} when synced at each "
        f"step, as with β = 0 ({f['β = 0']:.1f}); buffers left behind: {f['buffers left behind']}"
    ),
)

CLAIMS = (COPY, FREEZE, EVALUATE, TWICE, SEVEN, FOLLOW)
