"""The exercises of notebook 07: three functions of which a training with a leash is made.

The oracles go through texts and tokens one by one, in float64.
"""

import math
from typing import Any

import torch
from torch import Tensor

from refkl_lib.lessons.exercise import Case, Exercise, Mistake

# Rows of unequal length, as texts are that end early.
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])


# ----------------------------------------------------------------------------------------- 07.advantages
def group_advantages(rewards: Tensor) -> Tensor:
    """Return the advantages of texts, (P, G), from their rewards, a row for each prompt."""
    # keepdim, so that each row's mean meets its own row, not the columns.
    return rewards - rewards.mean(1, keepdim=True)


def _deviation(rewards: Tensor) -> Tensor:
    return rewards.std(1, keepdim=True)


ADVANTAGES = Exercise(
    id="07.advantages",
    idea=(
        "A text is judged by its own group, the texts to the same prompt: prompts differ in how easy they are.",
        "The advantage is the reward less the group's mean, so that in each group they sum to 0.",
        "Nothing is divided: divided by the deviation, a group that hardly differs would count like one that does.",
    ),
    solution=group_advantages,
    # Written with the rewards, so that the oracle has the gradient that the answer has.
    oracle=lambda rewards: rewards.double() - rewards.double().sum(1, keepdim=True) / rewards.shape[1],
    draw=lambda generator: (torch.rand(2, 4, generator=generator),),
    by_hand=Case(
        "rewards of 1 and 3 to one prompt, of 10 and 20 to another",
        (torch.tensor([[1.0, 3.0], [10.0, 20.0]]),),
        torch.tensor([[-1.0, 1.0], [-5.0, 5.0]]),
    ),
    hard=(Case("a group in which all are alike", (torch.full((1, 3), 2.0),), torch.zeros(1, 3)),),
    mistakes=(
        Mistake(1, "the mean over all texts, of every prompt", lambda r: r - r.mean()),
        Mistake(1, "a mean over the prompts: the wrong dimension", lambda r: r - r.mean(0, keepdim=True)),
        Mistake(2, "the mean less the reward: the sign is wrong", lambda r: r.mean(1, keepdim=True) - r),
        Mistake(2, "the rewards themselves", lambda r: r.clone()),
        Mistake(2, "the reward less the group's sum", lambda r: r - r.sum(1, keepdim=True)),
        Mistake(2, "the reward less the best of the group", lambda r: r - r.max(1, keepdim=True).values),
        Mistake(3, "a division by the group's deviation", lambda r: group_advantages(r) / _deviation(r)),
        Mistake(
            3, "a division by the group's deviation and a bit", lambda r: group_advantages(r) / (_deviation(r) + 1e-4)
        ),
    ),
    hints=(
        "What would the advantages of an easy prompt be, if all prompts shared one mean?",
        "rewards.mean(1) has the shape (P,). Which argument keeps the dimension, so that it can be subtracted?",
        "Subtract rewards.mean(1, keepdim=True) from rewards.",
    ),
)


