"""From hidden states: what is wanted of logits, without the logits.

A head makes V numbers of each hidden state of H, some hundred times as many, and a KL makes one number of those.
Here a chunk of tokens goes all the way, there and, for the gradient, back, before the next one starts:

    linear_kl(hidden, policy.lm_head, ref_hidden, reference.model.lm_head, mask).backward()
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from refkl_lib.kl.chunks import Rows, chunk_before_head, chunks_of, log_softmax_, widened
from refkl_lib.kl.exact import check_vocabularies, kl_slope, kl_terms
from refkl_lib.kl.head import HeadOutput, autograd_inputs, check_batch, check_head
from refkl_lib.kl.reduce import Reduction, check_mask, reduce_tokens


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
    requires them; q is a constant. Logits exist for `chunk` tokens at a time, by default so many as 24 MiB hold (on
    a GPU 256), and 128 at least. If the models go on from their heads' outputs, logits =
    softcap·tanh(scale·output / softcap) / temperature (Gemma 2's final_logit_softcapping, Cohere's logit_scale,
    1 / Granite's logits_scaling). Logits have the dtype of the heads' outputs, sums over them at least float32.

    "mean" and "sum" form the gradient together with the value. With a head that trains, the other reductions
    make the logits a second time in the backward pass, for what each token weighs is only known there.
    Raises TypeError if a head is no nn.Linear; ValueError as `exact_kl` does, if heads and hidden states do not fit,
    `q_hidden` requires a gradient, or `chunk`, `scale`, `softcap` or `temperature` is not positive.
    """
    check_head("p", p_hidden, p_head)
    check_head("q", q_hidden, q_head)
    _check_pair(p_hidden, p_head, q_hidden, q_head)
    output = HeadOutput(scale, softcap, temperature)
    counts = check_mask(torch.zeros(p_hidden.shape[:-1], device=p_hidden.device), mask)
    sweep = _Sweep(q_hidden, q_head, output, counts, chunk_before_head(p_hidden, p_head.out_features, chunk))
    values = _TokenKL.apply(sweep, reduction in ("mean", "sum"), *autograd_inputs(p_hidden, p_head))
    return reduce_tokens(values, mask, reduction)


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

    q_hidden: Tensor
    q_head: nn.Linear
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
        log_p = log_softmax_(logits, widened(hidden.dtype))
        q_logits = self.output.logits(F.linear(self.q_hidden[rows], self.q_head.weight, self.q_head.bias))
        p, terms = kl_terms(log_p, log_softmax_(q_logits, log_p.dtype))
        kl = terms.sum(-1)
        if gradients.needed:
            gradients.add(kl_slope(p, terms, kl).mul_(scale), hidden, weight, rows)
        return kl


class _TokenKL(torch.autograd.Function):
    """Per-token KLs from hidden states. `alike` promises that all tokens that count will weigh the same."""

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


def _check_pair(p_hidden: Tensor, p_head: nn.Linear, q_hidden: Tensor, q_head: nn.Linear) -> None:
    check_batch("p_hidden", p_hidden)
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
