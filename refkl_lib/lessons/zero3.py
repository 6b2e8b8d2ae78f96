"""The exercises of notebook 04: who holds which number, how many bytes that makes, and a reference's configuration."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refkl_lib.lessons.exercise import Case, Exercise, Mistake, WrongFormError


def _count(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise WrongFormError(f"your function returned a {type(value).__name__}; {what} is an int.")
    return value


# --------------------------------------------------------------------------------------------- 04.owner
def owner_of(index: int, numel: int, ranks: int) -> int:
    """Return the rank that holds element `index` of a flattened weight of `numel` elements."""
    # Rounded up: all ranks hold equally much, and what the last one lacks is filled with padding.
    per_rank = (numel + ranks - 1) // ranks
    return index // per_rank


def _ask_owner(function: Callable[[int, int, int], Any], indices: Tensor, numel: int, ranks: int) -> Tensor:
    owners = [_count(function(int(index), numel, ranks), "a rank") for index in indices]
    return torch.tensor(owners).to(indices)


def _owners(indices: Tensor, numel: int, ranks: int) -> Tensor:
    return torch.arange(ranks).repeat_interleave(math.ceil(numel / ranks))[indices.long()]


OWNER = Exercise(
    id="04.owner",
    idea=(
        "A weight is flattened and cut into one piece for each rank, in order: rank 0 has the first piece.",
        "All pieces have one size, numel / ranks rounded up; the last piece is filled up with padding.",
        "Ranks and elements are counted from 0, and an owner is a whole number.",
    ),
    solution=owner_of,
    oracle=_owners,
    draw=lambda generator: (torch.randint(0, 29, (6,), generator=generator).float(), 29, 8),
    by_hand=Case(
        "elements 0, 2, 3, 6 and 9 of 10 over four ranks",
        (torch.tensor([0.0, 2, 3, 6, 9]), 10, 4),
        torch.tensor([0.0, 0, 1, 2, 3]),
    ),
    hard=(Case("one element over four ranks", (torch.tensor([0.0]), 1, 4), torch.tensor([0.0])),),
    keeps_gradient=False,
    ask=_ask_owner,
    mistakes=(
        Mistake(1, "dealt out like cards, index % ranks", lambda index, numel, ranks: index % ranks),
        Mistake(2, "pieces rounded down, numel // ranks", lambda i, numel, ranks: i // max(numel // ranks, 1)),
        Mistake(2, "pieces of unequal size, index · ranks // numel", lambda i, numel, ranks: i * ranks // numel),
        Mistake(3, "ranks counted from 1", lambda *given: owner_of(*given) + 1),
    ),
    hints=(
        "How many elements does each of four ranks hold, if there are ten and all hold equally many?",
        "Round numel / ranks up, with whole numbers: (numel + ranks - 1) // ranks.",
        "Return index // per_rank, with per_rank = (numel + ranks - 1) // ranks.",
    ),
)


# --------------------------------------------------------------------------------------------- 04.bytes
def rank_bytes(numels: list[int], ranks: int, itemsize: int) -> int:
    """Return the bytes that each rank holds of weights with `numels` elements of `itemsize` bytes."""
    # Weight by weight: each of them is padded on its own, so rounding the total once is too little.
    return sum((numel + ranks - 1) // ranks for numel in numels) * itemsize


def _ask_bytes(function: Callable[[list[int], int, int], Any], numels: Tensor, ranks: int, itemsize: int) -> Tensor:
    given = [int(numel) for numel in numels]
    return torch.tensor(_count(function(given, ranks, itemsize), "a number of bytes")).to(numels)


BYTES = Exercise(
    id="04.bytes",
    idea=(
        "Each rank holds a piece of every weight: numel / ranks elements of it.",
        "A piece is rounded up, and for each weight by itself.",
        "Bytes, not elements, and those of one rank.",
    ),
    solution=rank_bytes,
    oracle=lambda numels, ranks, itemsize: (numels.double() / ranks).ceil().sum() * itemsize,
    draw=lambda generator: (torch.randint(5, 40, (4,), generator=generator) * 8.0 + 3, 8, 2),
    by_hand=Case(
        "weights of 10, 5 and 1 elements of 4 bytes over four ranks",
        (torch.tensor([10.0, 5, 1]), 4, 4),
        torch.tensor(4.0 * (3 + 2 + 1)),
    ),
    keeps_gradient=False,
    ask=_ask_bytes,
    mistakes=(
        Mistake(1, "the whole model, as on a single rank", lambda numels, ranks, itemsize: sum(numels) * itemsize),
        Mistake(2, "pieces rounded down", lambda ns, ranks, itemsize: sum(n // ranks for n in ns) * itemsize),
        Mistake(2, "the total rounded up, not each weight", lambda ns, ranks, size: -(-sum(ns) // ranks) * size),
        Mistake(3, "elements, not bytes", lambda ns, ranks, itemsize: rank_bytes(ns, ranks, 1)),
        Mistake(3, "the bytes of all ranks, padding included", lambda ns, r, itemsize: r * rank_bytes(ns, r, itemsize)),
    ),
    hints=(
        "A weight has one element, and there are four ranks. How many elements does each rank keep for it?",
        "Round up for every weight: (numel + ranks - 1) // ranks. Then add up.",
        "Return sum((numel + ranks - 1) // ranks for numel in numels) * itemsize.",
    ),
)


# ---------------------------------------------------------------------------------- 04.reference_config
def reference_config(job: dict[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a reference beside a job's own: partitioned, and nothing that trains."""
    # A deep copy: the job's configuration has dicts inside, and is still needed as it is.
    config = copy.deepcopy(job)
    # Without an optimizer DeepSpeed makes an engine that only looks.
    for key in ("optimizer", "scheduler"):
        config.pop(key, None)
    # Nested: "zero_optimization.stage" as one key would be overlooked without a word.
    config.setdefault("zero_optimization", {})["stage"] = 3
    return config