# ---------------------------------------------------------------------------------------- 07.policy_loss
def policy_loss(log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Return the loss, a scalar, of B texts: log_probs and mask (B, T), advantages (B,)."""
    # Choose, do not multiply: padding may hold anything. A text's log-prob is the sum of its tokens'.
    of_texts = torch.where(mask.bool(), log_probs, 0.0).sum(1)
    # An advantage is a number: what made it large is not to be learned through it.
    return -(advantages.detach() * of_texts).mean()


def _by_text(log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    losses = [-a * row[m.bool()].sum() for row, a, m in zip(log_probs.double(), advantages.double(), mask, strict=True)]
    return torch.stack(losses).mean()


def _draw_loss(generator: torch.Generator) -> tuple[Any, ...]:
    return -3 * torch.rand(4, 3, generator=generator), torch.randn(4, generator=generator), MASK


def _token_means(log_probs: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), log_probs, 0.0).sum(1) / mask.sum(1)


POLICY_LOSS = Exercise(
    id="07.policy_loss",
    idea=(
        "An optimizer makes its loss small: where the advantage is positive, the text's log-prob is to grow.",
        "The log-prob of a text is the sum over those of its tokens whose mask is 1; elsewhere may stand NaN.",
        "The loss is the mean over the texts: a long one is one text, like a short one.",
    ),
    solution=policy_loss,
    oracle=_by_text,
    draw=_draw_loss,
    by_hand=Case(
        "log-probs of -1 and -2, and of -3 beside a token that does not count; advantages of 1 and -1",
        (torch.tensor([[-1.0, -2.0], [-3.0, -9.0]]), torch.tensor([1.0, -1.0]), torch.tensor([[1, 1], [1, 0]])),
        torch.tensor(0.0),
    ),
    hard=(
        Case(
            "NaN in the padding",
            (
                torch.tensor([[-1.0, -2.0], [-5.0, math.nan]]),
                torch.tensor([1.0, -1.0]),
                torch.tensor([[1, 1], [1, 0]]),
            ),
            torch.tensor(-1.0),
        ),
    ),
    mistakes=(
        Mistake(1, "a loss that punishes what was good: the sign is wrong", lambda p, a, m: -policy_loss(p, a, m)),
        Mistake(1, "a loss without the advantages", lambda p, a, m: policy_loss(p, torch.ones_like(a), m)),
        Mistake(1, "probabilities, not log-probs", lambda p, a, m: policy_loss(p.exp(), a, m)),
        Mistake(1, "log-probs that have lost their gradient", lambda p, a, m: policy_loss(p.detach(), a, m)),
        Mistake(2, "a sum over all tokens, padding included", lambda p, a, m: -(a * p.sum(1)).mean()),
        Mistake(2, "log-probs times mask, and NaN times 0 is NaN", lambda p, a, m: -(a * (p * m).sum(1)).mean()),
        Mistake(2, "the mean log-prob of a token, not the sum", lambda p, a, m: -(a * _token_means(p, m)).mean()),
        Mistake(3, "the sum over the texts, not their mean", lambda p, a, m: len(a) * policy_loss(p, a, m)),
        Mistake(
            3,
            "the mean over all tokens: long texts weigh more",
            lambda p, a, m: len(a) * policy_loss(p, a, m) / m.sum(),
        ),
    ),
    hints=(
        "A text was better than its group. Should its log-prob go up or down, and so the loss?",
        "Put 0 where the mask is 0, with torch.where. Then sum each row, and weight it by its advantage.",
        "Take -(advantages * torch.where(mask.bool(), log_probs, 0.0).sum(1)).mean().",
    ),
)


# ---------------------------------------------------------------------------------------- 07.text_reward
def text_reward(reward: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return each text's reward less its penalty, (B,): reward (B,), log-probs of both models and mask (B, T)."""
    # k1 is the estimate that is right in the reward; a text's is the sum of its tokens'.
    nats = torch.where(mask.bool(), log_probs - ref_log_probs, 0.0).sum(1)
    # Detached: a reward judges the text that was written, and no gradient flows through it.
    return (reward - beta * nats).detach()


def _reward_by_text(reward: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, beta: float) -> Tensor:
    ratios = (log_probs.double() - ref_log_probs.double()).detach()
    nats = [row[m.bool()].sum() for row, m in zip(ratios, mask, strict=True)]
    return reward.double().detach() - beta * torch.stack(nats)


def _draw_reward(generator: torch.Generator) -> tuple[Any, ...]:
    log_probs, ref_log_probs = (-3 * torch.rand(4, 3, generator=generator) for _ in range(2))
    return torch.rand(4, generator=generator), log_probs, ref_log_probs, MASK, 0.4


def _penalised(reward: Tensor, nats: Tensor, mask: Tensor, beta: float) -> Tensor:
    return (reward - beta * torch.where(mask.bool(), nats, 0.0).sum(1)).detach()


TEXT_REWARD = Exercise(
    id="07.text_reward",
    idea=(
        "In the reward k1 is right: log policy - log ref, of the tokens that were sampled, with its sign.",
        "A text pays for all its tokens whose mask is 1: their sum, times beta, is taken away.",
        "A reward is a number for each text: no gradient flows through it.",
    ),
    solution=text_reward,
    oracle=_reward_by_text,
    draw=_draw_reward,
    by_hand=Case(
        "rewards of 1 and 2, log-ratios of 1 and 2, and of -1 beside a token that does not count, and beta 0.5",
        (
            torch.tensor([1.0, 2.0]),
            torch.tensor([[-1.0, -1.0], [-3.0, -1.0]]),
            torch.tensor([[-2.0, -3.0], [-2.0, -9.0]]),
            torch.tensor([[1, 1], [1, 0]]),
            0.5,
        ),
        torch.tensor([-0.5, 2.5]),
    ),
    hard=(
        Case(
            "NaN in the padding",
            (
                torch.tensor([1.0]),
                torch.tensor([[-1.0, math.nan]]),
                torch.tensor([[-2.0, math.nan]]),
                torch.tensor([[1, 0]]),
                0.5,
            ),
            torch.tensor([0.5]),
        ),
    ),
    mistakes=(
        Mistake(1, "log ref - log policy: the sign is wrong", lambda r, p, q, m, b: text_reward(r, q, p, m, b)),
        Mistake(1, "absolute values", lambda r, p, q, m, b: _penalised(r, (p - q).abs(), m, b)),
        Mistake(1, "k2, whose place is the loss", lambda r, p, q, m, b: _penalised(r, (q - p).square() / 2, m, b)),
        Mistake(1, "k3", lambda r, p, q, m, b: _penalised(r, torch.expm1(q - p) - (q - p), m, b)),
        Mistake(2, "a penalty without beta", lambda r, p, q, m, b: text_reward(r, p, q, m, 1.0)),
        Mistake(2, "a sum over all tokens, padding included", lambda r, p, q, m, b: (r - b * (p - q).sum(1)).detach()),
        Mistake(2, "log-ratios times mask, and NaN times 0 is NaN", lambda r, p, q, m, b: r - b * ((p - q) * m).sum(1)),
        Mistake(
            2,
            "the mean of a text's tokens, not the sum",
            lambda r, p, q, m, b: _penalised(r, (p - q) / _length(m), m, b),
        ),
        Mistake(
            3,
            "a reward that still carries a gradient",
            lambda r, p, q, m, b: r - b * torch.where(m.bool(), p - q, 0.0).sum(1),
        ),
        Mistake(3, "one number for all texts", lambda r, p, q, m, b: text_reward(r, p, q, m, b).mean()),
    ),
    keeps_gradient=False,
    hints=(
        "Which estimate of the KL is right in the reward? Notebook 05 has the table.",
        "Put 0 where the mask is 0, with torch.where; sum each text's log-ratios; detach at the end.",
        "With r = torch.where(mask.bool(), log_probs - ref_log_probs, 0.0), it is (reward - beta * r.sum(1)).detach().",
    ),
)


def _length(mask: Tensor) -> Tensor:
    return mask.sum(1, keepdim=True)


EXERCISES = (ADVANTAGES, POLICY_LOSS, TEXT_REWARD)
