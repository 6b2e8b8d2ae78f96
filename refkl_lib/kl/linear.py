"""From hidden states: what is wanted of logits, without the logits.

A head makes V numbers of each hidden state of H, some hundred times as many, and a KL makes one number of those.
Here a chunk of tokens goes all the way, there and, for the gradient, back, before the next one starts:

    linear_kl(hidden, policy.lm_head, ref_hidden, reference.model.lm_head, mask).backward()
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from refkl_lib.kl.chunks import Rows, chunk_before_head, chunks_of, log_softmax_, widened
from refkl_lib.kl.exact import check_vocabularies, kl_slope, kl_terms
from refkl_lib.kl.log_probs import check_ids, chosen, chosen_slope
from refkl_lib.kl.reduce import Reduction, check_mask, reduce_tokens

# From a chunk's log-probs (C, V), which it may overwrite: values (C,), and a call for their derivatives by the logits.
Score = Callable[[Tensor, Rows], tuple[Tensor, Callable[[], Tensor]]]


@dataclass(frozen=True)
class HeadOutput:
    """What becomes of a head's output x: softcap·tanh(scale·x / softcap) / temperature; without a softcap, no tanh."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}, but it must be a number above 0")

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits, in the dtype of `x`."""
        if self.scale != 1:
            x = x * self.scale
        if self.softcap is not None:
            x = self.softcap * torch.tanh(x / self.softcap)
        return x if self.temperature == 1 else x / self.temperature

    def derivative(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of the logits by `x`."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return factor
        tanh = logits.to(widened(logits.dtype)) * (self.temperature / self.softcap)
        return (1 - tanh.square_()).mul_(factor)


def linear_kl(
    p_hidden: Tensor,
    p_head: nn.Linear,
    q_hidden: Tensor,
    q_head: nn.Linear,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    chunk: int | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return what `exact_kl` gives for p_head(p_hidden) and q_head(q_hidden), with gradients to p alone.

    Hidden states are (B, T, H), and H may differ between p and q. Gradients reach `p_hidden` and what of `p_head`
    requires them; q is a constant. Logits exist for `chunk` tokens at a time, by default so many as 32 MiB hold (on
    a GPU 256), and 128 at least. If the models go on from their heads' outputs, logits =
    softcap·tanh(scale·output / softcap) / temperature (Gemma 2's final_logit_softcapping, Cohere's logit_scale,
    1 / Granite's logits_scaling). Logits have the dtype of the heads' outputs, sums over them at least float32.

    "mean" and "sum" form the gradient together with the value. With a head that trains, the other reductions
    make the logits a second time in the backward pass, for what each token weighs is only known there.
    Raises TypeError if a head is no nn.Linear; ValueError as `exact_kl` does, if heads and hidden states do not fit,
    `q_hidden` requires a gradient, or `chunk`, `scale`, `softcap` or `temperature` is not positive.
    """
    _check_head("p", p_hidden, p_head)
    _check_head("q", q_hidden, q_head)
    _check_pair(p_hidden, p_head, q_hidden, q_head)
    output = HeadOutput(scale, softcap, temperature)

    def score(log_p: Tensor, rows: Rows) -> tuple[Tensor, Callable[[], Tensor]]:
        q_logits = output.logits(F.linear(q_hidden[rows], q_head.weight, q_head.bias))
        log_q = log_softmax_(q_logits, log_p.dtype)
        p, terms = kl_terms(log_p, log_q)
        kl = terms.sum(-1)
        return kl, lambda: kl_slope(p, terms, kl)

    counts = check_mask(torch.zeros(p_hidden.shape[:-1], device=p_hidden.device), mask)
    sweep = _Sweep(score, output, counts, chunk_before_head(p_hidden, p_head.out_features, chunk))
    values = _apply(sweep, p_hidden, p_head, alike=reduction in ("mean", "sum"))
    return reduce_tokens(values, mask, reduction)


