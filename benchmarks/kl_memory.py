"""What a KL, and the log-probs of given tokens, take beyond the models: memory and time, ours beside others'.

    python benchmarks/kl_memory.py
    python benchmarks/kl_memory.py --tokens 8192 --vocabulary 151936 --rounds 1       twenty minutes on two cores
    python benchmarks/kl_memory.py --tokens 512 --train-head

Every way starts from hidden states, ends with their gradient (and the head's with --train-head), and must agree with
the first one in both. Peers come with `pip install -c constraints.txt -e '.[bench]'`; those that are not installed are
named, and so are those that do not fit in memory. MiB are the most that the allocator had given out at once, scratch
memory inside of kernels included; seconds are the processor's, medians of rounds in which all ways take turns. The
floor is the time of the matrix products that nobody can leave out, at the rate that this machine makes such products:
logits of both models and back for a KL, logits and back for log-probs.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from statistics import median

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from refkl_lib import exact_kl, linear_kl, linear_token_log_probs, token_log_probs
from refkl_lib.memory.meters import machine
from refkl_lib.units import MIB


@dataclass
class Case:
    """Hidden states of two models (1, T, H), their heads, and tokens to give the log-probs of (1, T)."""

    hidden: Tensor
    head: nn.Linear
    ref_hidden: Tensor
    ref_head: nn.Linear
    ids: Tensor

    def ref_logits(self) -> Tensor:
        """Return the reference's logits (1, T, V), a constant."""
        with torch.no_grad():
            return self.ref_head(self.ref_hidden)

    def drop_gradients(self) -> None:
        """Forget the gradients of the run before."""
        self.hidden.grad = self.head.weight.grad = None


Way = Callable[[Case], Tensor]
Result = tuple[float, list[Tensor]]


def full_kl(case: Case) -> Tensor:
    """Whole logits, log_softmax and F.kl_div."""
    log_p, log_q = case.head(case.hidden).log_softmax(-1), case.ref_logits().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / case.ids.numel()


def our_linear_kl(case: Case) -> Tensor:
    """Return linear_kl."""
    return linear_kl(case.hidden, case.head, case.ref_hidden, case.ref_head)


def trl_kl(case: Case) -> Tensor:
    """TRL's chunked divergence; its beta = 1 is KL(student‖teacher)."""
    function = import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    p, q = (case.hidden[0], case.head.weight, None), (case.ref_hidden[0], case.ref_head.weight, None)
    return function.apply(*p, *q, 1.0)[0].mean()


def liger_kl(case: Case, **options: int) -> Tensor:
    """Liger's chunked generalised JSD; its beta = 1 is KL(student‖teacher)."""
    loss = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False, **options
    )
    return loss(case.hidden[0], case.head.weight, case.ref_hidden[0], case.ref_head.weight, case.ids[0])


def trl_log_probs(case: Case) -> Tensor:
    """TRL's selective_log_softmax of whole logits."""
    return import_module("trl.trainer.utils").selective_log_softmax(case.head(case.hidden), case.ids).mean()


def trl_chunked_log_probs(case: Case) -> Tensor:
    """TRL's chunked log-probs, without the entropy and what else it can give."""
    function = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    chunk = import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    given = (case.hidden[0], case.head.weight, None, case.ids[0], 1.0, chunk, None, 1.0, ())
    return function.apply(*given)[0].mean()


def liger_chunked_log_probs(case: Case) -> Tensor:
    """Liger's chunked log-probs, which its GRPO loss uses."""
    module = import_module("liger_kernel.chunked_loss.fused_linear_ppo")
    given = (case.hidden[0], case.head.weight, case.ids[0], None, 1.0, module._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE)
    return module._ChunkedSelectiveLogProbFunction.apply(*given).mean()


# Each table's first way that fits is what the others are compared with. (label, package it needs, way)
KL: list[tuple[str, str, Way]] = [
    ("full logits, F.kl_div", "torch", full_kl),
    ("exact_kl of full logits", "torch", lambda c: exact_kl(c.head(c.hidden), c.ref_logits())),
    ("linear_kl", "torch", our_linear_kl),
    ("TRL, chunked divergence", "trl", trl_kl),
    ("Liger, chunked JSD", "liger_kernel", liger_kl),
    ("Liger, in chunks of 256", "liger_kernel", lambda case: liger_kl(case, chunk_size=256)),
]
LOG_PROBS: list[tuple[str, str, Way]] = [
    ("full logits, gather", "torch", lambda c: c.head(c.hidden).log_softmax(-1).gather(-1, c.ids[..., None]).mean()),
    ("token_log_probs", "torch", lambda c: token_log_probs(c.head(c.hidden), c.ids).mean()),
    ("linear_token_log_probs", "torch", lambda c: linear_token_log_probs(c.hidden, c.head, c.ids).mean()),
    ("TRL, selective_log_softmax", "trl", trl_log_probs),
    ("TRL, chunked log-probs", "trl", trl_chunked_log_probs),
    ("Liger, chunked log-probs", "liger_kernel", liger_chunked_log_probs),
]


