"""Measure how much longer a training step takes while a ledger counts.

    python benchmarks/ledger_overhead.py                  smollm2
    python benchmarks/ledger_overhead.py pocket --pairs 30

One step is the policy's pass, the clone's pass, the exact KL, the backward pass and AdamW. Steps with and
without a ledger take turns, so that a machine that gets slower or faster meanwhile does so for both. What is
left of noise on a CPU comes from memory that is given back and fetched again; glibc keeps it when told to:

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 python benchmarks/ledger_overhead.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from refkl_lib import CloneReference, MemoryLedger, load_model, policy_loss

Seconds = tuple[float, float]  # on the clock, of the processor


def training_step(source: str, batch_size: int, tokens: int) -> tuple[Callable[[], None], MemoryLedger]:
    """Return a step to call, and a ledger that owns what takes part in it."""
    ledger = MemoryLedger()
    policy = ledger.own("policy", load_model(source).train())
    reference = CloneReference(policy)
    ledger.own("reference", reference.model)
    optimizer = ledger.own("optimizer", torch.optim.AdamW(policy.parameters(), lr=1e-6))
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


def measure(step: Callable[[], None], ledger: MemoryLedger, pairs: int) -> dict[bool, list[Seconds]]:
    """Return the times of `pairs` steps without (False) and as many with the ledger (True)."""
    times: dict[bool, list[Seconds]] = {False: [], True: []}
    for turn in range(2 * pairs + 2):
        counted = turn % 2 == 1
        with ledger if counted else nullcontext():
            seconds = seconds_of(step)
        if turn >= 2:  # The first step of each kind makes the optimizer's state and fills caches.
            times[counted].append(seconds)
    return times


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", help="pocket, smollm2, a folder or a hub id")
    parser.add_argument("--batch", type=int, default=2, help="sequences in the batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--pairs", type=int, default=7, help="steps with and as many without the ledger")
    options = parser.parse_args()
    times = measure(*training_step(options.model, options.batch, options.tokens), options.pairs)
    print(f"{options.model}, {options.batch} x {options.tokens} tokens, median of {options.pairs} steps")
    print(f"{'seconds':<10}{'without':>10}{'with':>10}{'ratio':>8}")
    for row, name in enumerate(("clock", "processor")):
        without, with_ledger = (statistics.median(pair[row] for pair in times[kind]) for kind in (False, True))
        print(f"{name:<10}{without:>10.4f}{with_ledger:>10.4f}{with_ledger / without:>8.3f}")


if __name__ == "__main__":
    main()
