"""One training step, watched: what lives at each moment, by owner.

The step is the kit's own: the reference's pass and the policy's (`step.policy_loss`), backward, optimizer. It is the
same code on the CPU, where it trains, and on the meta device, where it is priced.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from refkl_lib.memory.ledger import MemoryLedger
from refkl_lib.memory.meta import Device, MetaDevice
from refkl_lib.memory.optimizers import OptimizerName, Training
from refkl_lib.memory.partition import Gathering, Zero3, held_by_a_rank, trained_elements
from refkl_lib.reference import Reference, create_reference
from refkl_lib.reference.adapter import add_lora
from refkl_lib.reference.clone import CloneReference
from refkl_lib.reference.precomputed import PrecomputedReference
from refkl_lib.reference.swap import SwapReference
from refkl_lib.step import KLFrom, next_token_loss, policy_loss
from refkl_lib.tensors import storage_bytes

Phase = Literal["reference", "forward", "loss", "backward", "optimizer", "sync"]
Precision = Literal["fp32", "bf16", "mixed"]
Attention = Literal["sdpa", "eager"]
_BETA = 0.1


@dataclass(frozen=True)
class Step:
    """What the step is of; the names and meanings are those of `price`."""

    config: PreTrainedConfig
    strategy: str | None  # None: without a reference
    batch: int
    seq: int
    dtype: Precision
    optimizer: OptimizerName
    lora_rank: int | None
    targets: str | tuple[str, ...]
    checkpointing: bool
    attention: Attention | None
    kl: KLFrom
    sync: float | None
    device: Device
    zero: Zero3 | None = None
    offload: str | None = None


class Moment(NamedTuple):
    """A stretch of a step: in which phase, which visit of which layer (None outside of layers)."""

    phase: Phase
    layer: int | None
    part: str


@dataclass(frozen=True)
class Trace:
    """The most that lived in each stretch of a step, in order, and what lives between two steps; bytes by owner.

    `sizes` are "reference", the bytes it holds; "trained" and "trained bytes", the elements and bytes of the weights
    that train; bytes by owner in host memory, "host policy" say; under ZeRO-3, "trained elements", what a rank has of
    those that train, with padding.
    """

    moments: tuple[tuple[Moment, dict[str, int]], ...]
    at_rest: dict[str, int]
    sizes: dict[str, int]


def trace(step: Step, on_meta: bool = True) -> Trace:
    """Run a step of a model with random weights and return what lived.

    On meta nothing is computed and no memory is taken. Raises what the strategy raises if it does not fit.
    """
    policy, reference = policy_and_reference(step, "meta" if on_meta else "cpu")
    with MetaDevice(step.device) if on_meta else nullcontext() as device:
        batch = _batch(step) if device is None else device.put(_batch(step))
        run = _whole_step if step.zero is None else _partitioned_step
        return run(step, policy, reference, batch, on_meta)


def _whole_step(
    step: Step, policy: nn.Module, reference: Reference | None, batch: dict[str, Tensor], on_meta: bool
) -> Trace:
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    training = Training(step.optimizer, trained, step.device == "cuda", step.dtype == "mixed")
    with MemoryLedger(meta=on_meta) as ledger:
        training.warm_up()
        ledger.own("policy", policy)
        ledger.own("reference", reference or ())
        ledger.own("optimizer", training.held())
        ledger.own("activations", batch)
        watch = _Watch(ledger)
        with watch.layers(policy):
            held_by_loop = _backward(step, policy, reference, batch, watch)
        watch.enter("optimizer")
        training.step()
        training.zero_grad()
        if step.sync is not None and reference is not None:
            watch.enter("sync")
            reference.sync(policy, step.sync)
        watch.end()
        del held_by_loop
        held = {"reference": reference.owned_bytes() if reference else 0}
        found = Trace(tuple(watch.moments), ledger.now(), held | _trained(policy))
        return _off_device(found, policy) if step.strategy == "swap" and step.device == "cuda" else found


def _off_device(found: Trace, policy: nn.Module) -> Trace:
    """Take from the device what waits in host memory: the reference and, in its pass, a copy of the policy."""
    copied = storage_bytes(policy)

    def here(owners: dict[str, int], copies: int) -> dict[str, int]:
        return owners | {"reference": 0, "activations": owners["activations"] - copies}

    moments = ((m, here(owners, copied if m.phase == "reference" else 0)) for m, owners in found.moments)
    host = {"host policy": copied, "host reference": found.sizes["reference"]}
    return Trace(tuple(moments), here(found.at_rest, 0), found.sizes | host)


def _partitioned_step(
    step: Step, policy: nn.Module, reference: Reference | None, batch: dict[str, Tensor], on_meta: bool
) -> Trace:
    """Run the passes of whole models that nobody owns, and let shards stand for them.

    A gradient goes as soon as it is there, into the flat ones, which stand for all. The optimizer takes no step.
    """
    assert step.zero is not None
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(_drop_grad)
    reference_model = reference.model if isinstance(reference, CloneReference) else None
    partitioned = step.strategy == "zero3"
    held, host = held_by_a_rank(
        step.zero, policy, reference_model, partitioned, step.offload, step.optimizer, step.device == "cuda"
    )
    with MemoryLedger(meta=True) as ledger:
        for owner, tensors in held.items():
            ledger.own(owner, tensors)
        ledger.own("activations", batch)
        gathering = Gathering(step.zero, partial(ledger.own, "gathered"), twice=step.strategy == "adapter")
        gathering.keep(policy)
        if reference_model is not None and partitioned:
            gathering.keep(reference_model)
        watch = _Watch(ledger, gathering if partitioned else None)
        with watch.layers(policy), gathering.of(policy):
            held_by_loop = _backward(step, policy, reference, batch, watch)
        watch.end()
        gathering.let_go(policy)
        watch.enter("optimizer")
        watch.end()
        del held_by_loop
        gathering.keep(policy)
        sizes = {"reference": _nbytes(held["reference"]) + _nbytes(host["reference"])}
        sizes["trained elements"] = trained_elements(policy, step.zero.ranks)
        sizes |= {f"host {owner}": _nbytes(tensors) for owner, tensors in host.items()}
        return Trace(tuple(watch.moments), ledger.now(), sizes | _trained(policy))


def _trained(policy: nn.Module) -> dict[str, int]:
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    return {"trained": sum(weight.numel() for weight in weights), "trained bytes": _nbytes(weights)}


def _nbytes(tensors: list[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _drop_grad(weight: Tensor) -> None:
    weight.grad = None


def policy_and_reference(step: Step, device: str) -> tuple[nn.Module, Reference | None]:
    """Return both models, the policy ready to train."""
    policy = model = model_of(step.config, step, device)
    with torch.device(device):
        reference = _reference_beside(model, step)
        if step.lora_rank is not None:
            policy = _with_lora(model, step)
    if step.zero is not None and step.dtype != "fp32":
        for weight in policy.parameters():  # DeepSpeed trains all weights in one dtype; PEFT's adapters are float32
            weight.data = weight.data.bfloat16()
    if step.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    policy.train()
    return policy, create_reference(policy, "adapter") if step.strategy == "adapter" else reference


def _reference_beside(model: nn.Module, step: Step) -> Reference | None:
    """Return a reference made of the bare model: there is no need to copy an adapter that does nothing yet."""
    if step.strategy is None or step.strategy == "adapter":
        return None
    if step.strategy == "precomputed":
        return _NotYetComputed()
    return SwapReference(model) if step.strategy == "swap" else CloneReference(model)


class _NotYetComputed(PrecomputedReference):
    """Log-probs of the size that a look-up gives; what they are does not matter here."""

    def __init__(self) -> None:
        pass

    def log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return torch.zeros(input_ids.shape[0], input_ids.shape[1] - 1, device=input_ids.device)


def _with_lora(model: nn.Module, step: Step) -> nn.Module:
    assert step.lora_rank is not None
    targets = step.targets if isinstance(step.targets, str) else list(step.targets)
    with warnings.catch_warnings():
        # PEFT 0.21 says so of patterns that it made itself, for experts that have no such weight.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern", category=RuntimeWarning)
        return add_lora(model, step.lora_rank, targets)


def model_of(config: PreTrainedConfig, step: Step, device: str) -> PreTrainedModel:
    """Return the bare model; on meta it is not initialised, for there are no numbers."""
    dtype = torch.float32 if step.dtype == "fp32" else torch.bfloat16
    with torch.device(device), no_init_weights() if device == "meta" else nullcontext():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=step.attention)
    model.tie_weights()  # which is a part of the initialisation
    return model


def _batch(step: Step) -> dict[str, Tensor]:
    ids = torch.arange(step.batch * step.seq).view(step.batch, step.seq) % step.config.get_text_config().vocab_size
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _backward(
    step: Step, policy: nn.Module, reference: Reference | None, batch: dict[str, Tensor], watch: "_Watch"
) -> object:
    """Make the passes, the loss and its gradients; return what a training loop would still hold of it."""
    kl = None
    if reference is None:
        watch.enter("forward")
        loss = next_token_loss(policy, batch, step.kl)
    else:
        loss, kl = policy_loss(policy, _Watched(reference, policy, watch), batch, _BETA, step.kl)
    watch.enter("backward")
    loss.backward()
    return loss, kl


class _Watched:
    """A reference whose passes are a phase of the step."""

    def __init__(self, reference: Reference, policy: nn.Module, watch: "_Watch") -> None:
        self._reference, self._policy, self._watch = reference, policy, watch
        self.has_logits, self.keeps_head = reference.has_logits, reference.keeps_head

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        self._watch.enter("reference")
        with self._reference.as_reference() as model, self._layers(model):
            yield model
        self._watch.enter("forward")

    def log_probs(self, **inputs: Tensor) -> Tensor:
        self._watch.enter("reference")
        log_probs = self._reference.log_probs(**inputs)
        self._watch.enter("forward")
        return log_probs

    def _layers(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext() if model is self._policy else self._watch.reference(model)

    logits = Reference.logits


class _Watch:
    """Take the ledger's peak for every stretch of a step; hooks at the layers tell where one ends."""

    def __init__(self, ledger: MemoryLedger, gathering: Gathering | None = None) -> None:
        self.moments: list[tuple[Moment, dict[str, int]]] = []
        self._ledger, self._gathering = ledger, gathering
        self._now: Moment | None = None

    def enter(self, phase: Phase, layer: int | None = None, part: str = "") -> None:
        self.end()
        self._now = Moment(phase, layer, part)

    def end(self) -> None:
        if self._now is not None:
            self.moments.append((self._now, self._ledger.peak()))
        self._ledger.reset_peak()
        self._now = None

    @contextmanager
    def layers(self, model: nn.Module) -> Iterator[None]:
        """Tell a model's layers apart in a block, and when the whole model has been passed."""
        hooks = [model.register_forward_hook(lambda *_: self._passed())]
        for number, layer in enumerate(layers_of(model)):
            hooks += [layer.register_forward_pre_hook(partial(self._before, number))]
            hooks += [layer.register_forward_hook(partial(self._after, number))]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def reference(self, model: nn.Module) -> Iterator[None]:
        """Tell the layers of the reference's own model apart, gathered one by one if it is partitioned."""
        with self.layers(model), nullcontext() if self._gathering is None else self._gathering.of(model):
            yield

    def _before(self, layer: int, *_: object) -> None:
        assert self._now is not None
        self.enter(self._now.phase, layer, "pass")

    def _after(self, layer: int, _module: nn.Module, _inputs: object, output: Any) -> None:
        assert self._now is not None
        self.enter(self._now.phase, layer, "passed")
        hidden = output if isinstance(output, Tensor) else output[0]
        if self._now.phase == "forward" and hidden.requires_grad:
            # Called when the gradient of the layer's output is there, and its own backward pass begins.
            hidden.register_hook(lambda _: self.enter("backward", layer, "backward"))

    def _passed(self) -> None:
        if self._now is not None and self._now.phase == "forward":
            self.enter("loss")


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return a model's stack of layers. Raises ValueError if it has none."""
    depth = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if not stacks:
        raise ValueError(
            f"this {type(model).__name__} has no stack of {depth} layers, and what is priced are decoders with their "
            "num_hidden_layers in one list: price a model of its size that known_models() names"
        )
    return stacks[0]
