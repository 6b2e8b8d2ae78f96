"""Section D of the article: the KL divergence."""

import torch
import torch.nn.functional as F
from torch import Tensor

from refkl_lib.comparison import run_strategy
from refkl_lib.kl.exact import exact_kl
from refkl_lib.lessons.claims.claim import CONDITION, FAILS, HOLDS, Claim, Figures, Verdict, within
from refkl_lib.lessons.claims.trials import drifted, job, kl
from refkl_lib.units import show_bytes


# --------------------------------------------------------------------------------------------------- D1
def _definition() -> Figures:
    p, q = (logits[0].detach().double().log_softmax(-1) for logits in drifted())
    by_place = (p.exp() * (p - q)).sum(-1)
    place = by_place.argmax()
    dice = torch.Generator().manual_seed(0)
    samples = torch.multinomial(p[place].exp(), 100_000, replacement=True, generator=dice)
    ratios = (p - q)[place, samples]
    return {
        "exact": by_place[place].item(),
        "mean": ratios.mean().item(),
        "error": (ratios.std() / len(ratios) ** 0.5).item(),
    }


DEFINITION = Claim(
    "D1",
    "the definition",
    "D_KL(π‖π_ref) is the mean of log π(x) − log π_ref(x) over x that π samples.",
    lesson="01_why_a_reference.ipynb#Whose-words-the-mean-runs-over",
    measure=_definition,
    judge=lambda f: HOLDS if abs(f["mean"] - f["exact"]) <= 4 * f["error"] else FAILS,
    shows=lambda f: (
        f"exact {f['exact']:.1f} nats; the mean of 100,000 samples {f['mean']:.1f}, give or take {f['error']:.2f}"
    ),
)


# --------------------------------------------------------------------------------------------------- D2
def compute_kl_as_printed(current_logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Return what the article's `compute_kl_divergence` does with two models' logits."""
    return F.kl_div(F.log_softmax(current_logits, -1), F.softmax(ref_logits, -1), reduction="batchmean")


def _direction() -> Figures:
    p, q = (logits.detach() for logits in drifted())
    # Of (T, V) logits the mean over the batch is the mean over the tokens: the direction alone is asked for here.
    return {"as printed": compute_kl_as_printed(p[0], q[0]).item(), "KL(π‖π_ref)": kl(p, q), "KL(π_ref‖π)": kl(q, p)}


DIRECTION = Claim(
    "D2",
    "F.kl_div",
    "F.kl_div(log_softmax(current), softmax(ref)) computes D_KL(π‖π_ref).",
    lesson="05_kl.ipynb#By-hand-first",
    measure=_direction,
    judge=lambda f: HOLDS if within(f["as printed"], f["KL(π‖π_ref)"], 0.01) else FAILS,
    shows=lambda f: f"{', '.join(f'{name} {value:.2f}' for name, value in f.items())} nats per token",
)


# --------------------------------------------------------------------------------------------------- D3
def _mean() -> Figures:
    p, q = (logits.detach() for logits in drifted())
    half = p.shape[1] // 2
    return {
        "batchmean": [compute_kl_as_printed(p[:, :end], q[:, :end]).item() for end in (half, None)],
        "per token": [kl(q[:, :end], p[:, :end]) for end in (half, None)],
        # Let the second half be padding: what stands there must change nothing.
        "padding": abs(compute_kl_as_printed(p, q) / compute_kl_as_printed(p[:, :half], q[:, :half]) - 1).item(),
    }


def _judge_mean(f: Figures) -> Verdict:
    growth = [values[1] / values[0] for values in (f["batchmean"], f["per token"])]
    wrong = (not within(*growth), f["padding"] > 0.01)
    if not any(wrong):
        return HOLDS
    return FAILS if all(wrong) else CONDITION


MEAN = Claim(
    "D3",
    "batchmean",
    'reduction="batchmean" gives the mean.',
    lesson="05_kl.ipynb#Masks-and-means",
    measure=_mean,
    judge=_judge_mean,
    shows=lambda f: (
        f"32 tokens {f['batchmean'][0]:.0f}, 64 tokens {f['batchmean'][1]:.0f}, where a token has "
        f"{f['per token'][0]:.2f} and {f['per token'][1]:.2f} nats; 32 tokens of padding add {f['padding']:.0%}"
    ),
)


# --------------------------------------------------------------------------------------------------- D4
def _no_grad() -> Figures:
    p, q = drifted()
    with torch.no_grad():
        watched = exact_kl(p, q)
    return {"all under no_grad": _pull(watched, p), "the reference alone": _pull(exact_kl(p, q), p)}


def _pull(loss: Tensor, logits: Tensor) -> float:
    """Return the length of the gradient by the policy's logits, 0 if there is none."""
    return torch.autograd.grad(loss, logits)[0].norm().item() if loss.requires_grad else 0.0


def _judge_no_grad(f: Figures) -> Verdict:
    if f["all under no_grad"] > 0:
        return HOLDS
    return CONDITION if f["the reference alone"] > 0 else FAILS


NO_GRAD = Claim(
    "D4",
    "no_grad for all",
    "Everything is computed under no_grad: both models' passes, and the KL.",
    lesson="01_why_a_reference.ipynb#Break-it:-a-penalty-that-is-only-watched",
    measure=_no_grad,
    judge=_judge_no_grad,
    shows=lambda f: (
        f"length of the gradient: {f['all under no_grad']:.0f} with both passes under no_grad, "
        f"{f['the reference alone']:.2f} with the reference's alone"
    ),
)


# --------------------------------------------------------------------------------------------------- D5
def _mechanisms() -> Figures:
    here = {strategy: run_strategy(strategy, model="pocket", lora_rank=8) for strategy in ("clone", "adapter")}
    there = job(2, lora_rank=8, steps=3)
    return {
        "kl": {name: run.kl for name, run in here.items()} | {"zero3": there.kl},
        "bytes": {name: run.reference_bytes for name, run in here.items()} | {"zero3": there.ranks[0].reference_bytes},
    }


def _judge_mechanisms(f: Figures) -> Verdict:
    steps = list(zip(*f["kl"].values(), strict=True))
    apart = max(max(step) - min(step) for step in steps)
    return HOLDS if steps[-1][0] > 0 and apart < 0.01 * steps[-1][0] else FAILS


MECHANISMS = Claim(
    "D5",
    "one KL",
    "The three mechanisms differ only in how the reference's logits are had.",
    lesson="00_start_here.ipynb#Three-bills",
    measure=_mechanisms,
    judge=_judge_mechanisms,
    shows=lambda f: (
        f"KL at the last step: {', '.join(f'{name} {values[-1]:.3f}' for name, values in f['kl'].items())}; "
        f"the reference holds {', '.join(show_bytes(count) for count in f['bytes'].values())}"
    ),
    ranks=True,
)

CLAIMS = (DEFINITION, DIRECTION, MEAN, NO_GRAD, MECHANISMS)
