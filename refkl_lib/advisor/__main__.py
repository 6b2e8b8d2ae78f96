"""The command that advises: python -m refkl_lib.advisor Qwen/Qwen2.5-7B --gpus 8 --memory 80."""

import argparse
import sys
from typing import get_args

from refkl_lib.advisor.advise import advise
from refkl_lib.memory.optimizers import OPTIMIZERS
from refkl_lib.memory.trace import Attention, Precision
from refkl_lib.models import ModelUnavailableError
from refkl_lib.units import GIB


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments; each is one of `advise`."""
    made = argparse.ArgumentParser(
        prog="python -m refkl_lib.advisor",
        description="Say which way to keep a frozen reference model, by the bills of all ways. Nothing is trained.",
    )
    made.add_argument("model", help="a known name, a folder with a config.json, or a hub id")
    made.add_argument("--memory", type=gibibytes, required=True, metavar="GIB", help="memory of each GPU, in GiB")
    made.add_argument("--gpus", type=int, default=1, dest="ranks", help="how many GPUs, a rank on each (default: 1)")
    made.add_argument(
        "--host-memory", type=gibibytes, default=0, metavar="GIB", help="host memory for each GPU, in GiB"
    )
    made.add_argument("--fixed-data", action="store_true", help="all texts are known before training")
    made.add_argument("--lora", type=int, dest="lora_rank", metavar="RANK", help="train an adapter, not all weights")
    made.add_argument("--batch", type=int, default=1, help="sequences on each GPU (default: 1)")
    made.add_argument("--seq", type=int, default=1024, help="tokens in a sequence (default: 1024)")
    made.add_argument("--dtype", choices=get_args(Precision), default="mixed", help="default: mixed")
    made.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="default: adamw")
    made.add_argument("--attention", choices=get_args(Attention), help="default: what transformers takes")
    made.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    return made


def gibibytes(text: str) -> int:
    """Return GiB as bytes. Raises ArgumentTypeError for what is no size."""
    try:
        return int(float(text) * GIB)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GiB: write 80, say") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = vars(parser().parse_args(arguments))
    try:
        print(advise(options.pop("model"), device_memory=options.pop("memory"), **options))
    except (ValueError, TypeError, NotImplementedError, ModelUnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
