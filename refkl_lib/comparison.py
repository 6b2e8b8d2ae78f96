"""Run the same training steps with one strategy or another, and keep what they cost.

run = run_strategy("clone", lora_rank=8)
run.kl        # nats per token at each step: the same for every strategy
run.owners    # bytes by owner at the peak: not the same
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

import torch
from torch import nn

from refkl_lib.memory.ledger import OWNERS, MemoryLedger
from refkl_lib.memory.price import price
from refkl_lib.models import load_model, load_tokenizer
from refkl_lib.ranks.config import job_config
from refkl_lib.ranks.launch import ZeRO3Run, launch_zero3
from refkl_lib.reference import STRATEGIES, Reference, create_reference
from refkl_lib.reference.adapter import add_lora
from refkl_lib.step import TimedReference, policy_loss
from refkl_lib.text import sample_batch
from refkl_lib.units import show_bytes


@dataclass(frozen=True)
class StrategyRun:
    """A few training steps with a reference kept in one way.

    `kl` is KL(policy‖reference) in nats per token, before each step; with "precomputed" an estimate (`policy_loss`),
    which is another number. `owners` are bytes at the peak of a step, `reference_bytes` what the reference holds beyond
    the policy (with "swap" in host memory); with several ranks both are those of the fullest, and what is gathered
    there counts as activations. `step_seconds` and `reference_seconds` (the reference's part of a step) are medians.
    `lora_rank` is None for full fine-tuning. A run that was only priced (`price_strategy`) has no KL and no seconds.
    """

    strategy: str
    lora_rank: int | None
    batch: int
    seq: int
    ranks: int
    kl: tuple[float, ...]
    owners: dict[str, int]
    reference_bytes: int
    step_seconds: float | None
    reference_seconds: float | None

    @classmethod
    def from_ranks(cls, run: ZeRO3Run) -> Self:
        """Return what a job of several ranks has shown, on the rank that held most at its peak."""
        fullest = max(run.ranks, key=lambda report: sum(report.peak.values()))
        settings = {name: run.settings[name] for name in ("lora_rank", "batch", "seq")}
        return cls(
            run.settings["reference"],
            **settings,
            ranks=len(run.ranks),
            kl=run.kl,
            owners=_in_five(fullest.peak),
            reference_bytes=fullest.reference_bytes,
            step_seconds=median(run.step_seconds),
            reference_seconds=median(run.reference_seconds),
        )

    @property
    def is_priced(self) -> bool:
        """Return whether nothing was run, and all numbers are a bill's."""
        return self.step_seconds is None

    @property
    def peak(self) -> int:
        """Return the bytes that lived at the peak."""
        return sum(self.owners.values())

    @property
    def name(self) -> str:
        """Return a short label: strategy, what trains, and of how many ranks this is one."""
        trains = "all weights" if self.lora_rank is None else f"LoRA {self.lora_rank}"
        where = f", each of {self.ranks}" if self.ranks > 1 else ""
        priced = ", priced" if self.is_priced else ""
        estimated = ", KL estimated" if self.strategy == "precomputed" and not priced else ""
        return f"{self.strategy}, {trains}{where}{estimated}{priced}"


def _in_five(owners: Mapping[str, int]) -> dict[str, int]:
    """Return bytes by the five owners, with what ranks have gathered among the activations."""
    held = dict(owners)
    held["activations"] += held.pop("gathered", 0)
    return held


def bill_table(runs: Sequence[StrategyRun]) -> str:
    """Return a text table of runs: bytes by owner at the peak, the last step's KL in nats per token, seconds a step."""
    columns = [*OWNERS, "peak", "KL", "step"]
    lines = [["", *columns], *([run.name, *_cells(run)] for run in runs)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns) + 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _cells(run: StrategyRun) -> list[str]:
    held = [show_bytes(run.owners[owner]) for owner in OWNERS]
    seen = ["", ""] if run.is_priced else [f"{run.kl[-1]:.3f}", f"{run.step_seconds:.1f} s"]
    return [*held, show_bytes(run.peak), *seen]


def run_strategy(
    strategy: str,
    *,
    model: str = "smollm2",
    lora_rank: int | None = 8,
    batch: int = 1,
    seq: int = 64,
    steps: int = 3,
    ranks: int = 2,
    beta: float = 0.1,
    learning_rate: float | None = None,
    seed: int = 0,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> StrategyRun:
    """Train `model` for `steps` steps on real text with a KL penalty, its reference kept by `strategy`.

    The same arguments give the same policy under every strategy, so the KL must agree; that is the point. The one
    exception is "precomputed", whose log-probs are written to a temporary folder before the first step: its KL is
    estimated from them, so the policy trains differently from the second step on.
    `lora_rank=None` trains all weights, which leaves "adapter" nothing to switch off; "swap" is for that alone. The
    learning rate is 1e-3 for an adapter and 1e-5 for all weights unless given. "zero3" starts `ranks` processes
    (`launch_zero3`), each on the same batch; `ranks` and `on_event` are theirs alone.
    Raises ValueError for an unknown strategy, a count below 1, `seq` below 2 or a beta that is none (`policy_loss`),
    and what the strategy raises.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}, but must be one of {STRATEGIES}")
    if steps < 1:
        raise ValueError(f"steps is {steps}, but there is nothing to measure without at least one")
    if learning_rate is None:
        learning_rate = 1e-3 if lora_rank else 1e-5
    settings: dict[str, Any] = {"lora_rank": lora_rank, "batch": batch, "seq": seq}
    training: dict[str, Any] = {"steps": steps, "beta": beta, "learning_rate": learning_rate, "seed": seed}
    if strategy == "zero3":
        return StrategyRun.from_ranks(launch_zero3(ranks, model, on_event=on_event, **settings, **training))
    return _run_here(strategy, model, settings, training)


def price_strategy(
    strategy: str,
    *,
    model: str = "smollm2",
    lora_rank: int | None = 8,
    batch: int = 1,
    seq: int = 64,
    ranks: int = 2,
) -> StrategyRun:
    """Return the bytes that `run_strategy` would show for the same arguments, from the bill: nothing runs.

    Raises ValueError or TypeError as `price` does.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings: dict[str, Any] = {"lora_rank": lora_rank, "batch": batch, "seq": seq}
    shared: dict[str, Any] = {"dtype": "fp32", "kl": "full", "device": device, **settings}
    if strategy == "zero3":
        shared |= {"ranks": ranks, "ds_config": job_config(learning_rate=1e-3)}
    bill = price(model, strategy, **shared)
    return StrategyRun(
        strategy,
        **settings,
        ranks=bill.settings["ranks"],
        kl=(),
        owners=_in_five(bill.owners),
        reference_bytes=bill.reference_bytes,
        step_seconds=None,
        reference_seconds=None,
    )


def _run_here(strategy: str, model: str, settings: dict[str, Any], training: dict[str, Any]) -> StrategyRun:
    text = sample_batch(model, settings["batch"], settings["seq"])
    with tempfile.TemporaryDirectory() as folder:
        options = _options(strategy, model, text, folder)
        policy, reference = _policy_and_reference(strategy, model, settings["lora_rank"], training["seed"], options)
        inputs = {name: tensor.to(next(policy.parameters()).device) for name, tensor in text.items()}
        return _measured(strategy, policy, reference, inputs, settings, training)


def _measured(
    strategy: str,
    policy: nn.Module,
    reference: Reference,
    inputs: dict[str, Any],
    settings: dict[str, Any],
    training: dict[str, Any],
) -> StrategyRun:
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training["learning_rate"], weight_decay=0.0)
    timed = TimedReference(reference)
    kl, seconds = [], []
    with MemoryLedger() as ledger:
        ledger.own("policy", policy)
        ledger.own("reference", reference)
        ledger.own("optimizer", optimizer)
        for _ in range(training["steps"]):
            started = time.perf_counter()
            kl.append(_step(policy, timed, inputs, optimizer, training["beta"]))
            seconds.append(time.perf_counter() - started)
    return StrategyRun(
        strategy,
        **settings,
        ranks=1,
        kl=tuple(kl),
        owners=ledger.peak(),
        reference_bytes=reference.owned_bytes(),
        step_seconds=median(seconds),
        reference_seconds=median(timed.seconds),
    )


def _options(strategy: str, model: str, text: dict[str, Any], folder: str) -> dict[str, Any]:
    if strategy != "precomputed":
        return {}
    return {"batches": [text], "folder": folder, "tokenizer": load_tokenizer(model), "progress": False}


def _policy_and_reference(
    strategy: str, model: str, lora_rank: int | None, seed: int, options: dict[str, Any]
) -> tuple[nn.Module, Reference]:
    policy = load_model(model)
    # These are made of the bare model: there is no need to copy or to ask an adapter that does nothing yet.
    early = strategy in ("clone", "precomputed")
    reference = create_reference(policy, strategy, **options) if early else None
    if lora_rank is not None:
        torch.manual_seed(seed)
        policy = add_lora(policy, lora_rank)
    return policy, reference or create_reference(policy, strategy, **options)


def _step(
    policy: nn.Module,
    reference: TimedReference,
    inputs: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    beta: float,
) -> float:
    loss, kl = policy_loss(policy, reference, inputs, beta)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return kl.item()
