"""The exercises of notebook 01: how far the leash reaches, the loss that holds it, and the KL that samples tell.

The oracles are the library's own functions, in float64.
"""

import math
from typing import Any

import torch
from torch import Tensor

from refkl_lib.kl.reduce import masked_mean, reduce_tokens
from refkl_lib.lessons.exercise import Case, Exercise, Mistake

# Rows of unequal length, as texts are that end early.
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


# --------------------------------------------------------------------------------------------- 01.leash
def best_policy(ref_log_probs: Tensor, reward: Tensor, beta: float) -> Tensor:
    """Return the log-probs (B, V) of the policy with the highest mean reward less beta·KL(policy‖reference)."""
    # As log-probs, so the factor e^(reward / beta) is a term. log_softmax divides by the sum over the vocabulary
    # without ever forming that factor, which for a small beta is more than a float can hold.
    return (ref_log_probs + reward / beta).log_softmax(-1)


def _best_in_float64(ref_log_probs: Tensor, reward: Tensor, beta: float) -> Tensor:
    scores = ref_log_probs.double() + reward.double() / beta
    return scores - scores.logsumexp(-1, keepdim=True)


def _draw_leash(generator: torch.Generator) -> tuple[Any, ...]:
    logits = torch.randn(2, 5, generator=generator)
    return logits.log_softmax(-1), torch.rand(5, generator=generator), 0.4


def _normalised(weights: Tensor) -> Tensor:
    return (weights / weights.sum(-1, keepdim=True)).log()


LEASH = Exercise(
    id="01.leash",
    idea=(
        "The best policy is reference · e^(reward / beta), divided by its sum: the smaller beta, the longer the leash.",
        "As log-probs: add reward / beta, then take away the logarithm of the sum over the vocabulary.",
        "With beta = 0.001, e^(1 / beta) is more than a float can hold: it must never be formed.",
    ),
    solution=best_policy,
    oracle=_best_in_float64,
    draw=_draw_leash,
    by_hand=Case(
        "a reference of (1/2, 1/4, 1/4), rewards of 0, 0 and log 2, and beta 1",
        (torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([0.0, 0.0, math.log(2)]), 1.0),
        torch.tensor([[0.4, 0.2, 0.4]]).log(),
    ),
    hard=(Case("a beta of 0.001", (torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0.0, 1.0]), 0.001)),),
    mistakes=(
        Mistake(
            1, "beta times the reward, not the reward over beta", lambda q, r, beta: (q + r * beta).log_softmax(-1)
        ),
        Mistake(1, "a reward that puts off: the sign is wrong", lambda q, r, beta: (q - r / beta).log_softmax(-1)),
        Mistake(1, "a policy that has forgotten the reference", lambda q, r, beta: (0 * q + r / beta).log_softmax(-1)),
        Mistake(1, "probabilities times rewards, without e^", lambda q, r, beta: _normalised(q.exp() * r / beta)),
        Mistake(2, "log-probs that are not divided by their sum", lambda q, r, beta: q + r / beta),
        Mistake(
            2,
            "a sum over the wrong dimension, not over the vocabulary",
            lambda q, r, beta: (q + r / beta).log_softmax(0),
        ),
        Mistake(2, "probabilities, not log-probs", lambda q, r, beta: (q + r / beta).softmax(-1)),
        Mistake(
            3, "e^(reward / beta) itself, which overflows", lambda q, r, beta: _normalised(q.exp() * (r / beta).exp())
        ),
    ),
    hints=(
        "By which factor does the best policy raise a word of reward 1? By which one a word of reward 0?",
        "The logarithm of reference · e^(reward / beta) is a sum of two terms. What makes logits into log-probs?",
        "Take log_softmax(-1) of ref_log_probs + reward / beta.",
    ),
)


