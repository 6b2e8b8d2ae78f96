"""From hidden states: the log-probs of given tokens, a block of the vocabulary at a time.

    log p(id) = l_id - m - log s        m = max_v l_v,  s = Σ_v e^(l_v - m)

    ∂/∂h = l'_id·(1 - p_id)·W_id - Σ_{v≠id} p_v·l'_v·W_v        l'_v: what the logit l_v gains per head output

No sum needs all words at once. m and s are those of the words so far, and when m grows, s shrinks by e^(old m - new m)
(Milakov & Gimelshein, arXiv 1805.02867). So does the sum of ∂/∂h, like the output of FlashAttention (Dao et al.,
arXiv 2205.14135): value and gradient take two matrix products.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from refkl_lib.kl.chunks import Rows, blocks_of, chunk_for_blocks, chunks_of, widened
from refkl_lib.kl.head import HeadOutput, autograd_inputs, check_batch, check_head
from refkl_lib.kl.log_probs import check_ids


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

    Logits exist for `chunk` tokens (by default 512, on a GPU 2,048) and at most 8,192 words at a time: 4 MiB at most
    (on a GPU 64) in float32, however many tokens and words there are. `scale`, `softcap` and `temperature` are as in
    `linear_kl`. With a head that trains, the backward pass makes the logits a second time. Raises TypeError if the
    head is no nn.Linear; ValueError if shapes do not fit, an id is not in the vocabulary, or a number is not positive.
    """
    check_head("", hidden, head)
    check_batch("hidden", hidden)
    if hidden.shape[:-1] != token_ids.shape:
        raise ValueError(
            f"hidden of shape {tuple(hidden.shape)} needs token_ids of shape {tuple(hidden.shape[:-1])}, not "
            f"{tuple(token_ids.shape)}; for next-token log-probs pass hidden[:, :-1] and token_ids[:, 1:]"
        )
    check_ids(token_ids, head.out_features)
    output = HeadOutput(scale, softcap, temperature)
    chunk = chunk_for_blocks(hidden, chunk)
    return _LinearTokenLogProbs.apply(output, token_ids, chunk, *autograd_inputs(hidden, head))


class _Head:
    """A head's logits, a block of words at a time."""

    def __init__(self, output: HeadOutput, weight: Tensor, bias: Tensor | None) -> None:
        self.output, self.weight, self.bias = output, weight, bias

    def logits(self, hidden: Tensor, words: slice) -> Tensor:
        """Return the logits (C, block) of hidden states (C, H)."""
        return self.output.logits(F.linear(hidden, self.weight[words], None if self.bias is None else self.bias[words]))

    def back(self, slope: Tensor, words: slice) -> Tensor:
        """Return slope (C, block) times the weight of these words: (C, H)."""
        return slope.to(self.weight.dtype) @ self.weight[words]


class _Running:
    """What the words so far add up to, for each token of a chunk; all (C, 1), but `pull`."""

    def __init__(self, hidden: Tensor, ids: Tensor, with_gradient: bool) -> None:
        self.hidden, self.ids, self.dtype = hidden, ids.unsqueeze(-1), widened(hidden.dtype)
        self.largest = torch.full(self.ids.shape, -torch.inf, dtype=self.dtype, device=hidden.device)
        self.chosen = self.largest  # the logit of the token's own word
        # Of all words but the token's own: 1 - p, had from p, would have no digits where p is almost 1.
        self.others = torch.zeros_like(self.largest)  # Σ e^(l_v - largest)
        # Σ e^(l_v - largest)·l'_v·W_v
        self.pull = torch.zeros_like(hidden, dtype=self.dtype) if with_gradient else None

    def add(self, head: _Head, words: slice) -> None:
        """Take in a block of words."""
        logits = head.logits(self.hidden, words)
        derivative = 1.0 if self.pull is None else head.output.derivative(logits)
        logits = logits.to(self.dtype)
        largest = torch.maximum(self.largest, logits.amax(-1, keepdim=True))
        place, inside = _places(self.ids, words)
        found = logits.gather(-1, place)
        self.chosen = torch.where(inside, found, self.chosen)
        logits.scatter_(-1, place, found.masked_fill_(inside, -torch.inf))
        base = largest.masked_fill(largest == -torch.inf, 0.0)  # -inf - (-inf) would be NaN
        shrink = self.largest.sub(base).exp_()
        weights = logits.sub_(base).exp_()
        self.others.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        if self.pull is not None:
            self.pull.mul_(shrink).add_(head.back(weights.mul_(derivative), words))
        self.largest = largest

    def total(self) -> Tensor:
        """Return Σ e^(l_v - largest) over all words."""
        return self.others + (self.chosen - self.largest).exp_()

    def log_probs(self) -> Tensor:
        """Return the log-probs (C,)."""
        return (self.chosen - self.largest - self.total().log_()).squeeze(-1)

    def hidden_gradient(self, head: _Head, pull: Tensor) -> Tensor:
        """Return the derivatives of the log-probs by the hidden states (C, H), in the memory of `pull`."""
        total = self.total()
        own = head.weight[self.ids.squeeze(-1)].to(self.dtype)
        return pull.div_(-total).addcmul_(own, self.others / total * head.output.derivative(self.chosen))


