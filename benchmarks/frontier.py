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

BETAS = (0.0, 1.0, 4.0)
MEAN_OF = 3
Way = list[tuple[float, float]]  # (KL, reward), from the first iterations to the last


def capstone() -> dict[str, Any]:
    """Return what the notebook's cells define up to `make_run`; what they print is not repeated."""
    names: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()):
        for source in capstone_code():
            exec(source, names)
    return names


def way_of(history: Sequence[Any]) -> Way:
    """Return a training's way: running means over MEAN_OF iterations."""
    windows = [history[at : at + MEAN_OF] for at in range(len(history) - MEAN_OF + 1)]
    return [tuple(sum(getattr(r, name) for r in window) / MEAN_OF for name in ("kl", "reward")) for window in windows]


def reward_at(way: Way, kl: float) -> float | None:
    """Return the reward where a way first passes a KL, None where it never does."""
    for (low, before), (high, after) in pairwise(way):
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
        free: Way = []
        for beta in BETAS:
            run = make_run(beta=beta, seed=seed, group=options.group).train(options.iterations)
            way = way_of(run.history)
            free = free or way
            kl, reward = way[-1]
            there = reward_at(free, kl) if beta else None
            shown = "" if there is None else f"{there:.1f}"
            line = f"{seed:<6}{beta:>6g}{way[0][1]:>10.1f}{reward:>9.1f}{kl:>8.2f}{shown:>14}"
            print(line.rstrip(), flush=True)


if __name__ == "__main__":
    main()