# ----------------------------------------------------------------------------------------- 01.objective
def leashed_loss(kl: Tensor, reward: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return the loss, a scalar, of tokens with this KL and this reward, both (B, T)."""
    counts = mask.bool()
    # An optimizer makes its loss small: so the reward is taken away, and the KL is added.
    return (beta * kl[counts] - reward[counts]).mean()


def _draw_objective(generator: torch.Generator) -> tuple[Any, ...]:
    kl, reward = (torch.rand(2, 4, generator=generator) + 5 * MASK.logical_not() for _ in range(2))
    return kl, reward, MASK, 0.3


def _all_loss(kl: Tensor, reward: Tensor, beta: float) -> Tensor:
    return beta * kl - reward


def _times_mask(kl: Tensor, reward: Tensor, mask: Tensor, beta: float) -> Tensor:
    return (_all_loss(kl, reward, beta) * mask).sum() / mask.sum()


OBJECTIVE = Exercise(
    id="01.objective",
    idea=(
        "An optimizer makes a loss small: the reward, which is to grow, is taken away; beta·KL is added.",
        "The mean over the tokens whose mask is 1; elsewhere may stand anything, even NaN.",
        "The KL keeps its gradient: without it, the penalty is a number in a log.",
    ),
    solution=leashed_loss,
    oracle=lambda kl, reward, mask, beta: masked_mean(beta * kl.double() - reward.double(), mask),
    draw=_draw_objective,
    by_hand=Case(
        "KLs of 1 and 3, rewards of 0 and 1, a third token that does not count, and beta 0.5",
        (torch.tensor([[1.0, 3, 9]]), torch.tensor([[0.0, 1, 9]]), torch.tensor([[1, 1, 0]]), 0.5),
        torch.tensor(0.5),
    ),
    hard=(
        Case(
            "NaN in the padding",
            (torch.tensor([[1.0, 3, math.nan]]), torch.tensor([[0.0, 1, 0]]), torch.tensor([[1, 1, 0]]), 0.5),
            torch.tensor(0.5),
        ),
    ),
    mistakes=(
        Mistake(
            1, "the objective, not the loss: the sign is wrong", lambda k, r, m, beta: -leashed_loss(k, r, m, beta)
        ),
        Mistake(1, "a KL that is a bonus: its sign is wrong", lambda k, r, m, beta: leashed_loss(k, r, m, -beta)),
        Mistake(1, "a reward that is to shrink: its sign is wrong", lambda k, r, m, beta: leashed_loss(k, -r, m, beta)),
        Mistake(1, "a penalty without beta", lambda k, r, m, beta: leashed_loss(k, r, m, 1.0)),
        Mistake(1, "a reward without its penalty", lambda k, r, m, beta: leashed_loss(k, r, m, 0.0)),
        Mistake(2, "the mean over all tokens, padding included", lambda k, r, m, beta: _all_loss(k, r, beta).mean()),
        Mistake(2, "the sum, not divided", lambda k, r, m, beta: _all_loss(k, r, beta)[m.bool()].sum()),
        Mistake(2, "values times mask, and NaN times 0 is NaN", _times_mask),
        Mistake(3, "a penalty without a gradient", lambda k, r, m, beta: leashed_loss(k.detach(), r, m, beta)),
    ),
    hints=(
        "Should the loss go up or down when the reward grows? And when the KL grows?",
        "Choose the tokens that count with mask.bool(), from both the KL and the reward. Nothing is detached.",
        "Take the mean of beta * kl[mask.bool()] - reward[mask.bool()].",
    ),
)


# ---------------------------------------------------------------------------------------- 01.sampled_kl
def sampled_kl(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return the KL of whole texts, a scalar, estimated from N texts (N, T) that the policy has sampled."""
    # The log-prob of a text is the sum of its tokens'. Choose, do not multiply: padding may hold anything.
    log_ratio = torch.where(mask.bool(), log_probs - ref_log_probs, 0.0)
    # The policy has sampled, so each text weighs the same: how often one comes says how probable it is.
    return log_ratio.sum(-1).mean()


def _draw_samples(generator: torch.Generator) -> tuple[Any, ...]:
    return *(-3 * torch.rand(2, 4, generator=generator) - 5 * MASK.logical_not() for _ in range(2)), MASK


def _log_ratio(p: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), p - q, 0.0)


SAMPLED_KL = Exercise(
    id="01.sampled_kl",
    idea=(
        "KL(policy‖reference) is the mean of log policy - log reference, over what the policy samples.",
        "The log-prob of a text is the sum over those of its tokens whose mask is 1.",
        "The mean is over the texts; a long text is one sample, like a short one.",
    ),
    solution=sampled_kl,
    oracle=lambda p, q, mask: reduce_tokens(p.double() - q.double(), mask, "sequence").mean(),
    draw=_draw_samples,
    by_hand=Case(
        "a text of log-ratios 1 and 2, and one of -1 beside a token that does not count",
        (torch.tensor([[-1.0, -1], [-3, -1]]), torch.tensor([[-2.0, -3], [-2, -9]]), torch.tensor([[1, 1], [1, 0]])),
        torch.tensor(1.0),
    ),
    hard=(
        Case(
            "NaN in the padding",
            (torch.tensor([[-1.0, math.nan]]), torch.tensor([[-2.0, math.nan]]), torch.tensor([[1, 0]])),
            torch.tensor(1.0),
        ),
    ),
    mistakes=(
        Mistake(1, "log reference - log policy: the sign is wrong", lambda p, q, mask: sampled_kl(q, p, mask)),
        Mistake(
            1,
            "absolute values: a KL is a mean of ratios of both signs",
            lambda p, q, m: _log_ratio(p, q, m).abs().sum(-1).mean(),
        ),
        Mistake(2, "a sum over all tokens, padding included", lambda p, q, mask: (p - q).sum(-1).mean()),
        Mistake(2, "log-ratios times mask, and NaN times 0 is NaN", lambda p, q, mask: ((p - q) * mask).sum(-1).mean()),
        Mistake(2, "the KL per token, not of a whole text", lambda p, q, mask: (p - q)[mask.bool()].mean()),
        Mistake(3, "the sum over the texts, not their mean", lambda p, q, mask: _log_ratio(p, q, mask).sum()),
        Mistake(3, "a KL for each text", lambda p, q, mask: _log_ratio(p, q, mask).sum(-1)),
    ),
    hints=(
        "How probable is a whole text, if its tokens have these log-probs?",
        "Put 0 where the mask is 0, with torch.where. Then one sum and one mean, over different dimensions.",
        "With r = torch.where(mask.bool(), log_probs - ref_log_probs, 0.0), take r.sum(-1).mean().",
    ),
)

EXERCISES = (LEASH, OBJECTIVE, SAMPLED_KL)
