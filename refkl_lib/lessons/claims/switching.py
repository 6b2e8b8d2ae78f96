"""Section B of the article: an adapter that is switched off, so that the base model is the reference."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError
from transformers import AutoModelForCausalLM

from refkl_lib.kl.exact import exact_kl
from refkl_lib.lessons.claims.claim import CONDITION, FAILS, GB, HOLDS, Claim, Figures, Verdict, within
from refkl_lib.lessons.claims.trials import adapter_off, kl, small_batch, small_lora, train
from refkl_lib.memory.price import price
from refkl_lib.memory.shapes import config_of
from refkl_lib.models import load_model
from refkl_lib.reference import create_reference
from refkl_lib.reference.adapter import add_lora
from refkl_lib.tensors import storage_bytes
from refkl_lib.units import GIB, show_bytes


# --------------------------------------------------------------------------------------------------- B1
def _share() -> Figures:
    small = [_percent("smollm2", rank, targets) for rank in (4, 64) for targets in ("all-linear", ["q_proj", "v_proj"])]
    return {
        "SmolLM2-135M": _percent("smollm2", 16, "all-linear"),
        "Qwen2.5-7B": _percent("Qwen2.5-7B", 16, "all-linear"),
        "least": min(small),
        "most": max(small),
    }


def _percent(model: str, rank: int, targets: str | list[str]) -> float:
    with torch.device("meta"):  # shapes without memory
        policy = add_lora(AutoModelForCausalLM.from_config(config_of(model)), rank, targets)
    trained, total = policy.get_nb_trainable_parameters()
    return 100 * trained / total


def _judge_share(f: Figures) -> Verdict:
    if all(within(f[which], 5, 0.2) for which in f):
        return HOLDS
    return CONDITION if f["least"] <= 5 <= f["most"] else FAILS


SHARE = Claim(
    "B1",
    "5 % train",
    "The frozen base is about 95 % of the parameters, the adapter about 5 %.",
    lesson="03_adapter_switch.ipynb#The-real-layer",
    measure=_share,
    judge=_judge_share,
    shows=lambda f: (
        f"rank 16 on all linear layers: {f['SmolLM2-135M']:.1f} % of SmolLM2-135M, {f['Qwen2.5-7B']:.1f} % of "
        f"Qwen2.5-7B; by rank and targets {f['least']:.1f} to {f['most']:.1f} % of SmolLM2"
    ),
)


# --------------------------------------------------------------------------------------------------- B2
def _switch() -> Figures:
    base = load_model("pocket", device="cpu")
    clone = create_reference(base, "clone")
    policy = train(small_lora(base))
    layers = [module for module in policy.modules() if hasattr(module, "_disable_adapters")]
    before = [(layer.forward, layer._disable_adapters) for layer in layers]
    with policy.disable_adapter():
        inside = [(layer.forward, layer._disable_adapters) for layer in layers]
    pairs = list(zip(before, inside, strict=True))
    return {
        "layers": len(layers),
        "another forward": sum(ours[0] != theirs[0] for ours, theirs in pairs),
        "another flag": sum(ours[1] != theirs[1] for ours, theirs in pairs),
        "off is the base": torch.equal(adapter_off(policy), clone.logits(**small_batch())),
    }


def _judge_switch(f: Figures) -> Verdict:
    if not f["off is the base"] or not f["another forward"]:
        return FAILS
    return HOLDS if f["another forward"] == f["layers"] else CONDITION


SWITCH = Claim(
    "B2",
    "the old forward",
    "disable_adapter() puts the original forward of each LoRA layer back for the length of the block.",
    lesson="03_adapter_switch.ipynb#The-real-layer",
    measure=_switch,
    judge=_judge_switch,
    shows=lambda f: (
        f"inside, {f['another forward']} of {f['layers']} LoRA layers have another forward, {f['another flag']} have "
        f"another _disable_adapters; the logits are {'' if f['off is the base'] else 'not '}the base's"
    ),
)


# --------------------------------------------------------------------------------------------------- B3
def _off() -> Figures:
    start = create_reference(load_model("pocket", device="cpu"), "clone").logits(**small_batch())
    half = create_reference(load_model("pocket", device="cpu", dtype=torch.bfloat16), "clone").logits(**small_batch())
    unfrozen = small_lora()
    unfrozen.get_input_embeddings().weight.requires_grad_(True)
    return {
        "LoRA": kl(start, adapter_off(train(small_lora()))),
        "PiSSA": kl(start, adapter_off(small_lora(init_lora_weights="pissa"))),
        "OLoRA": kl(start, adapter_off(small_lora(init_lora_weights="olora"))),
        "biases train": kl(start, _with_biases()),
        "embeddings train": kl(start, adapter_off(train(unfrozen))),
        "merged in bf16": kl(half, _merged_and_unmerged()),
    }


def _with_biases() -> Tensor:
    model = load_model("pocket", device="cpu")
    config = copy.deepcopy(model.config)
    config.attention_bias = True  # they are zeros, so this is still the same model
    base = AutoModelForCausalLM.from_config(config).eval()
    base.load_state_dict(model.state_dict(), strict=False)
    with warnings.catch_warnings():  # of biases, and of nothing else here, PEFT does warn
        warnings.simplefilter("ignore")
        return adapter_off(train(small_lora(base, bias="all")))


def _merged_and_unmerged() -> Tensor:
    policy = train(small_lora(load_model("pocket", device="cpu", dtype=torch.bfloat16)))
    policy.merge_adapter()
    policy.unmerge_adapter()
    return adapter_off(policy)


def _judge_off(f: Figures) -> Verdict:
    if f["LoRA"] > 0:
        return FAILS
    return CONDITION if any(value > 1e-5 for value in f.values()) else HOLDS


OFF = Claim(
    "B3",
    "off is the base",
    "With the adapter off, the model's output is that of the original model.",
    lesson="03_adapter_switch.ipynb#Break-it",
    measure=_off,
    judge=_judge_off,
    shows=lambda f: f"nats from the start: {', '.join(f'{name} {value:.1g}' for name, value in f.items())}",
)


# --------------------------------------------------------------------------------------------------- B4
def _saved() -> Figures:
    model = load_model("smollm2", device="cpu")
    clone = create_reference(model, "clone")
    size = storage_bytes(model)
    adapter = create_reference(small_lora(model), "adapter")
    return {"model": size, "clone": clone.owned_bytes(), "adapter": adapter.owned_bytes()}


SAVED = Claim(
    "B4",
    "saves N",
    "There is no second model, so about N is saved.",
    lesson="03_adapter_switch.ipynb#What-is-saved,-and-is-it-the-same?",
    measure=_saved,
    judge=lambda f: HOLDS if within(f["clone"] - f["adapter"], f["model"], 0.05) else FAILS,
    shows=lambda f: (
        f"the clone holds {show_bytes(f['clone'])}, the adapter switched off {show_bytes(f['adapter'])}; SmolLM2 has "
        f"{show_bytes(f['model'])}"
    ),
)


# --------------------------------------------------------------------------------------------------- B5
def _seven() -> Figures:
    settings: dict[str, Any] = {"lora_rank": 16, "checkpointing": True}
    return {strategy: price("Qwen2.5-7B", strategy, **settings).peak for strategy in ("clone", "adapter")}


def _judge_seven(f: Figures) -> Verdict:
    if not within(f["adapter"] / f["clone"], 7.5 / 14):
        return FAILS
    return HOLDS if within(f["clone"], 14 * GB) and within(f["adapter"], 7.5 * GB) else CONDITION


SEVEN = Claim(
    "B5",
    "14 GB to 7.5 GB",
    "A 7B run drops from 14 GB to about 7.5 GB.",
    lesson="03_adapter_switch.ipynb#What-is-saved,-and-is-it-the-same?",
    measure=_seven,
    judge=_judge_seven,
    shows=lambda f: (
        f"LoRA of Qwen2.5-7B, bf16, at its peak: {f['clone'] / GIB:.1f} GiB with a clone, {f['adapter'] / GIB:.1f} GiB "
        f"with the adapter off; the ratio is {f['adapter'] / f['clone']:.2f}, that of the claim {7.5 / 14:.2f}"
    ),
)


# --------------------------------------------------------------------------------------------------- B6
def _isolated() -> Figures:
    policy = train(small_lora()).train()
    reference = create_reference(policy, "adapter")
    before, right = reference.fingerprint(), _gradient(policy)
    others = [name for name, w in policy.named_parameters() if w.grad is not None and "lora_" not in name]
    train(policy)
    unchanged = reference.fingerprint() == before
    policy = train(small_lora()).train()
    policy.enable_input_require_grads()  # reentrant checkpointing needs it
    policy.activation_checkpointing_enable({"use_reentrant": True})
    off = {no_grad: _relative(_gradient(policy, no_grad), right) for no_grad in (True, False)}
    policy.activation_checkpointing_enable({"use_reentrant": False})
    return {
        "others with a gradient": len(others),
        "base unchanged": unchanged,
        "off by, no_grad": off[True],
        "off by": off[False],
        "non-reentrant": _raised(policy),
    }


def _gradient(policy: Any, no_grad: bool = True) -> Tensor:
    """Return the adapter's gradient of a KL whose reference is made under `no_grad`, or not."""
    policy.zero_grad()
    ours = policy(**small_batch(), use_cache=False).logits
    with torch.set_grad_enabled(not no_grad), policy.disable_adapter():
        theirs = policy(**small_batch(), use_cache=False).logits
    exact_kl(ours, theirs).backward()
    return torch.cat([weight.grad.flatten() for weight in policy.parameters() if weight.requires_grad])


def _relative(got: Tensor, right: Tensor) -> float:
    return ((got - right).norm() / right.norm()).item()


def _raised(policy: Any) -> str:
    try:
        _gradient(policy, no_grad=False)
    except CheckpointError as error:
        return type(error).__name__
    return "no error"


def _judge_isolated(f: Figures) -> Verdict:
    if f["others with a gradient"] or not f["base unchanged"]:
        return FAILS
    return HOLDS if f["off by, no_grad"] < 1e-3 else CONDITION


ISOLATED = Claim(
    "B6",
    "adapters learn",
    "Back-propagation updates the adapter alone, and no_grad keeps the reference's pass out of it.",
    lesson="03_adapter_switch.ipynb#Only-the-adapter-learns",
    measure=_isolated,
    judge=_judge_isolated,
    shows=lambda f: (
        f"{f['others with a gradient']} other weights have a gradient; under checkpointing it is off by "
        f"{f['off by, no_grad']:.0%} with no_grad, by {f['off by']:.0%} without (non-reentrant: {f['non-reentrant']})"
    ),
)

CLAIMS = (SHARE, SWITCH, OFF, SAVED, SEVEN, ISOLATED)
