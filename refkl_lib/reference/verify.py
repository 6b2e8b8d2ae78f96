"""Verify: ask whether this is a reference.

A reference that is wrong does not crash. It gives a KL that looks plausible, to a model that nobody chose.
So ask once before training, and once more at the end:

    before = verify_reference(policy, reference, batch)
    before.raise_for_findings()
    ...                                                    # train
    verify_reference(policy, reference, batch, since=before).raise_for_findings()
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refkl_lib.kl.exact import exact_kl
from refkl_lib.kl.log_probs import token_log_probs
from refkl_lib.reference.base import Reference, evaluating, fingerprint_of
from refkl_lib.tensors import is_partitioned

# How far two runs of the same model may lie apart in log-prob: rounding, by the policy's dtype.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}

UNCHECKED = (
    "the KL, and so whatever the two models expect beside the batch's own tokens: only log-probs of these are known",
    "the weights: what is known of them is the fingerprint that was written down with the log-probs",
)


@dataclass(frozen=True)
class ReferenceReport:
    """What was found. Distances are None where the two vocabularies differ.

    `max_log_prob_difference` is the largest |Δ log-prob| of a next token of the batch, `kl` is
    KL(policy‖reference) in nats per token, `findings` has a sentence for each thing that is wrong, and `unchecked` for
    each that this reference gives no way to know; of one that knows log-probs alone, `kl` is None.
    """

    strategy: str
    max_log_prob_difference: float | None
    kl: float | None
    fingerprint: str
    findings: tuple[str, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if nothing was found."""
        return not self.findings

    def raise_for_findings(self) -> None:
        """Raise ValueError with all findings, if there are any."""
        if self.findings:
            raise ValueError("this is not a frozen reference: " + "; ".join(self.findings))

    def __str__(self) -> str:
        """Return a few lines for people: verdict, distances, findings."""
        verdict = "a reference" if self.ok else "NOT a reference"
        lines = [f"{self.strategy}: {verdict}"]
        if self.kl is not None:
            lines.append(f"  KL(policy‖reference)      {self.kl:.3g} nats per token")
        if self.max_log_prob_difference is not None:
            lines.append(f"  largest |Δ log-prob|      {self.max_log_prob_difference:.3g} nats")
        lines.append(f"  fingerprint               {self.fingerprint[:16]}…")
        lines += [f"  - {finding}" for finding in self.findings]
        return "\n".join(lines + [f"  not checked: {what}" for what in self.unchecked])


def verify_reference(
    policy: nn.Module,
    reference: Reference,
    batch: dict[str, Any],
    since: ReferenceReport | None = None,
) -> ReferenceReport:
    """Return a report on `reference`; `batch` holds input_ids and attention_mask (B, T).

    Checked: it gives the policy's log-probs (parity; before training, so not with `since`), its weights
    are the same as in the report `since`, none of them trains or shares storage with one that does, two
    passes agree (no dropout), a pass carries no gradient and leaves the policy as it was: modes, flags and, where it
    is not partitioned, every bit of its weights. Of a reference that knows log-probs alone the same is checked by
    these; what they cannot tell is in the report as `unchecked`. Under ZeRO-3 every rank must call this.
    Raises ValueError if no token that counts follows another in the batch: there would be nothing to compare.
    """
    _check_batch(batch["attention_mask"])
    state = _state(policy)  # before any pass, for one is enough to change it
    difference, kl, findings = _distance(policy, reference, batch)
    if since is None and difference is not None:
        findings += _parity(policy, difference)
    fingerprint = reference.fingerprint()
    if since is not None and fingerprint != since.fingerprint:
        findings.append("its weights have changed since the earlier report")
    findings += _trains(policy, reference)
    findings += _passes(reference, batch)
    findings += _changes(state, _state(policy))
    unchecked = () if reference.has_logits else UNCHECKED
    return ReferenceReport(reference.strategy, difference, kl, fingerprint, tuple(findings), unchecked)


