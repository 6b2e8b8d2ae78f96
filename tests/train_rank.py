"""A rank of test_train_zero3.py: it trains beside a partitioned reference and a clone, and tells both histories."""

import os
from dataclasses import asdict

import torch

from refkl_lib import TrainRun, add_lora, create_reference, load_model, load_tokenizer
from refkl_lib.ranks.config import job_config
from refkl_lib.ranks.events import tell
from refkl_lib.ranks.training import connect


def low_bytes(text: str) -> float:
    return sum(ord(letter) < 64 for letter in text) / max(len(text), 1)


def history(strategy: str, **options: object) -> list[dict[str, object]]:
    torch.manual_seed(0)
    policy = load_model("pocket")
    reference = create_reference(policy, strategy, **options)
    run = TrainRun(add_lora(policy, rank=4), reference, load_tokenizer("pocket"), ["ab"], low_bytes, learning_rate=1e-2)
    return [asdict(record) for record in run.train(3).history]


def main() -> None:
    tell("started", pid=os.getpid())
    connect()
    partitioned = history("zero3", source="pocket", ds_config=job_config(learning_rate=1e-3))
    tell("trained", partitioned=partitioned, cloned=history("clone"))
    tell("done")


if __name__ == "__main__":
    main()
