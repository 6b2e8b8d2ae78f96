"""Train as notebook 07 does, with other seeds: what a nat buys, beta by beta.

    python benchmarks/frontier.py
    python benchmarks/frontier.py --seeds 8 --iterations 20 --group 8

Reward and KL (nats a text) are means over the last three iterations, as in the notebook. The last column tells what the
run without a leash earned when it was as far from the reference as this one ended.
"""

import argparse
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from typing import Any

from panel_overhead import capstone_code

from refkl_lib.view.train_figures import way_of

BETAS = (0.0, 1.0, 4.0)
MEAN_OF = 3


def capstone() -> dict[str, Any]:
    """Return what the notebook's cells define up to `make_run`; what they print is not repeated."""
    names: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()):
        for source in capstone_code():
            exec(source, names)
    return names


def reward_at(kls: Sequence[float], rewards: Sequence[float], kl: float) -> float | None:
    """Return the reward where a training first passes a KL, None where it never does."""
    for (low, before), (high, after) in pairwise(zip(kls, rewards, strict=True)):
        if low <= kl <= high:
            return before + (after - before) * (kl - low) / ((high - low) or 1)
    return None


def main() -> None:
    """Train, and print a line for each run as it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--group", type=int, default=4, help="texts to a prompt")
    options = parser.parse_args()
    make_run = capstone()["make_run"]
    print(f"{options.iterations} iterations, {options.group} texts to each of four prompts")
    print(f"{'seed':<6}{'beta':>6}{'reward':>10}{'at last':>9}{'KL':>8}{'beta 0 there':>14}")
    for seed in range(options.seeds):
        for beta in BETAS:
            run = make_run(beta=beta, seed=seed, group=options.group).train(options.iterations)
            kls, rewards = way_of(run.history, MEAN_OF)
            if beta == 0:
                free = kls, rewards
            there = reward_at(*free, kls[-1]) if beta else None
            shown = "" if there is None else f"{there:.1f}"
            line = f"{seed:<6}{beta:>6g}{rewards[0]:>10.1f}{rewards[-1]:>9.1f}{kls[-1]:>8.2f}{shown:>14}"
            print(line.rstrip(), flush=True)


if __name__ == "__main__":
    main()