def linear_token_log_probs(
    hidden: Tensor,
    head: nn.Linear,
    token_ids: Tensor,
    chunk: int | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return what `token_log_probs` gives for head(hidden): hidden (B, T, H), token_ids (B, T) -> (B, T).

    `chunk` and what follows it are as in `linear_kl`. With a head that trains, the backward pass makes the logits a
    second time. Raises TypeError if the head is no nn.Linear; ValueError if shapes do not fit, an id is not in the
    vocabulary, or a number is not positive.
    """
    _check_head("", hidden, head)
    _check_batch("hidden", hidden)
    if hidden.shape[:-1] != token_ids.shape:
        raise ValueError(
            f"hidden of shape {tuple(hidden.shape)} needs token_ids of shape {tuple(hidden.shape[:-1])}, not "
            f"{tuple(token_ids.shape)}; for next-token log-probs pass hidden[:, :-1] and token_ids[:, 1:]"
        )
    check_ids(token_ids, head.out_features)

    def score(log_p: Tensor, rows: Rows) -> tuple[Tensor, Callable[[], Tensor]]:
        return chosen(log_p, token_ids[rows]), lambda: chosen_slope(log_p, token_ids[rows])

    counts = torch.ones_like(token_ids, dtype=torch.bool)
    output = HeadOutput(scale, softcap, temperature)
    sweep = _Sweep(score, output, counts, chunk_before_head(hidden, head.out_features, chunk))
    return _apply(sweep, hidden, head, alike=False)


def _apply(sweep: "_Sweep", hidden: Tensor, head: nn.Linear, alike: bool) -> Tensor:
    inputs: tuple[Tensor | None, ...] = (hidden, head.weight, head.bias)
    if not torch.is_grad_enabled():  # A Function is told what requires a gradient, but not whether one is wanted.
        inputs = tuple(tensor if tensor is None else tensor.detach() for tensor in inputs)
    return _TokenValues.apply(sweep, alike, *inputs)


class _Gradients:
    """The gradients of hidden states, weight and bias, growing chunk by chunk; None for what needs none."""

    def __init__(self, hidden: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> None:
        self.needed = any(needed)
        zeros = partial(torch.zeros, dtype=widened(hidden.dtype), device=hidden.device)  # for sums over the tokens
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        self.weight = zeros(weight.shape) if needed[1] else None
        self.bias = zeros(weight.shape[0]) if needed[2] else None

    def add(self, slope: Tensor, hidden: Tensor, weight: Tensor, rows: Rows) -> None:
        """Add what a chunk's derivatives by the head's output (C, V) bring."""
        if self.hidden is not None:
            self.hidden[rows] = (slope.to(weight.dtype) @ weight).to(hidden.dtype)
        if self.weight is not None:
            self.weight.addmm_(slope.T, hidden[rows].to(slope.dtype))
        if self.bias is not None:
            self.bias += slope.sum(0)


@dataclass
class _Sweep:
    """A walk through the tokens that count, from hidden states to values and, where needed, back to gradients."""

    score: Score
    output: HeadOutput
    counts: Tensor  # (B, T) bool
    chunk: int

    def run(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needed: tuple[bool, ...] = (False, False, False),
        scales: Tensor | float = 1.0,
    ) -> tuple[Tensor, _Gradients]:
        """Return the values (B, T), 0 for tokens that do not count, and the needed gradients of Σ scale·value."""
        values = torch.zeros(self.counts.shape, dtype=widened(hidden.dtype), device=hidden.device)
        gradients = _Gradients(hidden, weight, needed)
        for rows in chunks_of(self.counts, self.chunk):
            scale = scales[rows].unsqueeze(-1) if isinstance(scales, Tensor) else scales
            # A function of its own, so that nothing of one chunk is left when the next one starts.
            values[rows] = self._step(rows, hidden, weight, bias, scale, gradients)
        return values, gradients

    def _step(
        self,
        rows: Rows,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | float,
        gradients: _Gradients,
    ) -> Tensor:
        logits = self.output.logits(F.linear(hidden[rows], weight, bias))
        scale = self.output.derivative(logits) * scale if gradients.needed else scale
        values, slope = self.score(log_softmax_(logits, widened(hidden.dtype)), rows)
        if gradients.needed:
            gradients.add(slope().mul_(scale), hidden, weight, rows)
        return values


class _TokenValues(torch.autograd.Function):
    """Per-token values from hidden states. `alike` promises that all tokens that count will weigh the same."""

    @staticmethod
    def forward(ctx: Any, sweep: _Sweep, alike: bool, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.sweep, ctx.needed = sweep, ctx.needs_input_grad[2:]
        # A hidden state's gradient is scaled by what its own token weighs, so it can be formed before that is
        # known. The head's is a sum over tokens.
        ctx.formed = alike or not any(ctx.needed[1:])
        if not ctx.formed:
            ctx.save_for_backward(hidden, weight, bias)
            return sweep.run(hidden, weight, bias)[0]
        values, gradients = sweep.run(hidden, weight, bias, ctx.needed)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.formed:
            gradients = ctx.sweep.run(*ctx.saved_tensors, ctx.needed, grad)[1]
            return None, None, gradients.hidden, gradients.weight, gradients.bias
        any_token = grad[ctx.sweep.counts][:1].sum()  # 0 if none counts
        scales = (grad.unsqueeze(-1), any_token, any_token)
        return None, None, *(g if g is None else g * s for g, s in zip(ctx.saved_tensors, scales, strict=True))


def _check_head(name: str, hidden: Tensor, head: nn.Linear) -> None:
    name = name and f"{name}_"
    if type(head) is not nn.Linear:
        raise TypeError(
            f"{name}head is a {type(head).__name__}, but must be a plain nn.Linear: what another module does to its "
            "input cannot be known. Compute its logits and use exact_kl or token_log_probs"
        )
    if head.weight.shape != (head.out_features, hidden.shape[-1]):
        raise ValueError(
            f"{name}hidden is {tuple(hidden.shape)}, and the weight of {name}head {tuple(head.weight.shape)}: "
            "it must be (vocabulary, hidden size). Under ZeRO-3 it is empty outside of a forward pass"
        )


def _check_batch(name: str, hidden: Tensor) -> None:
    if hidden.dim() != 3:
        raise ValueError(f"hidden states must be (B, T, H), but {name} is {tuple(hidden.shape)}")


def _check_pair(p_hidden: Tensor, p_head: nn.Linear, q_hidden: Tensor, q_head: nn.Linear) -> None:
    _check_batch("p_hidden", p_hidden)
    if p_hidden.shape[:-1] != q_hidden.shape[:-1]:
        raise ValueError(
            f"p_hidden is {tuple(p_hidden.shape)} and q_hidden is {tuple(q_hidden.shape)}: "
            "both must come from the same batch"
        )
    check_vocabularies(p_head.out_features, q_head.out_features)
    if torch.is_grad_enabled() and q_hidden.requires_grad:
        raise ValueError(
            "q_hidden requires a gradient, and linear_kl gives one to p alone: detach it, "
            "or compute logits and use exact_kl, which gives gradients to both"
        )
