"""Adapter switch: one model, two behaviours.

With its adapter on, a PEFT model is the policy; with it off, it is the model that training started from.
Nothing is copied, so the reference costs no weights: only the second forward pass.

    policy = add_lora(model, rank=16)
    reference = AdapterReference(policy)
    reference.logits(**batch)            # (B, T, V), no gradient

A policy that *starts* with a trained adapter needs that adapter in its reference as well: freeze a copy of
it beside the one that trains (`copy_adapter`), and switch to the copy instead of switching off. Under DeepSpeed
ZeRO-3 the policy is `engine.module`, whose layers are gathered in this pass as in any other.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from refkl_lib.reference.base import Reference, evaluating
from refkl_lib.reference.mix import check_alpha
from refkl_lib.reference.zero3 import gathered

# Of PEFT 0.21's initialisations, those that leave the base weight as it is. The others (pissa, olora,
# corda, loftq, lora_ga) move a part of it into the adapter.
INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


class AdapterReference(Reference):
    """The policy with its adapter switched off or, with `adapter`, switched to that frozen adapter.

    Raises TypeError if `policy` is not a PEFT model; ValueError if switching would not give back the
    model that training started from (see `why_not_the_base`), or if there is no such adapter.
    """

    strategy = "adapter"

    def __init__(self, policy: nn.Module, adapter: str | None = None) -> None:
        if not isinstance(policy, PeftModel):
            raise TypeError(
                f"policy is a {type(policy).__name__}, which has no adapter to switch off: attach one "
                'with add_lora(model), or keep a clone with create_reference(policy, "clone")'
            )
        if not _switchable(policy):
            raise TypeError(
                f"{policy.peft_type} puts no layers into the model that could be switched off; keep a clone with "
                'create_reference(model, "clone")'
            )
        if adapter is not None and adapter not in policy.peft_config:
            raise ValueError(
                f"the policy has no adapter {adapter!r}, only {sorted(policy.peft_config)}: "
                f"freeze a copy of the active one with copy_adapter(policy, {adapter!r})"
            )
        self.policy = policy
        self.adapter = adapter
        if obstacles := why_not_the_base(policy, adapter):
            raise ValueError("; ".join(obstacles))

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """Switch the adapter, give the policy, and switch back.

        Raises ValueError if an adapter is merged: switching it off would un-merge it, which gives the
        base weight back only to rounding, and the forward pass would not merge it again.
        """
        layers = _switchable(self.policy)
        if merged := _merged(layers):
            raise ValueError(merged)
        with evaluating(self.policy), _switched(layers, self.adapter):
            yield self.policy

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the base model's weights, and those of the frozen adapter if there is one.

        Of a policy under ZeRO-3 they are gathered one at a time, and every rank has to come along.
        """
        policy = self.policy
        others = _added_by_peft(policy) - {id(weight) for weight in self.held()}
        for name, weight in (*policy.named_parameters(), *policy.named_buffers()):
            if id(weight) not in others:
                with gathered(weight):
                    yield _original_name(name), weight

    def held(self) -> list[Tensor]:
        """Return the weights of the frozen adapter; none for one that is switched off."""
        return [] if self.adapter is None else _weights_of(self.policy, self.adapter)

    def sync(self, policy: nn.Module, alpha: float = 1.0) -> None:
        """Copy the policy's active adapter into the frozen one; only alpha = 1 is possible.

        Raises ValueError for a reference that is the bare base model: it is part of the policy itself.
        """
        check_alpha(alpha)
        if self.adapter is None:
            raise ValueError(
                "this reference is the policy's own base model, so it cannot move towards the policy: "
                "keep the reference in a frozen adapter, create_reference(policy, 'adapter', "
                "adapter='ref') after copy_adapter(policy, 'ref'), or keep a clone"
            )
        if alpha != 1.0:
            raise ValueError(
                f"alpha is {alpha}, but a frozen adapter can only be replaced (alpha=1): a LoRA update "
                "is the product B·A, and mixing the factors does not mix the products"
            )
        weights = get_peft_model_state_dict(policy)
        set_peft_model_state_dict(self.policy, weights, adapter_name=self.adapter)