class _LinearTokenLogProbs(torch.autograd.Function):
    """Log-probs from hidden states; with a head at rest, the hidden states' gradient is formed with them."""

    @staticmethod
    def forward(
        ctx: Any,
        output: HeadOutput,
        token_ids: Tensor,
        chunk: int,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.output, ctx.chunk, ctx.needed = output, chunk, ctx.needs_input_grad[3:]
        # A hidden state's gradient is scaled by what its own token weighs, so it can be formed before that is
        # known. The head's is a sum over tokens.
        ctx.formed = not any(ctx.needed[1:])
        gradient = torch.empty_like(hidden) if ctx.formed and ctx.needed[0] else None
        values = torch.empty(token_ids.shape, dtype=widened(hidden.dtype), device=hidden.device)
        largest, total = torch.empty_like(values), torch.empty_like(values)
        head = _Head(output, weight, bias)
        for rows in _chunks(token_ids, chunk):
            running = _Running(hidden[rows], token_ids[rows], gradient is not None)
            for words in blocks_of(running.hidden, weight.shape[0]):
                running.add(head, words)
            values[rows] = running.log_probs()
            # Two numbers, not one logsumexp: logits of 10,000 have few digits for the rest.
            largest[rows], total[rows] = running.largest.squeeze(-1), running.total().squeeze(-1)
            if gradient is not None and running.pull is not None:
                gradient[rows] = running.hidden_gradient(head, running.pull).to(hidden.dtype)
        if ctx.formed:
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(token_ids, hidden, weight, bias, largest, total)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.formed:
            return None, None, None, ctx.saved_tensors[0] * grad.unsqueeze(-1), None, None
        return None, None, None, *_gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the needed gradients of hidden states, weight and bias, from logits made a second time."""
    token_ids, hidden, weight, bias, largest, total = ctx.saved_tensors
    head = _Head(ctx.output, weight, bias)
    hidden_grad = torch.empty_like(hidden) if ctx.needed[0] else None
    weight_grad, bias_grad = (
        torch.zeros_like(tensor, dtype=grad.dtype) if needed else None  # for sums over the tokens
        for tensor, needed in zip((weight, bias), ctx.needed[1:], strict=True)
    )
    for rows in _chunks(token_ids, ctx.chunk):
        here = hidden[rows]
        per_token = [tensor[rows].unsqueeze(-1) for tensor in (token_ids, largest, total, grad)]
        pull = torch.zeros_like(here, dtype=grad.dtype)
        for words in blocks_of(here, weight.shape[0]):
            slope = _slope(head, here, words, *per_token)
            if hidden_grad is not None:
                pull += head.back(slope, words)
            if weight_grad is not None:
                weight_grad[words].addmm_(slope.T, here.to(slope.dtype))
            if bias_grad is not None:
                bias_grad[words] += slope.sum(0)
            del slope  # before the next block's
        if hidden_grad is not None:
            hidden_grad[rows] = pull.to(hidden.dtype)
    return hidden_grad, weight_grad, bias_grad


def _slope(
    head: _Head, hidden: Tensor, words: slice, ids: Tensor, largest: Tensor, total: Tensor, grad: Tensor
) -> Tensor:
    """Return what a block of the head's output (C, block) is to get, from `grad` (C, 1) of the log-probs."""
    logits = head.logits(hidden, words)
    derivative = head.output.derivative(logits)
    place, inside = _places(ids, words)
    slope = logits.to(grad.dtype).sub_(largest).exp_().mul_(-grad / total)
    return slope.scatter_add_(-1, place, grad * inside).mul_(derivative)


def _places(ids: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Return where in a block of words each id is, some valid place if it is not there, and whether it is."""
    inside = (ids >= words.start) & (ids < words.stop)
    return (ids - words.start).masked_fill_(~inside, 0), inside


def _chunks(token_ids: Tensor, chunk: int) -> Iterator[Rows]:
    return chunks_of(torch.ones_like(token_ids, dtype=torch.bool), chunk)