def make_case(tokens: int, vocabulary: int, width: int, train_head: bool) -> Case:
    """Return random hidden states, and a reference a little away from the policy."""
    torch.manual_seed(0)
    head, ref_head = nn.Linear(width, vocabulary, bias=False), nn.Linear(width, vocabulary, bias=False)
    nn.init.normal_(head.weight, std=width**-0.5)
    ref_head.load_state_dict(head.state_dict())
    hidden = 2 * torch.randn(1, tokens, width)
    ref_hidden = hidden + 0.2 * torch.randn_like(hidden)
    ids = torch.randint(vocabulary, (1, tokens))
    return Case(hidden.requires_grad_(), head.requires_grad_(train_head), ref_hidden, ref_head, ids)


def run(way: Way, case: Case) -> Result | None:
    """Return the value and the gradients, None if that does not fit in memory."""
    case.drop_gradients()
    try:
        value = way(case)
        value.backward()
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return None
    return value.item(), [g for g in (case.hidden.grad, case.head.weight.grad) if g is not None]


def extra_bytes(way: Way, case: Case) -> int | None:
    """Return the most that the CPU's allocator had given out at once beyond what was there before, None if too much."""
    case.drop_gradients()  # freed while the profiler counts, they would count as less than nothing
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        if run(way, case) is None:
            return None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def refuse_what_does_not_fit() -> None:
    """Let an allocation fail that this machine cannot serve, before the system ends the process for it."""
    if sys.platform == "linux":
        limit = psutil.Process().memory_info().vms + machine().available - 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def seconds(call: Callable[[], object]) -> float:
    """Return the processor's seconds for one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def product_rate(case: Case) -> float:
    """Return how many multiplications and additions this machine does in a second, in products of such a shape."""
    rows = case.hidden[0, :512].detach()
    logits = F.linear(rows, case.head.weight)
    work = 2 * rows.shape[0] * case.head.weight.numel()
    there = median(seconds(lambda: F.linear(rows, case.head.weight)) for _ in range(3))
    back = median(seconds(lambda: logits @ case.head.weight) for _ in range(3))
    return 2 * work / (there + back)


@torch.no_grad()
def floor_seconds(case: Case, products: int) -> float:
    """Return how long the products that cannot be left out take."""
    return products * 2 * case.ids.numel() * case.head.weight.numel() / product_rate(case)


def table(title: str, ways: list[tuple[str, str, Way]], case: Case, products: int, rounds: int) -> None:
    """Measure and print one table."""
    print(f"\n{title:<28}{'extra MiB':>10}{'ratio':>8}{'seconds':>10}{'ratio':>8}")
    there = [(label, way) for label, package, way in ways if find_spec(package)]
    peaks = {label: extra_bytes(way, case) for label, way in there}
    times: dict[str, list[float]] = {label: [] for label, _ in there}
    results: dict[str, Result] = {}
    for _ in range(rounds):
        for label, way in there:
            started = time.process_time()
            if peaks[label] and (result := run(way, case)):
                results[label] = result
                times[label].append(time.process_time() - started)
    fitting = [label for label, _ in there if len(times[label]) == rounds]  # once may be luck
    first = fitting[0]
    for label, _, _ in ways:
        if label not in fitting:
            print(f"{label:<28}  {'does not fit' if label in peaks else 'not installed'}")
            continue
        spent, usual = median(times[label]), median(times[first])
        agree = "" if agrees(results[label], results[first]) else "  DIFFERS"
        memory = f"{peaks[label] / MIB:>10.0f}{peaks[label] / peaks[first]:>8.3f}"
        print(f"{label:<28}{memory}{spent:>10.2f}{spent / usual:>8.2f}{agree}", flush=True)
    print(f"{f'floor: {products} products':<28}{'':>18}{floor_seconds(case, products):>10.2f}")


def agrees(result: Result, expected: Result) -> bool:
    """Tell whether value and gradients are the same but for rounding."""
    (value, gradients), (right_value, right) = result, expected
    off = [((g - r).abs().max() / r.abs().max()).item() for g, r in zip(gradients, right, strict=True)]
    return abs(value - right_value) < 1e-4 * abs(right_value) and max(off) < 1e-4


def main() -> None:
    """Print a table of each kind for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49_152])
    parser.add_argument("--width", type=int, default=576, help="numbers in a hidden state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-head", action="store_true", help="the head's gradient, too (one product more)")
    options = parser.parse_args()
    sizes = [(tokens, vocabulary) for vocabulary in options.vocabulary for tokens in options.tokens]
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler's own messages would stand between the lines
    refuse_what_does_not_fit()
    for tokens, vocabulary in sizes:
        case = make_case(tokens, vocabulary, options.width, options.train_head)
        size = f"{tokens:,} x {vocabulary:,}"
        table(f"KL, {size}", KL, case, 3 + options.train_head, options.rounds)
        table(f"log-probs, {size}", LOG_PROBS, case, 2 + options.train_head, options.rounds)


if __name__ == "__main__":
    main()
