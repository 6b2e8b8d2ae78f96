"""Measure how long a model takes to load from the cache, in a process that has loaded one before.

python benchmarks/load_model.py                 smollm2; the aim is under 2 s
python benchmarks/load_model.py pocket --times 20
"""

import argparse
import statistics
import time

import torch

from refkl_lib import load_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds_to_load(source: str, dtype: torch.dtype) -> float:
    """Return the seconds of one `load_model`."""
    start = time.perf_counter()
    load_model(source, dtype=dtype)
    return time.perf_counter() - start


def main() -> None:
    """Print the median and the largest of several loads, for each dtype."""
    parser = argparse.ArgumentParser(description="Measure how long a model takes to load.")
    parser.add_argument("source", nargs="?", default="smollm2")
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    seconds_to_load(options.source, torch.float32)
    for name, dtype in DTYPES.items():
        seconds = [seconds_to_load(options.source, dtype) for _ in range(options.times)]
        median, largest = statistics.median(seconds), max(seconds)
        print(f"{options.source} {name}: median {median:.2f} s, largest {largest:.2f} s")


if __name__ == "__main__":
    main()