def _check_batch(mask: Tensor) -> None:
    if not bool(_follows(mask).any()):
        raise ValueError(
            f"in a batch of shape {tuple(mask.shape)} no token that counts follows another, so there is nothing to "
            "compare: give sequences of two tokens or more, and a mask that is 1 where a token counts"
        )


@torch.no_grad()
def _distance(
    policy: nn.Module, reference: Reference, batch: dict[str, Any]
) -> tuple[float | None, float | None, list[str]]:
    with evaluating(policy):
        ours = policy(**{"use_cache": False} | batch).logits
    targets, mask = batch["input_ids"][:, 1:], batch["attention_mask"]
    log_probs = token_log_probs(ours[:, :-1], targets)
    if not reference.has_logits:
        return _largest(log_probs - reference.log_probs(batch["input_ids"], mask), _follows(mask)), None, []
    theirs = reference.logits(**batch)
    if ours.shape != theirs.shape:
        sizes = f"{ours.shape[-1]} tokens in the policy and {theirs.shape[-1]} in the reference"
        return None, None, [f"the vocabularies differ: {sizes}"]
    gap = log_probs - token_log_probs(theirs[:, :-1], targets)
    return _largest(gap, mask[:, 1:]), exact_kl(ours, theirs, mask).item(), []


def _largest(gap: Tensor, mask: Tensor) -> float:
    return gap.abs()[mask.bool()].max().item()


def _follows(mask: Tensor) -> Tensor:
    """Return where a token that counts follows another one, (B, T-1): what a log-prob is known of."""
    return mask[:, 1:] * mask[:, :-1]


def _parity(policy: nn.Module, difference: float) -> Iterator[str]:
    dtype = next(policy.parameters()).dtype
    if difference > ROUNDING[dtype]:
        yield (
            f"it is not the model that training starts from: largest |Δ log-prob| {difference:.3g}, where "
            f"rounding in {dtype} explains {ROUNDING[dtype]:.0e}. (Training already? Pass since=)"
        )


def _trains(policy: nn.Module, reference: Reference) -> Iterator[str]:
    storages = {_storage(weight) for weight in policy.parameters() if weight.requires_grad and weight.numel()}
    named = [(name, weight.requires_grad, _storage(weight)) for name, weight in reference.named_weights()]
    if training := [name for name, requires_grad, _ in named if requires_grad]:
        yield f"{training[0]!r} requires grad ({len(training)} of its weights do)"
    if shared := [name for name, _, storage in named if storage in storages]:
        yield f"{shared[0]!r} shares storage with a policy weight that trains ({len(shared)} in all)"


def _passes(reference: Reference, batch: dict[str, Any]) -> Iterator[str]:
    with torch.enable_grad():
        first, second = _answer(reference, batch), _answer(reference, batch)
    if first.requires_grad:
        yield f"its {'logits' if reference.has_logits else 'log-probs'} carry a gradient"
    if not torch.equal(first, second):
        yield "two passes over the same batch differ: is dropout on?"


def _answer(reference: Reference, batch: dict[str, Any]) -> Tensor:
    if reference.has_logits:
        return reference.logits(**batch)
    mask = batch["attention_mask"]
    return reference.log_probs(batch["input_ids"], mask)[_follows(mask).bool()]


def _state(policy: nn.Module) -> tuple[object, str]:
    modes = [module.training for module in policy.modules()]
    flags = [weight.requires_grad for weight in policy.parameters()]
    named = [*policy.named_parameters(), *policy.named_buffers()]
    # Of partitions, the small ones are whole after a pass, and the others never are.
    return (modes, flags), "" if is_partitioned(policy) else fingerprint_of(named)


def _changes(before: tuple[object, str], after: tuple[object, str]) -> Iterator[str]:
    if before[0] != after[0]:
        yield "a pass changes the policy's training modes or requires_grad flags"
    if before[1] != after[1]:
        yield "a pass changes the policy's weights"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
