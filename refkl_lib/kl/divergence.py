"""KL between two models: the article's function.

The KL comes from hidden states where the two heads are known to be all that stands between these and the logits
(`linear_kl`), else from whole logits (`exact_kl`), and then a warning says why. The number is the same.
"""

import copy
import inspect
import warnings
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refkl_lib.kl.exact import exact_kl
from refkl_lib.kl.head import HeadOutput
from refkl_lib.kl.linear import linear_kl
from refkl_lib.kl.reduce import Reduction
from refkl_lib.tensors import is_partitioned


class GivesLogits(Protocol):
    """What a KL needs of a reference, however that is kept."""

    def logits(self, **inputs: Any) -> Tensor:
        """Return logits (B, T, V) without a gradient."""


def compute_kl_divergence(
    policy: nn.Module,
    reference: GivesLogits,
    inputs: dict[str, Any],
    reduction: Reduction = "mean",
) -> Tensor:
    """Return KL(policy‖reference) in nats on `inputs`, with a gradient to the policy alone.

    Every position of `inputs["attention_mask"]` counts (all of them without one): the value at a position
    compares what the two models expect *after* that token. Reduction and errors are `exact_kl`'s.

    No logits (B, T, V) are made if both heads are plain linear layers, whole on this device, and the models do to
    their output nothing that `linear_kl` does not know: each model is asked for the logits of its last token, and
    they must be what its head makes of that token's hidden state. Otherwise a UserWarning says what stands against it.
    """
    try:
        return kl_of_passes(*hidden_states(policy, reference, inputs), inputs.get("attention_mask"), reduction)
    except WholeLogitsError as obstacle:
        warnings.warn(f"computing the KL from whole logits, which takes more memory: {obstacle}", stacklevel=2)
    policy_logits = policy(**{"use_cache": False} | inputs).logits
    return exact_kl(policy_logits, reference.logits(**inputs), inputs.get("attention_mask"), reduction)


class WholeLogitsError(ValueError):
    """Hidden states are not enough; the message says why."""


class Pass(NamedTuple):
    """What a pass gave: hidden states (B, T, H), the head they go to, and the model's own logits of the last token."""

    hidden: Tensor
    head: nn.Linear
    last_logits: Tensor  # (B, 1, V)


def hidden_states(policy: nn.Module, reference: GivesLogits, inputs: dict[str, Any]) -> tuple[Pass, Pass, HeadOutput]:
    """Return the policy's pass, the reference's (without a gradient), and what becomes of both heads' outputs.

    Raises WholeLogitsError, a ValueError, if logits are more than a linear head's output of these hidden states.
    """
    if "logits_to_keep" in inputs:
        raise WholeLogitsError("the inputs choose by logits_to_keep of which tokens there are logits")
    # A reference is known by its `logits` alone; this one may also say where its model is.
    as_reference = getattr(reference, "as_reference", None)
    if as_reference is None:
        raise WholeLogitsError(f"a {type(reference).__name__} does not give its model (as_reference), only logits")
    _plain_head(policy)  # if it has none, say so before the passes
    keeps_head = getattr(reference, "keeps_head", True)
    # First, so that it does not run on top of what the policy's pass keeps.
    q = _reference_pass(as_reference(), inputs, keeps_head)
    # The checks after both passes: had the one borrowed the other's head, it would be given back by now.
    p, output = policy_states(policy, inputs)
    _check_last(q, output, "reference")
    return p, q, output


def policy_states(policy: nn.Module, inputs: dict[str, Any]) -> tuple[Pass, HeadOutput]:
    """Return the policy's pass and what becomes of its head's output; raises as `hidden_states` does."""
    p, output = _pass(policy, inputs), _output_of(policy)
    _check_last(p, output, "policy")
    return p, output


def kl_of_passes(p: Pass, q: Pass, output: HeadOutput, mask: Tensor | None, reduction: Reduction = "mean") -> Tensor:
    """Return KL(p‖q) of two passes, as `linear_kl` does."""
    return linear_kl(p.hidden, p.head, q.hidden, q.head, mask, reduction, scale=output.scale, softcap=output.softcap)


@torch.no_grad()
def _reference_pass(as_reference: AbstractContextManager[nn.Module], inputs: dict[str, Any], keeps_head: bool) -> Pass:
    with as_reference as model:
        q = _pass(model, inputs)
        # A swap's head is the policy's again when its pass is over.
        return q if keeps_head else q._replace(head=copy.deepcopy(q.head))


def _pass(model: Any, inputs: dict[str, Any]) -> Pass:
    """Run the model for the logits of its last token, and take the hidden states on their way to the head."""
    head = _plain_head(model)
    given: list[Tensor] = []
    hook = model.get_decoder().register_forward_hook(lambda _module, _args, output: given.append(output[0]))
    try:
        kept = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**{"use_cache": False} | kept, logits_to_keep=1).logits
    finally:
        hook.remove()
    return Pass(given[-1], head, logits)


def _plain_head(model: Any) -> nn.Linear:
    """Return the head if it is a linear layer and nothing else; raises WholeLogitsError if not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "get_decoder") or "logits_to_keep" not in inspect.signature(base.forward).parameters:
        raise WholeLogitsError(f"the forward pass of a {type(base).__name__} makes the logits of every token")
    if is_partitioned(model):
        raise WholeLogitsError("ZeRO-3 has its head in one piece only during a forward pass")
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise WholeLogitsError(f"its head is a {type(head).__name__}, not a plain linear layer; is an adapter on it?")
    if type(head.weight) is not nn.Parameter:
        raise WholeLogitsError(f"its head's weight is a {type(head.weight).__name__}; is it sharded or quantised?")
    return head


def _output_of(model: Any) -> HeadOutput:
    """Return what the model's configuration says of its head's output, under the names of transformers 5.24."""
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    values = (getattr(model.config.get_text_config(), name, None) for name in names)
    multiplier, divisor, softcap = (v if isinstance(v, int | float) and v > 0 else None for v in values)
    return HeadOutput(scale=(multiplier or 1.0) / (divisor or 1.0), softcap=softcap)


def _check_last(run: Pass, output: HeadOutput, name: str) -> None:
    """Raise WholeLogitsError if the model's last logits are not those that `linear_kl` would compute."""
    with torch.no_grad():
        ours = output.logits(F.linear(run.hidden[:, -1:], run.head.weight, run.head.bias))
    theirs = run.last_logits.detach().to(ours.dtype)
    # The same operations on the same numbers; only a division may have been a multiplication.
    if not torch.allclose(ours, theirs, rtol=2 * torch.finfo(ours.dtype).eps, atol=0.0, equal_nan=True):
        raise WholeLogitsError(f"the {name}'s logits are not what its head makes of its last hidden states")