CONFIG_FACTS = (
    "it has no optimizer",
    "it has no scheduler",
    "its zero_optimization has stage 3",
    "what else zero_optimization says is kept",
    "the precision and the batch size are kept",
    "it has no other keys than the job's",
    "the job's own configuration has the keys it had",
    "the job's own zero_optimization is as it was",
)


def _job(lr: float, plain: bool) -> dict[str, Any]:
    bare = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    if plain:
        return bare | {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}
    zero = {"stage": 2, "reduce_bucket_size": 1000}
    training = {"optimizer": {"type": "AdamW", "params": {"lr": lr}}, "scheduler": {"type": "WarmupLR"}}
    return bare | training | {"zero_optimization": zero}


def _ask_config(function: Callable[[dict[str, Any]], Any], lr: Tensor, plain: bool) -> Tensor:
    job, before = _job(lr.item(), plain), _job(lr.item(), plain)
    made = function(job)
    if not isinstance(made, dict):
        raise WrongFormError(f"your function returned a {type(made).__name__}; a configuration is a dict.")
    zero = made.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    facts = (
        "optimizer" not in made,
        "scheduler" not in made,
        zero.get("stage") == 3,
        {**zero, "stage": 2} == before["zero_optimization"],
        all(made.get(key) == before[key] for key in ("bf16", "train_micro_batch_size_per_gpu")),
        made.keys() <= before.keys(),
        job.keys() == before.keys(),
        job["zero_optimization"] == before["zero_optimization"],
    )
    return torch.tensor(facts).to(lr)


def _shallow(job: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in job.items() if key not in ("optimizer", "scheduler")}
    config["zero_optimization"]["stage"] = 3
    return config


def _in_place(job: dict[str, Any]) -> dict[str, Any]:
    for key in ("optimizer", "scheduler"):
        job.pop(key, None)
    job["zero_optimization"]["stage"] = 3
    return job


def _dotted(job: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in copy.deepcopy(job).items() if key not in ("optimizer", "scheduler")}
    return kept | {"zero_optimization.stage": 3}


def _with_the_optimizer(job: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(job)
    config["zero_optimization"]["stage"] = 3
    return config


CONFIG = Exercise(
    id="04.reference_config",
    idea=(
        "A reference does not train: without optimizer and scheduler DeepSpeed makes an engine that only looks.",
        'Stage 3 partitions its weights. The keys are nested: config["zero_optimization"]["stage"].',
        "All else is the job's, and the job still needs its own configuration, with the dicts in it, as it was.",
    ),
    solution=reference_config,
    oracle=lambda lr, plain: torch.ones(len(CONFIG_FACTS)),
    draw=lambda generator: (torch.rand((), generator=generator), False),
    by_hand=Case(
        "a job at stage 2 with AdamW and warm-up", (torch.tensor(0.001), False), torch.ones(len(CONFIG_FACTS))
    ),
    hard=(Case("a job without optimizer and scheduler", (torch.tensor(0.001), True)),),
    keeps_gradient=False,
    ask=_ask_config,
    facts=CONFIG_FACTS,
    imports="import copy\nfrom typing import Any",
    mistakes=(
        Mistake(1, "a configuration that still has the optimizer and the scheduler", _with_the_optimizer),
        Mistake(2, 'one key "zero_optimization.stage", which DeepSpeed overlooks', _dotted),
        Mistake(3, "a shallow copy: the job's own zero_optimization becomes stage 3 as well", _shallow),
        Mistake(3, "the job's own configuration, changed in place", _in_place),
    ),
    hints=(
        "Which parts of the job's configuration say how to train? Does a reference need them?",
        "Begin with copy.deepcopy(job). Drop two keys; one may not be there: pop(key, None).",
        'Set config.setdefault("zero_optimization", {})["stage"] = 3 and return config.',
    ),
)

EXERCISES = (OWNER, BYTES, CONFIG)
