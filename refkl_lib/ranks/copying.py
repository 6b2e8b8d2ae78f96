"""What each rank of `copy_under_zero3` runs: it copies the policy, tries the copy, then the original."""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from itertools import islice
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from refkl_lib.models import load_model
from refkl_lib.ranks.config import job_config
from refkl_lib.ranks.copies import COPIED, NOT_TRIED, SUCCEEDS
from refkl_lib.ranks.events import tell
from refkl_lib.ranks.training import connect, make_engine
from refkl_lib.ranks.worker import telling
from refkl_lib.tensors import storage_bytes
from refkl_lib.text import sample_batch


def main() -> None:
    """Make the copy that the command line asks for, and tell what became of it."""
    parser = argparse.ArgumentParser(prog="refkl_lib.ranks.copying", description="One rank of copy_under_zero3.")
    parser.add_argument("--what", required=True, choices=COPIED, help="what is copied")
    parser.add_argument("--model", default="pocket", help="pocket, smollm2, a hub id or a folder")
    parser.add_argument("--gathered", type=int, default=0, help="1 copies inside GatheredParameters")
    parser.add_argument("--forward", type=int, default=1, help="0 makes the copy and lets it be")
    with telling():
        settings = parser.parse_args()
        connect()
        tell("done", **_outcome(settings))
        torch.distributed.destroy_process_group()


def _outcome(settings: argparse.Namespace) -> dict[str, Any]:
    """Return what a rank knows of a `CopyOutcome`."""
    batch = sample_batch(settings.model, 1, 16)
    config = job_config(learning_rate=1e-3)
    in_force = HfDeepSpeedConfig(config)  # transformers loads partitioned for as long as this lives
    policy = load_model(settings.model)
    del in_force
    original_bytes = storage_bytes(policy)
    engine = None if settings.what == "model" else make_engine(policy, config)
    source = engine if settings.what == "engine" else policy
    whole = deepspeed.zero.GatheredParameters(list(policy.parameters())) if settings.gathered else nullcontext()
    with whole:
        copy, copied = _try(lambda: deepcopy(source))
    forward = settings.forward and copy
    logits, said = _try(lambda: _logits(copy, batch)) if forward else (None, NOT_TRIED)
    engine = engine or make_engine(policy, config)
    passes = [_try(lambda: _logits(engine, batch)) for _ in range(2)]
    expected, _ = passes[-1]
    return {
        "copied": copied,
        "shapes": {name: list(p.shape) for name, p in islice(copy.named_parameters(), 3)} if copy else {},
        "copy_bytes": storage_bytes(copy) if copy else 0,
        "original_bytes": original_bytes,
        "forward": said,
        "original": [said for _, said in passes],
        "same_logits": None if logits is None or expected is None else torch.allclose(logits, expected, atol=1e-4),
    }


def _try(action: Callable[[], Any]) -> tuple[Any, str]:
    """Return what an action gives, None if it raises, and how it went."""
    try:
        return action(), SUCCEEDS
    except Exception as error:  # whatever it is, it is what shall be shown
        return None, f"{type(error).__name__}: {error}"[:300]


@torch.no_grad()
def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    return model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).logits


if __name__ == "__main__":
    main()