def add_lora(model: nn.Module, rank: int = 16, targets: str | list[str] = "all-linear", **options: Any) -> PeftModel:
    """Return `model` with a new LoRA adapter, the only part of it that trains (arXiv 2106.09685).

    The adapter starts as the identity (B = 0) and is scaled by alpha / rank with alpha = 2·rank unless
    `options`, which go to `peft.LoraConfig`, say otherwise. The model is wrapped in place, not copied.
    Raises ValueError if the model carries an adapter already, or as `peft` does for a rank below 1.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "this model carries an adapter already, and a second one would train beside it: load the model "
            "again with load_model, or go on with the policy that the first add_lora returned"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        target_modules=targets,
        **{"lora_alpha": 2 * rank} | options,
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.24 for a property under its old name: nothing a reader can act on.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return get_peft_model(model, config)


def copy_adapter(policy: PeftModel, name: str = "ref") -> None:
    """Add a frozen copy of the policy's active adapter under `name`; the active one stays active.

    Raises TypeError if `policy` is not a PEFT model, ValueError if it has an adapter of that name.
    """
    if not isinstance(policy, PeftModel):
        raise TypeError(f"policy is a {type(policy).__name__}, which has no adapter: attach one with add_lora(model)")
    if name in policy.peft_config:
        raise ValueError(f"the policy has an adapter {name!r} already: give the copy another name")
    weights = {key: w.clone() for key, w in get_peft_model_state_dict(policy).items()}
    # Initialised plainly: a PiSSA initialisation, say, would move the base weight a second time.
    config = replace(policy.active_peft_config, init_lora_weights=True)
    flags = [(weight, weight.requires_grad) for weight in policy.parameters()]
    policy.add_adapter(name, config)
    for weight, flag in flags:  # of the active adapter, PEFT 0.21 turns them all on
        weight.requires_grad_(flag)
    set_peft_model_state_dict(policy, weights, adapter_name=name)
    for weight in _weights_of(policy, name):
        weight.requires_grad_(False)


def why_not_the_base(policy: PeftModel, adapter: str | None = None) -> list[str]:
    """Return a sentence for each reason why switching would not give back the starting model.

    The reasons: a merged adapter, base weights that train (`bias`, unfrozen embeddings) and, when the
    adapter is switched off, an initialisation that changed the base weight. Empty if there are none.
    """
    reasons = [
        _merged(_switchable(policy)),
        _base_trains(policy),
        adapter and _frozen_adapter_trains(policy, adapter),
    ]
    if adapter is None:
        reasons += [_base_was_changed(config) for config in policy.peft_config.values()]
    return [reason for reason in reasons if reason]


def _merged(layers: list[Any]) -> str | None:
    merged = {name for layer in layers for name in layer.merged_adapters}
    if not merged:
        return None
    return (
        f"adapter {sorted(merged)[0]!r} is merged into the base weight, so with the adapter off the "
        "model is not the base: call policy.unmerge_adapter() first"
    )


def _base_trains(policy: PeftModel) -> str | None:
    added = _added_by_peft(policy)
    training = [
        _original_name(name)
        for name, weight in policy.named_parameters()
        if weight.requires_grad and id(weight) not in added
    ]
    if not training:
        return None
    return (
        f"{training[0]!r} trains ({len(training)} such parameters) but belongs to the base model, which "
        'is the reference: the reference would move with it. Freeze it (bias="none"), train a copy of '
        "it (modules_to_save=…), or keep a clone"
    )


def _frozen_adapter_trains(policy: PeftModel, adapter: str) -> str | None:
    if not any(weight.requires_grad for weight in _weights_of(policy, adapter)):
        return None
    return (
        f"adapter {adapter!r} trains, so it is not a frozen reference: "
        f"call policy.set_requires_grad({adapter!r}, False)"
    )


def _base_was_changed(config: PeftConfig) -> str | None:
    init = getattr(config, "init_lora_weights", True)
    if getattr(config, "kasa_config", None) is not None:
        init = "kasa"
    if init in INITS_THAT_KEEP_THE_BASE and not getattr(config, "layer_replication", None):
        return None
    return (
        f"this adapter was initialised with {init!r}, which moves part of the base weight into the "
        "adapter: with the adapter off the model is not the one you started from. Use "
        "init_lora_weights=True, freeze a copy of the adapter (copy_adapter), or keep a clone"
    )


def _added_by_peft(policy: PeftModel) -> set[int]:
    """Return the ids of the parameters that PEFT put beside those of the layers it wrapped."""
    added: set[int] = set()
    for layer in _switchable(policy):
        wrapped = layer.base_layer if isinstance(layer, BaseTunerLayer) else layer.original_module
        added |= _ids(layer) - _ids(wrapped)
    return added


def _ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def _weights_of(policy: PeftModel, adapter: str) -> list[Tensor]:
    added = _added_by_peft(policy)
    named = policy.named_parameters()
    return [w for name, w in named if id(w) in added and adapter in name.split(".")]


def _original_name(name: str) -> str:
    """Return a parameter's name in the model before PEFT wrapped it."""
    wrapping = ("base_layer", "original_module")
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in wrapping)


@contextmanager
def _switched(layers: list[Any], adapter: str | None) -> Iterator[None]:
    """Switch layers off, or to one adapter, for a block.

    A layer's forward looks at these attributes, and at nothing else. PEFT's own `disable_adapter` sets them too, but it
    also turns `requires_grad` on again for adapter weights that were frozen on purpose, and it takes some 20 ms.
    """
    wanted = (
        {"_disable_adapters": True} if adapter is None else {"_disable_adapters": False, "_active_adapter": [adapter]}
    )
    before = [{name: getattr(layer, name) for name in wanted} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(wanted)
        yield
    finally:
        for layer, attributes in zip(layers, before, strict=True):
            vars(layer).update(attributes)


def _switchable(policy: nn.Module) -> list[Any]:
    """Return the modules that PEFT wrapped around the model's own."""
    return [module for module in policy.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
