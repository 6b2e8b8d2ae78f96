"""What a reference's pass costs beyond a bare forward of the same model without gradients.

    python benchmarks/reference_pass.py [SOURCE] [--rounds 15]

The two are timed in turn, and the ratio is that of their medians. The bare forward finds the model as the pass leaves
it: in evaluation mode, and with the adapter off already. Of "precomputed" it is a look-up that is timed.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from refkl_lib import PrecomputedReference, add_lora, create_reference, load_model, load_tokenizer, sample_batch


def seconds(run: Callable[[], object]) -> float:
    """Return how long one call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def ratio(reference_pass: Callable[[], object], bare: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return (median seconds of the bare forward, reference pass over bare forward), timed in turn."""
    pairs = [(seconds(reference_pass), seconds(bare)) for _ in range(rounds + 2)][2:]
    bare_seconds = median(b for _, b in pairs)
    return bare_seconds, median(r for r, _ in pairs) / bare_seconds


def main() -> None:
    """Print one line for each strategy that runs in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", default="smollm2")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    batch = sample_batch(options.source, batch=2, seq=128)
    for strategy in ("clone", "adapter", "swap"):
        policy = load_model(options.source)
        if strategy == "adapter":
            policy = add_lora(policy, rank=8)
        reference = create_reference(policy, strategy)
        with torch.no_grad(), reference.as_reference() as model:
            bare = partial(model, **batch, use_cache=False)
            bare_seconds, times = ratio(partial(reference.logits, **batch), bare, options.rounds)
        tell(strategy, bare_seconds, times)
    tell("precomputed", *look_up(options.source, batch, options.rounds))


def look_up(source: str, batch: dict[str, torch.Tensor], rounds: int) -> tuple[float, float]:
    """Return what `ratio` does, of a look-up of log-probs on disk."""
    policy, tokenizer = load_model(source), load_tokenizer(source)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        reference = PrecomputedReference.compute(policy, [batch], folder, tokenizer=tokenizer, progress=False)
        return ratio(partial(reference.log_probs, **batch), partial(policy, **batch, use_cache=False), rounds)


def tell(strategy: str, bare_seconds: float, times: float) -> None:
    """Print a line."""
    print(f"{strategy:<11} bare forward {bare_seconds:.3f} s, reference's pass {times:.4f} times that")


if __name__ == "__main__":
    main()
