"""The exercises of notebook 08: tests that can tell, of a direction, of figures, and of padding."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refkl_lib.kl.exact import exact_kl
from refkl_lib.lessons.claims.claim import CONDITION, FAILS, HOLDS, VERDICTS
from refkl_lib.lessons.exercise import Case, Exercise, Mistake, WrongFormError

TokenKL = Callable[[Tensor, Tensor], Tensor]
MaskedKL = Callable[[Tensor, Tensor, Tensor], Tensor]


# ----------------------------------------------------------------------------------------- 08.direction
def direction_of(kl: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Return "p‖q", "q‖p" or "neither": which KL `kl` computes from log-probs (V,) of p and of q."""
    # Lopsided on purpose: of two mirrored distributions both directions have the same value.
    log_p, log_q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    got = kl(log_p, log_q)
    for name, first, second in (("p‖q", log_p, log_q), ("q‖p", log_q, log_p)):
        if torch.isclose(got, (first.exp() * (first - second)).sum()):
            return name
    return "neither"


def _forward(log_p: Tensor, log_q: Tensor) -> Tensor:
    return exact_kl(log_p[None, None], log_q[None, None])


def _reverse(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _forward(log_q, log_p)


def _suspects(share: float) -> dict[str, tuple[TokenKL, str]]:
    """Return functions that claim to be a KL, each with the right answer; `share` makes a mixture of both."""
    return {
        "it knows KL(p‖q)": (_forward, "p‖q"),
        "it knows KL(q‖p)": (_reverse, "q‖p"),
        "it knows which one F.kl_div(log_p, log_q, log_target=True) is": (
            lambda log_p, log_q: F.kl_div(log_p, log_q, log_target=True, reduction="sum"),
            "q‖p",
        ),
        "it is not taken in by a mixture of both": (
            lambda log_p, log_q: share * _forward(log_p, log_q) + (1 - share) * _reverse(log_p, log_q),
            "neither",
        ),
        "it is not taken in by a function that is always 0": (lambda log_p, log_q: 0 * log_p.sum(), "neither"),
    }


ANSWERS = ("p‖q", "q‖p", "neither")


def _ask_direction(probe: Callable[[TokenKL], Any], share: Tensor) -> Tensor:
    answers = []
    for kl, _right in _suspects(share.item()).values():
        said = probe(kl)
        if said not in ANSWERS:
            raise WrongFormError(f"your probe said {said!r}; it must say one of {', '.join(map(repr, ANSWERS))}.")
        answers.append(ANSWERS.index(said))
    return torch.tensor(answers).to(share)


def _compared_on(log_p: Tensor, log_q: Tensor) -> Callable[[TokenKL], str]:
    def probe(kl: TokenKL) -> str:
        got = kl(log_p, log_q)
        for name, right in (("p‖q", _forward), ("q‖p", _reverse)):
            if torch.isclose(got, right(log_p, log_q), atol=1e-6):
                return name
        return "neither"

    return probe


_EVEN, _STEEP, _LOW = (torch.tensor(probs).log() for probs in ([0.5, 0.5], [0.9, 0.1], [0.1, 0.9]))

DIRECTION = Exercise(
    id="08.direction",
    idea=(
        "Try it where the two directions differ: on p = q both are 0, on mirrored p and q both are equal.",
        "KL(p‖q) = Σ p·(log p - log q): the first is the weight. Compute both, and see which one it gives.",
        "A function may be neither: then say so.",
    ),
    solution=direction_of,
    oracle=lambda share: torch.tensor([ANSWERS.index(right) for _, right in _suspects(share.item()).values()]),
    draw=lambda generator: (0.2 + 0.6 * torch.rand((), generator=generator),),
    by_hand=Case("five functions that claim to be a KL", (torch.tensor(0.5),), torch.tensor([0.0, 1, 1, 2, 2])),
    keeps_gradient=False,
    ask=_ask_direction,
    facts=tuple(_suspects(0.5)),
    imports="from collections.abc import Callable\n\nimport torch\nfrom torch import Tensor",
    mistakes=(
        Mistake(
            1,
            'a probe that says "p‖q" of everything, as a trial on p = q does, where both directions are 0',
            _compared_on(_EVEN, _EVEN),
        ),
        Mistake(1, "a trial on mirrored p and q, where both directions are equal", _compared_on(_STEEP, _LOW)),
        Mistake(
            2,
            "the two answers the wrong way round",
            lambda kl: {"p‖q": "q‖p", "q‖p": "p‖q", "neither": "neither"}[direction_of(kl)],
        ),
        Mistake(
            3,
            "a probe with two answers: what is not the one KL is taken for the other",
            lambda kl: "p‖q" if direction_of(kl) == "p‖q" else "q‖p",
        ),
    ),
    hints=(
        "Notebook 05 began with p = (0.9, 0.1) and q = (0.5, 0.5). What are the two KLs there, by hand?",
        "Call kl once, on the logarithms of these. Compare with torch.isclose: rounding differs.",
        "Return the name whose (first.exp() * (first - second)).sum() is close; after both, return 'neither'.",
    ),
)


# --------------------------------------------------------------------------------------------- 08.judge
def judge(before: float, after: float) -> str:
    """Return the verdict on "a run drops from 14 GB to 7.5 GB", for measured GB before and after."""

    def near(value: float, said: float) -> bool:
        # A share of what was said, and on both sides of it: too little is as wrong as too much.
        return abs(value - said) <= 0.1 * said

    if not near(after / before, 7.5 / 14):
        return "does not hold"
    return "holds" if near(before, 14) and near(after, 7.5) else "holds with a condition"


def _ask_judge(function: Callable[[float, float], Any], figures: Tensor) -> Tensor:
    said = [function(before, after) for before, after in figures.tolist()]
    if strange := [verdict for verdict in said if verdict not in VERDICTS]:
        raise WrongFormError(f"your judge said {strange[0]!r}; it must say one of {', '.join(map(repr, VERDICTS))}.")
    return torch.tensor([VERDICTS.index(verdict) for verdict in said]).to(figures)


def _verdicts(figures: Tensor) -> Tensor:
    before, after = figures.double().unbind(-1)
    near = [(value / said - 1).abs() <= 0.1 for value, said in ((after / before, 7.5 / 14), (before, 14), (after, 7.5))]
    return torch.where(near[0], torch.where(near[1] & near[2], 0, 1), 2)


def _some_figures(generator: torch.Generator) -> tuple[Tensor]:
    """Return eight pairs of GB, none at the edge of a tolerance."""
    sizes, ratios = torch.tensor([0.5, 0.7, 0.95, 1.0, 1.05, 1.4, 2.1]), torch.tensor([0.6, 0.95, 1.0, 1.05, 1.6])
    before = 14 * sizes[torch.randint(len(sizes), (8,), generator=generator)]
    after = before * 7.5 / 14 * ratios[torch.randint(len(ratios), (8,), generator=generator)]
    return (torch.stack([before, after], dim=-1),)


def _one_sided(before: float, after: float) -> str:
    if after / before > 1.1 * 7.5 / 14:
        return FAILS
    return HOLDS if before <= 1.1 * 14 and after <= 1.1 * 7.5 else CONDITION


def _in_gigabytes(before: float, after: float) -> str:
    if abs(after / before - 7.5 / 14) > 0.1:
        return FAILS
    return HOLDS if abs(before - 14) <= 0.1 and abs(after - 7.5) <= 0.1 else CONDITION


JUDGE = Exercise(
    id="08.judge",
    idea=(
        '"holds" if both figures are what was said, 14 and 7.5 GB, give or take a tenth of that.',
        '"holds with a condition" if they are not, but their ratio is 7.5 / 14, give or take a tenth of it.',
        '"does not hold" for any other ratio: a judge must be able to say so.',
    ),
    solution=judge,
    oracle=_verdicts,
    draw=_some_figures,
    by_hand=Case(
        "14 and 7.5 GB, 30 and 15.9 GB, 14 and 14 GB, and 14 and 2 GB",
        (torch.tensor([[14.0, 7.5], [30.0, 15.9], [14.0, 14.0], [14.0, 2.0]]),),
        torch.tensor([0.0, 1.0, 2.0, 2.0]),
    ),
    keeps_gradient=False,
    ask=_ask_judge,
    mistakes=(
        Mistake(1, "the ratio alone, whatever the gigabytes are", lambda b, a: judge(14, 14 * a / b)),
        Mistake(1, "one side alone: figures that are too small pass", _one_sided),
        Mistake(1, "a tenth of a GB, where a tenth of what was said was meant", _in_gigabytes),
        Mistake(
            2,
            "no second verdict: right ratio and wrong gigabytes do not hold at all",
            lambda b, a: HOLDS if judge(b, a) == HOLDS else FAILS,
        ),
        Mistake(
            3,
            "a judge that cannot say no",
            lambda b, a: HOLDS if judge(b, a) == HOLDS else CONDITION,
        ),
    ),
    hints=(
        "What would have to be measured for each of the three verdicts? Make up a pair of figures for each.",
        "Write near(value, said): abs(value - said) <= 0.1 * said. You need it three times.",
        "First the ratio: if not near(after / before, 7.5 / 14), it does not hold. Then the two figures.",
    ),
)


# ------------------------------------------------------------------------------------------- 08.padding
def padding_counts(kl_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> bool:
    """Return whether padding changes what `kl_of(p_logits, q_logits, mask)` gives for logits (B, T, V)."""
    p, q = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), torch.zeros(1, 2, 2)
    mask = torch.tensor([[1, 0]])  # the second token is padding
    value = kl_of(p, q, mask)
    # What stands in the padding must not matter …
    p_other = torch.tensor([[[3.0, 0.0], [5.0, -5.0]]])
    # … nor how much of it there is: a sum without it may still be divided by all tokens.
    longer = torch.cat([p, p[:, 1:]], 1), torch.cat([q, q[:, 1:]], 1), torch.tensor([[1, 0, 0]])
    others = (kl_of(p_other, q, mask), kl_of(*longer))
    return not all(torch.isclose(other, value) for other in others)


def _over_all(p: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return exact_kl(p, q)


def _batchmean(p: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")


def _divided_by_all(p: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return exact_kl(p, q, mask, reduction="sum") / mask.numel()


def _some_kls(share: float) -> dict[str, tuple[MaskedKL, bool]]:
    """Return masked and unmasked KLs, each with whether padding changes it; `share` makes a mixture of both."""
    return {
        "it lets a masked mean pass": (exact_kl, False),
        "it lets a masked sum pass": (lambda p, q, mask: exact_kl(p, q, mask, reduction="sum"), False),
        "it catches a mean over all tokens": (_over_all, True),
        'it catches reduction="batchmean"': (_batchmean, True),
        "it catches a masked sum that is divided by all tokens": (_divided_by_all, True),
        "it catches a mean that padding changes a little": (
            lambda p, q, mask: share * _over_all(p, q, mask) + (1 - share) * exact_kl(p, q, mask),
            True,
        ),
    }


def _ask_padding(probe: Callable[[MaskedKL], Any], share: Tensor) -> Tensor:
    answers = []
    for kl_of, right in _some_kls(share.item()).values():
        said = probe(kl_of)
        if not isinstance(said, bool):
            raise WrongFormError(f"your probe returned a {type(said).__name__}; it must return True or False.")
        answers.append(said == right)
    return torch.tensor(answers).to(share)


_P, _Q = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), torch.zeros(1, 2, 2)
_OTHER_PADDING, _OTHER_TOKEN = torch.tensor([[[3.0, 0.0], [5.0, -5.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
_MASK, _LONGER = torch.tensor([[1, 0]]), torch.tensor([[1, 0, 0]])


def _differ(first: Tensor, second: Tensor) -> bool:
    return not torch.isclose(first, second).item()


def _agreeing_padding_added(kl_of: MaskedKL) -> bool:
    p, q = (torch.cat([logits, torch.zeros(1, 1, 2)], 1) for logits in (_P, _Q))
    return _differ(kl_of(p, q, _LONGER), kl_of(_P, _Q, _MASK))


PADDING = Exercise(
    id="08.padding",
    idea=(
        "Change nothing but the padding, tokens whose mask is 0, and see whether the value moves.",
        "Change what stands there: a KL that does not look at the mask moves.",
        "Add more of it: a sum that leaves padding out moves, if it is divided by all tokens.",
    ),
    solution=padding_counts,
    oracle=lambda share: torch.ones(6),
    draw=lambda generator: (0.2 + 0.6 * torch.rand((), generator=generator),),
    by_hand=Case("six ways to take a mean or a sum", (torch.tensor(0.5),), torch.ones(6)),
    keeps_gradient=False,
    ask=_ask_padding,
    facts=tuple(_some_kls(0.5)),
    imports="from collections.abc import Callable\n\nimport torch\nfrom torch import Tensor",
    mistakes=(
        Mistake(
            1,
            "a probe that says True of everything: is what you change a token that counts?",
            lambda kl_of: _differ(kl_of(_OTHER_TOKEN, _Q, _MASK), kl_of(_P, _Q, _MASK)),
        ),
        Mistake(
            1,
            "a probe that says False of everything: does your mask have a 0, and does what you change have it?",
            lambda kl_of: _differ(kl_of(_P, _Q, torch.ones(1, 2)), kl_of(_P, _Q, torch.ones(1, 2))),
        ),
        Mistake(1, "the answer the wrong way round", lambda kl_of: not padding_counts(kl_of)),
        Mistake(
            2,
            "more padding in which p and q agree: a sum does not see it",
            _agreeing_padding_added,
        ),
        Mistake(
            3,
            "other padding and not more of it: the tokens that are divided by stay the same",
            lambda kl_of: _differ(kl_of(_OTHER_PADDING, _Q, _MASK), kl_of(_P, _Q, _MASK)),
        ),
    ),
    hints=(
        "If a KL is right, what may you write into the padding? And how much padding may you add?",
        "Take logits (1, 2, V) and the mask [[1, 0]]. Call kl_of again with another second token, and with a third.",
        "Return True if either of the two calls is not torch.isclose to the first. Let p and q differ in the padding.",
    ),
)

EXERCISES = (DIRECTION, JUDGE, PADDING)
