"""The exercises of notebook 05: four functions on which a KL penalty stands.

The learner's solution is short; the oracle is the library's own function, mostly in float64.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refkl_lib.kl.estimators import estimate_kl, kl_reward
from refkl_lib.kl.exact import exact_kl
from refkl_lib.kl.reduce import masked_mean as library_masked_mean
from refkl_lib.lessons.exercise import Case, Exercise, Mistake

NEARLY = 2.0**-12  # so small a log-ratio that e^r - 1 has lost its digits in float32
# Rows of unequal length; and not as many 0s as 1s, or a mask used as an index would give the mean of all.
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


# ------------------------------------------------------------------------------------------------ 05.k3
def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Return each token's k3, of the inputs' shape."""
    log_ratio = ref_log_probs - log_probs
    # expm1(r), not exp(r) - 1: where the two models nearly agree, 1 + r has no digits left for r.
    return torch.expm1(log_ratio) - log_ratio


def _draw_log_probs(generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(-3 * torch.rand(2, 3, generator=generator) for _ in range(2))


K3 = Exercise(
    id="05.k3",
    idea=(
        "r = log ref - log policy, of the token that was sampled.",
        "k3 = (e^r - 1) - r, never negative, and 0 where the two agree.",
        "Near r = 0, e^r - 1 loses its digits; torch has a function that keeps them.",
    ),
    solution=k3,
    oracle=lambda log_probs, ref: estimate_kl(log_probs.double(), ref.double(), "k3"),
    draw=_draw_log_probs,
    by_hand=Case(
        "probabilities 1/2 and 1/4, and 1/4 and 1/2, of policy and reference",
        (torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()),
        torch.tensor([[math.log(2) - 0.5, 1 - math.log(2)]]),
    ),
    hard=(
        Case(
            "two models that nearly agree (r = 0.00024)",
            (torch.tensor([[-1.0]]), torch.tensor([[-1.0 + NEARLY]])),
            rtol=0.01,
            atol=0.0,
        ),
    ),
    mistakes=(
        Mistake(1, "k3 with the ratio the other way round, log policy - log ref", lambda p, q: k3(q, p)),
        Mistake(2, "k2, which is r²/2", lambda p, q: (q - p).square() / 2),
        Mistake(2, "k1, which is -r", lambda p, q: p - q),
        Mistake(2, "the log-ratio r itself", lambda p, q: q - p),
        Mistake(2, "e^r - r, without the - 1", lambda p, q: (q - p).exp() - (q - p)),
        Mistake(2, "e^r - 1, without the - r", lambda p, q: torch.expm1(q - p)),
        Mistake(3, "exp(r) - 1 in place of torch.expm1(r)", lambda p, q: (q - p).exp() - 1 - (q - p)),
    ),
    hints=(
        "What is k3 where both models give a token the same probability? Which r is that?",
        "Compute r first, as a tensor of all tokens. Then k3 is two terms of r, and needs no loop.",
        "Subtract r from torch.expm1(r), with r = ref_log_probs - log_probs.",
    ),
)


# ----------------------------------------------------------------------------------------- 05.direction
def token_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Return KL(p‖q) of each token (B, T), from logits (B, T, V)."""
    # log_softmax, not softmax and then log: a probability that underflows to 0 has no logarithm.
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    # The mean is over what p would say, so p is the weight.
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_softmaxes(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    return p.log_softmax(-1), q.log_softmax(-1)


def _terms(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = _log_softmaxes(p, q)
    return log_p.exp() * (log_p - log_q)


def _without_log(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(-1) * (p.softmax(-1) - q.softmax(-1))).sum(-1)


def _log_after_softmax(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(-1) * (p.softmax(-1).log() - q.softmax(-1).log())).sum(-1)


def _kl_div_of_log_target(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = _log_softmaxes(p, q)
    return F.kl_div(log_q, log_p, reduction="none").sum(-1)


DIRECTION = Exercise(
    id="05.direction",
    idea=(
        "From logits to log-probs, over the vocabulary: log_softmax along the last dimension.",
        "KL(p‖q) = Σ_v p(v)·(log p(v) - log q(v)): the first argument is the weight; natural logarithms.",
        "The sum is over the vocabulary, the last dimension: (B, T, V) in, (B, T) out.",
    ),
    solution=token_kl,
    oracle=lambda p, q: exact_kl(p.double(), q.double(), reduction="none"),
    draw=lambda generator: tuple(2 * torch.randn(2, 3, 5, generator=generator) for _ in range(2)),
    by_hand=Case(
        "p = (3/4, 1/4) and q = (1/2, 1/2)",
        (torch.tensor([[[0.75, 0.25]]]).log(), torch.zeros(1, 1, 2)),
        torch.tensor([[0.75 * math.log(1.5) - 0.25 * math.log(2)]]),
    ),
    hard=(
        Case(
            "two models that are both sure, of different words",
            (torch.tensor([[[0.0, 200.0]]]), torch.tensor([[[200.0, 0.0]]])),
        ),
    ),
    mistakes=(
        Mistake(2, "the other direction, KL(q‖p)", lambda p, q: token_kl(q, p)),
        Mistake(2, "probabilities subtracted where log-probs should be", _without_log),
        Mistake(2, "logarithms to base 2, so bits in place of nats", lambda p, q: token_kl(p, q) / math.log(2)),
        Mistake(2, "the cross-entropy -Σ p·log q", lambda p, q: -(p.softmax(-1) * q.log_softmax(-1)).sum(-1)),
        Mistake(2, "F.kl_div(log_q, log_p) without log_target=True, which is NaN", _kl_div_of_log_target),
        Mistake(3, "a sum over the tokens, not over the vocabulary", lambda p, q: _terms(p, q).sum(1)),
        Mistake(3, "a mean over the vocabulary, not a sum", lambda p, q: _terms(p, q).mean(-1)),
        Mistake(1, "softmax and then log, which loses small probabilities", _log_after_softmax),
    ),
    hints=(
        "Over which of the two models is the mean taken: which one's probabilities are the weights?",
        "Get log_p and log_q with log_softmax(-1). The probabilities p are log_p.exp().",
        "Multiply log_p.exp() by (log_p - log_q), and sum over the last dimension.",
    ),
)


# --------------------------------------------------------------------------------------- 05.masked_mean
def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `values` (B, T) over the tokens whose `mask` (B, T) is 1."""
    # Choose, do not multiply: NaN times 0 is NaN. As integers, the mask would be an index.
    return values[mask.bool()].mean()


def _draw_values(generator: torch.Generator) -> tuple[Tensor, ...]:
    return torch.rand(2, 4, generator=generator) + MASK.logical_not() * 5, MASK


def _mean_of_means(values: Tensor, mask: Tensor) -> Tensor:
    return ((values * mask).sum(-1) / mask.sum(-1)).mean()


MASKED_MEAN = Exercise(
    id="05.masked_mean",
    idea=(
        "A token whose mask is 0 takes no part, whatever stands there, NaN included.",
        "Divide by how many tokens count, in the whole batch.",
        "Every token that counts weighs the same, in a short sequence and in a long one.",
    ),
    solution=masked_mean,
    oracle=lambda values, mask: library_masked_mean(values.double(), mask),
    draw=_draw_values,
    by_hand=Case(
        "1, 2, 3 in a row and 4, 10 in the other, beside three 7s that do not count",
        (torch.tensor([[1.0, 2, 3, 7], [4, 10, 7, 7]]), MASK),
        torch.tensor(4.0),
    ),
    hard=(Case("NaN in the padding", (torch.tensor([[1.0, 2, 3, math.nan], [4, 10, math.nan, math.nan]]), MASK)),),
    mistakes=(
        Mistake(1, "the mean over all tokens, padding included", lambda values, mask: values.mean()),
        Mistake(2, "a division by all tokens, those that do not count too", lambda v, mask: (v * mask).mean()),
        Mistake(2, 'a division by the number of sequences ("batchmean")', lambda v, mask: (v * mask).sum() / len(v)),
        Mistake(2, "the sum, not divided", lambda values, mask: (values * mask).sum()),
        Mistake(3, "the mean of each sequence's own mean", _mean_of_means),
        Mistake(1, "integers as an index: values[mask] without .bool()", lambda values, mask: values[mask].mean()),
        Mistake(1, "the mask upside down", lambda values, mask: values[mask == 0].mean()),
        Mistake(1, "values times mask, and NaN times 0 is NaN", lambda v, mask: (v * mask).sum() / mask.sum()),
    ),
    hints=(
        "By how many tokens should the sum be divided, if the batch has a row of 3 tokens and one of 2?",
        "A mask of integers is not a choice of elements; mask.bool() is. What is 0 times NaN?",
        "Index values with mask.bool(): a flat tensor of the tokens that count. Take its mean.",
    ),
)


# -------------------------------------------------------------------------------------------- 05.reward
def penalised_reward(log_probs: Tensor, ref_log_probs: Tensor, reward: Tensor, beta: float) -> Tensor:
    """Return each token's reward minus beta times its k1 (B, T), without a gradient."""
    # k1, the log-ratio itself: in the reward it is what leads to the gradient of KL(policy‖ref); k2 and k3 do not.
    penalty = log_probs - ref_log_probs
    # A reward is a number that the policy is judged by. With a gradient it would be a second loss.
    return (reward - beta * penalty).detach()


def _draw_reward(generator: torch.Generator) -> tuple[Any, ...]:
    return *_draw_log_probs(generator), torch.rand(2, 3, generator=generator), 0.3


REWARD = Exercise(
    id="05.reward",
    idea=(
        "The penalty of a token is its k1 = log policy - log ref: positive where the policy says it more often.",
        "Subtract beta times the penalty: a policy that strays has to pay.",
        "A reward is a number: no gradient flows through it.",
    ),
    solution=penalised_reward,
    oracle=lambda p, q, reward, beta: reward.double() - beta * kl_reward(p.double(), q.double(), "k1"),
    draw=_draw_reward,
    by_hand=Case(
        "a reward of 1, log-probs -1 and -3, beta 0.1",
        (torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), torch.tensor([[1.0]]), 0.1),
        torch.tensor([[0.8]]),
    ),
    keeps_gradient=False,
    mistakes=(
        Mistake(2, "a bonus: the sign is wrong", lambda p, q, reward, beta: (reward + beta * (p - q)).detach()),
        Mistake(1, "k3 as the penalty", lambda p, q, reward, beta: (reward - beta * k3(p, q)).detach()),
        Mistake(1, "k2 as the penalty", lambda p, q, reward, beta: (reward - beta * (q - p).square() / 2).detach()),
        Mistake(2, "a penalty without beta", lambda p, q, reward, beta: (reward - (p - q)).detach()),
        Mistake(2, "the penalty alone, without the reward", lambda p, q, reward, beta: (-beta * (p - q)).detach()),
        Mistake(3, "the right numbers, not detached", lambda p, q, reward, beta: reward - beta * (p - q)),
    ),
    hints=(
        "Should a token that the policy says more often than the reference have more reward, or less?",
        "The penalty is log_probs - ref_log_probs. What must not flow back through it?",
        "Subtract beta * penalty from reward, and detach the result.",
    ),
)

EXERCISES = (K3, DIRECTION, MASKED_MEAN, REWARD)
