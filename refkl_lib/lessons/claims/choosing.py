"""Section E of the article: which of the three to take."""

from typing import Any

from refkl_lib.comparison import run_strategy
from refkl_lib.lessons.claims.claim import CONDITION, FAILS, HOLDS, Claim, Figures, Verdict
from refkl_lib.lessons.claims.trials import job, small_batch, small_lora
from refkl_lib.memory.price import price
from refkl_lib.models import load_model
from refkl_lib.reference import Reference, create_reference
from refkl_lib.step import TimedReference
from refkl_lib.units import GIB, show_bytes


# --------------------------------------------------------------------------------------------------- E1
def _thresholds() -> Figures:
    lora: dict[str, Any] = {"lora_rank": 16, "checkpointing": True}
    bills = {
        "7B, all weights": price("Qwen2.5-7B", "clone", dtype="mixed", checkpointing=True),
        "7B, all weights, bf16 alone": price("Qwen2.5-7B", "clone", checkpointing=True),
        "14B, all weights, bf16 alone": price("Qwen2.5-14B", "clone", checkpointing=True),
        "14B, adapter": price("Qwen2.5-14B", "adapter", **lora),
        "32B, adapter": price("Qwen2.5-32B", "adapter", **lora),
    }
    return {
        "peaks": {name: bill.peak for name, bill in bills.items()},
        "the rule is right": {
            "below 20B all weights fit 80 GiB": bool(bills["14B, all weights, bf16 alone"].fits(80 * GIB)),
            "where they do not, an adapter does": bool(bills["14B, adapter"].fits(24 * GIB)),
            "above 20B an adapter does not fit": not bills["32B, adapter"].fits(80 * GIB),
        },
    }


def _judge_thresholds(f: Figures) -> Verdict:
    right = f["the rule is right"].values()
    if all(right):
        return HOLDS
    return CONDITION if any(right) else FAILS


def _show_thresholds(f: Figures) -> str:
    seven, bf16, fourteen, small, large = (f"{peak / GIB:.0f}" for peak in f["peaks"].values())
    return (
        f"GiB at the peak: all weights of a 7B {seven}, in bf16 alone {bf16}, of a 14B {fourteen}; an adapter on a 14B "
        f"{small}, on a 32B {large}"
    )


THRESHOLDS = Claim(
    "E1",
    "20B and 80 GB",
    "Over 20B parameters ZeRO-3; else, with an A100 of 80 GB, full fine-tuning; else PEFT.",
    lesson="06_choose.ipynb#Break-it:-follow-the-rule",
    measure=_thresholds,
    judge=_judge_thresholds,
    shows=_show_thresholds,
)


# --------------------------------------------------------------------------------------------------- E2
def _side_by_side() -> Figures:
    full = run_strategy("clone", model="pocket", lora_rank=None, steps=1)
    peft = run_strategy("adapter", model="pocket", steps=1)
    zero3 = job(2)
    return {
        "peak": {"full": full.peak, "PEFT": peft.peak, "ZeRO-3": max(sum(r.peak.values()) for r in zero3.ranks)},
        "pass": {
            "full": _seconds(create_reference(load_model("pocket", device="cpu"), "clone")),  # a bare forward
            "PEFT": _seconds(create_reference(small_lora(), "adapter")),
            "ZeRO-3": min(zero3.reference_seconds),
        },
    }


def _seconds(reference: Reference) -> float:
    """Return how long the fastest of ten passes took: the others waited for whatever else the machine does."""
    timed = TimedReference(reference)
    for _ in range(10):
        timed.logits(**small_batch())
    return min(timed.seconds)


def _judge_side_by_side(f: Figures) -> Verdict:
    peak, seconds = f["peak"], f["pass"]
    if max(peak, key=peak.get) != "full" or max(seconds, key=seconds.get) != "ZeRO-3":
        return FAILS
    as_said = peak["full"] > peak["PEFT"] > peak["ZeRO-3"] and seconds["full"] < seconds["PEFT"] < seconds["ZeRO-3"]
    return HOLDS if as_said else CONDITION


SIDE_BY_SIDE = Claim(
    "E2",
    "memory and speed",
    "Memory: full most, PEFT little, ZeRO-3 least. Speed: full high, PEFT medium, ZeRO-3 lower.",
    lesson="06_choose.ipynb#Time-beside-memory",
    measure=_side_by_side,
    judge=_judge_side_by_side,
    shows=lambda f: (
        f"at the peak {', '.join(f'{name} {show_bytes(count)}' for name, count in f['peak'].items())} a rank; "
        f"the reference's fastest pass {', '.join(f'{name} {seconds:.3f} s' for name, seconds in f['pass'].items())}"
    ),
    ranks=True,
)

CLAIMS = (THRESHOLDS, SIDE_BY_SIDE)
