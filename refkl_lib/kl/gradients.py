"""Gradients: what each estimator does in each place, by going through every token of a small vocabulary.

    >>> kl_gradient_table(p_logits, q_logits)

The expectation over samples is a sum over the vocabulary here, so nothing in the table is noise. It is taken of
what `kl_loss`, `kl_reward` and `importance_weights` return, not of formulas of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from refkl_lib.kl.estimators import Estimator, importance_weights, kl_loss, kl_reward

Place = Literal["loss", "weighted loss", "off-policy loss", "off-policy loss, weight detached", "reward"]
Follows = Literal["∇KL(p‖q)", "∇KL(q‖p)", "zero", "neither"]


@dataclass(frozen=True)
class GradientRow:
    """One estimator in one place: what it is worth, and where its gradient points.

    `value` (nats) and `variance` (nats²) are those of a single sample's estimate, its weight included.
    `gradient` (V,) is the expected one with respect to p_logits, `error` is ‖gradient - ∇KL(p‖q)‖ / ‖∇KL(p‖q)‖,
    and `follows` says whose gradient it is.
    """

    estimator: Estimator
    place: Place
    value: float
    variance: float
    gradient: Tensor
    error: float
    follows: Follows


@dataclass(frozen=True, repr=False)
class GradientTable:
    """Every estimator in every place: `rows[estimator, place]`, with both directions' exact KL in nats."""

    kl: float
    reverse_kl: float
    rows: dict[tuple[Estimator, Place], GradientRow]

    def __str__(self) -> str:
        """Return a table of constant layout: places down, estimators across."""
        loss = [self.rows[estimator, "loss"] for estimator in get_args(Estimator)]
        lines = [
            f"KL(p‖q) = {self.kl:z.4f} nats, KL(q‖p) = {self.reverse_kl:z.4f} nats",
            "",
            _line("", get_args(Estimator)),
            _line("expected value", [f"{row.value:z.4f}" for row in loss]),
            _line("variance of one sample", [f"{row.variance:z.4f}" for row in loss]),
            "",
            "relative error of the expected gradient against ∇KL(p‖q), and what it follows",
        ]
        for place in get_args(Place):
            rows = [self.rows[estimator, place] for estimator in get_args(Estimator)]
            lines.append(_line(place, [f"{row.error:.2f} {row.follows}" for row in rows]))
        return "\n".join(lines)

    __repr__ = __str__


def kl_gradient_table(p_logits: Tensor, q_logits: Tensor, *, behaviour_logits: Tensor | None = None) -> GradientTable:
    """Return each estimator's exact value, variance and gradient to `p_logits`, in each place, in float64.

    The logits are (V,): policy p, reference q, and the policy that sampled the off-policy tokens, which is
    halfway between p and q unless given. The places:

    - "loss": `kl_loss` on the policy's tokens; "weighted loss": times a weight of 1 that carries a gradient
    - "off-policy loss": `kl_loss` on the behaviour's tokens, times importance weights, with their gradient or
      with the weight detached
    - "reward": `kl_reward` times the gradient of the sampled token's log-prob, as a policy gradient has it

    Raises ValueError if shapes differ, a logit is not finite, or a token's log-probs differ by over 300.
    """
    _check_logits(p_logits=p_logits, q_logits=q_logits, behaviour_logits=behaviour_logits)
    if behaviour_logits is None:
        behaviour_logits = (p_logits.double() + q_logits.double()) / 2
    logits = p_logits.detach().double().requires_grad_()
    with torch.enable_grad():
        log_p = logits.log_softmax(-1)
        log_q, log_b = (given.detach().double().log_softmax(-1) for given in (q_logits, behaviour_logits))
        _check_distance(log_p, log_q, log_b)
        kl, reverse_kl = _kl(log_p, log_q), _kl(log_q, log_p)
        exact: dict[Follows, Tensor] = {
            "∇KL(p‖q)": _gradient(kl, logits),
            "∇KL(q‖p)": _gradient(reverse_kl, logits),
            "zero": torch.zeros_like(logits),
        }
        rows = {}
        for estimator, place in product(get_args(Estimator), get_args(Place)):
            samples = _samples(estimator, place, log_p, log_q, log_b)
            gradient = _gradient(samples.mean(samples.surrogate), logits)
            rows[estimator, place] = _row(estimator, place, samples, gradient, exact)
    return GradientTable(kl.item(), reverse_kl.item(), rows)


class _Samples(NamedTuple):
    """Every token that may be sampled: its chance, its estimate, and what is back-propagated for it."""

    chances: Tensor
    estimates: Tensor
    surrogate: Tensor

    def mean(self, values: Tensor) -> Tensor:
        return (self.chances * values).sum()


def _samples(estimator: Estimator, place: Place, log_p: Tensor, log_q: Tensor, log_b: Tensor) -> _Samples:
    if place == "reward":
        penalty = kl_reward(log_p, log_q, estimator)
        return _Samples(log_p.detach().exp(), penalty, penalty * log_p)
    sampler = log_b if place.startswith("off-policy") else log_p.detach()
    weights = None if place == "loss" else importance_weights(log_p, sampler)
    if weights is not None and place.endswith("detached"):
        weights = weights.detach()
    loss = kl_loss(log_p, log_q, estimator, reduction="none", weights=weights)
    return _Samples(sampler.exp(), loss, loss)


def _row(
    estimator: Estimator, place: Place, samples: _Samples, gradient: Tensor, exact: dict[Follows, Tensor]
) -> GradientRow:
    value = samples.mean(samples.estimates)
    return GradientRow(
        estimator,
        place,
        value=value.item(),
        variance=samples.mean((samples.estimates - value).square()).item(),
        gradient=gradient,
        error=_relative_error(gradient, exact["∇KL(p‖q)"]),
        follows=_follows(gradient, exact),
    )


def _follows(gradient: Tensor, exact: dict[Follows, Tensor]) -> Follows:
    scale = max(target.norm().item() for target in exact.values())
    close = (name for name, target in exact.items() if (gradient - target).norm() <= 1e-9 * scale + 1e-15)
    return next(close, "neither")


def _relative_error(gradient: Tensor, target: Tensor) -> float:
    distance = (gradient - target).norm()
    # Where p = q, both are 0 up to rounding, and so is the error.
    return 0.0 if distance <= 1e-15 else (distance / target.norm()).item()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def _gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def _line(name: str, cells: Iterable[str]) -> str:
    return (f"{name:<34}" + "".join(f"{cell:<16}" for cell in cells)).rstrip()


def _check_logits(**logits: Tensor | None) -> None:
    shape = next(given.shape for given in logits.values() if given is not None)
    for name, given in logits.items():
        if given is None:
            continue
        if given.dim() != 1 or given.shape != shape:
            raise ValueError(f"{name} is {tuple(given.shape)}, but all logits must be (V,), with one V")
        if not bool(torch.isfinite(given).all()):
            raise ValueError(f"{name} has an entry that is NaN or infinite, but every token must be possible")


def _check_distance(log_p: Tensor, log_q: Tensor, log_b: Tensor) -> None:
    furthest = max((log_p - other).abs().max().item() for other in (log_q, log_b))
    if furthest > 300:
        raise ValueError(
            f"a token's log-probs differ by {furthest:.0f} nats, and e to twice that overflows float64: "
            "bring the logits within 300 of each other"
        )
