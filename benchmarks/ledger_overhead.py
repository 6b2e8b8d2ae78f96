"""Measure how much longer a training step takes while a ledger counts, and how much with any dispatch mode.

    python benchmarks/ledger_overhead.py                                   smollm2, all of its weights
    python benchmarks/ledger_overhead.py --lora 8 --batch 1 --tokens 64    an adapter, a short text
    python benchmarks/ledger_overhead.py pocket --rounds 30

One step is the policy's pass, the reference's pass, the exact KL, the backward pass and AdamW. It is taken with
nothing; with a dispatch mode that does nothing but pass operations on; with a ledger, which is such a mode and counts;
and with `torch.profiler(profile_memory=True)`, which tells nothing before its end. They take turns, in another order
each round, so that a machine that gets slower or faster meanwhile does so for all. What is left of noise on a CPU
comes from memory that is given back and fetched again; glibc keeps it when told to:

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 python benchmarks/ledger_overhead.py
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from refkl_lib import MemoryLedger, add_lora, create_reference, load_model, policy_loss

Seconds = tuple[float, float]  # on the clock, of the processor
Watcher = Callable[[], AbstractContextManager[Any]]


def training_step(
    source: str, batch_size: int, tokens: int, lora_rank: int | None = None
) -> tuple[Callable[[], None], MemoryLedger]:
    """Return a step to call, and a ledger that owns what takes part in it."""
    ledger = MemoryLedger()
    model = load_model(source).train()
    policy = ledger.own("policy", model if lora_rank is None else add_lora(model, lora_rank))
    reference = create_reference(policy, "clone" if lora_rank is None else "adapter")
    ledger.own("reference", reference)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = ledger.own("optimizer", torch.optim.AdamW(trained, lr=1e-6))
    ids = torch.randint(policy.config.vocab_size, (batch_size, tokens), device=policy.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def step() -> None:
        policy_loss(policy, reference, batch, beta=0.1)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, ledger


def seconds_of(step: Callable[[], None]) -> Seconds:
    """Return how long one call of `step` takes."""
    clock, processor = time.perf_counter(), time.process_time()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - processor


class PassOn(TorchDispatchMode):
    """A dispatch mode that does nothing: the way into Python and back, and what PyTorch does otherwise meanwhile."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as the ledger's; otherwise the way is several times as long

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operation."""
        return func(*args, **kwargs) if kwargs else func(*args)


def watchers(ledger: MemoryLedger) -> dict[str, Watcher]:
    """Return what can look at a step's memory, and nothing to compare with."""
    profiler = partial(profile, profile_memory=True)
    return {"nothing": nullcontext, "empty mode": PassOn, "ledger": lambda: ledger, "profiler": profiler}


def shuffled(watchers: dict[str, Watcher]) -> list[tuple[str, Watcher]]:
    """Return the watchers in a new order: a step also depends on what the one before it left in memory and caches."""
    return random.sample([*watchers.items()], len(watchers))


def measure(step: Callable[[], None], ledger: MemoryLedger, rounds: int) -> dict[str, list[Seconds]]:
    """Return the times of `rounds` steps under each watcher."""
    times: dict[str, list[Seconds]] = {name: [] for name in watchers(ledger)}
    for turn in range(rounds + 1):
        for name, watcher in shuffled(watchers(ledger)):
            with watcher():
                seconds = seconds_of(step)
            if turn:  # The first step of each kind makes the optimizer's state and fills caches.
                times[name].append(seconds)
    return times


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", help="pocket, smollm2, a folder or a hub id")
    parser.add_argument("--batch", type=int, default=2, help="sequences in the batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter, and keep the reference by it")
    parser.add_argument("--rounds", type=int, default=9, help="steps under each watcher")
    options = parser.parse_args()
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler tells of its start and end
    times = measure(*training_step(options.model, options.batch, options.tokens, options.lora), options.rounds)
    trained = "all weights" if options.lora is None else f"LoRA of rank {options.lora}"
    print(
        f"{options.model}, {trained}, {options.batch} x {options.tokens} tokens, medians of {options.rounds} steps each"
    )
    print(f"{'watched by':<12}{'clock s':>10}{'ratio':>8}{'processor s':>14}{'ratio':>8}")
    bare = [statistics.median(column) for column in zip(*times["nothing"], strict=True)]
    for name, pairs in times.items():
        clock, processor = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:<12}{clock:>10.4f}{clock / bare[0]:>8.3f}{processor:>14.4f}{processor / bare[1]:>8.3f}")


if __name__ == "__main__":
    main()
