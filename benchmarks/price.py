"""Measure how long a bill takes and how much memory, from 0.1B to 405B parameters, and hold one against its real step.

    python benchmarks/price.py                 a process of its own for each model
    python benchmarks/price.py --whole         every layer traced, none inferred
    python benchmarks/price.py --truth         the step of smollm2's shape, priced and on real tensors

Seconds are without imports; MiB are the process's highest resident memory, and beside it what imports alone take.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any
from unittest import mock

MODELS = (
    "SmolLM2-135M-Instruct",
    "Qwen2.5-0.5B",
    "Llama-3.2-1B",
    "Qwen2.5-7B",
    "gemma-2-27b",
    "Mixtral-8x7B-v0.1",
    "Llama-3.1-70B",
    "Qwen3-235B-A22B",
    "Llama-3.1-405B",
)
SETTINGS: dict[str, dict[str, Any]] = {
    "clone": {"dtype": "mixed", "checkpointing": True},
    "adapter": {"lora_rank": 16, "checkpointing": True},
    "zero3": {"ranks": 64, "checkpointing": True},
}


def one(model: str, strategy: str, whole: bool) -> dict[str, float]:
    """Price in this process, and return what that took."""
    from refkl_lib import price

    imported = mib()
    start = time.perf_counter()
    with mock.patch("refkl_lib.memory.price.depths_for", return_value=None) if whole else nullcontext():
        bill = price(model, strategy, seq=2048, **SETTINGS[strategy])
    seconds = time.perf_counter() - start
    return {"parameters": bill.parameters, "peak": bill.peak, "seconds": seconds, "mib": mib(), "imported": imported}


def mib() -> float:
    """Return this process's highest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(whole: bool) -> None:
    """Print a line for each model and strategy."""
    print(f"{'model':<24}{'strategy':<10}{'parameters':>12}{'peak GiB':>11}{'seconds':>9}{'MiB':>7}{'imports':>9}")
    for model in MODELS:
        for strategy in SETTINGS:
            command = [sys.executable, __file__, "--one", model, strategy, *(["--whole"] if whole else [])]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(run.stdout.splitlines()[-1])
            print(
                f"{model:<24}{strategy:<10}{found['parameters'] / 1e9:>11.2f}B{found['peak'] / 2**30:>11.1f}"
                f"{found['seconds']:>9.2f}{found['mib']:>7.0f}{found['imported']:>9.0f}",
                flush=True,
            )


def truth() -> None:
    """Print the bill of a step of smollm2's shape beside what a ledger counts of the real one."""
    from refkl_lib.memory.shapes import config_of
    from refkl_lib.memory.trace import Step, trace

    shared = {"batch": 2, "seq": 128, "dtype": "fp32", "optimizer": "adamw", "targets": "all-linear"}
    shared |= {"config": config_of("smollm2"), "attention": None, "sync": None, "device": "cpu"}
    print(f"{'strategy':<10}{'KL':<8}{'checkpointing':<15}{'peak MiB':>10}{'same':>6}{'priced s':>10}{'lived s':>9}")
    for strategy, lora_rank in (("clone", None), ("adapter", 16)):
        for kl, checkpointing in (("full", False), ("linear", False), ("linear", True)):
            chosen = {"strategy": strategy, "lora_rank": lora_rank, "kl": kl, "checkpointing": checkpointing}
            step = Step(**shared | chosen)
            traces, seconds = [], []
            for on_meta in (True, False):
                start = time.perf_counter()
                traces.append(trace(step, on_meta))
                seconds.append(time.perf_counter() - start)
            peak = max(sum(owners.values()) for _, owners in traces[1].moments) / 2**20
            same = "yes" if traces[0] == traces[1] else "NO"
            print(
                f"{strategy:<10}{kl:<8}{checkpointing!s:<15}{peak:>10.3f}{same:>6}{seconds[0]:>10.1f}{seconds[1]:>9.1f}",
                flush=True,
            )


def main() -> None:
    """Measure as asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--whole", action="store_true", help="trace every layer")
    parser.add_argument("--truth", action="store_true", help="hold bills against real steps")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "STRATEGY"), help="price in this process, print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one, whole=options.whole)))
    elif options.truth:
        truth()
    else:
        table(options.whole)


if __name__ == "__main__":
    main()
