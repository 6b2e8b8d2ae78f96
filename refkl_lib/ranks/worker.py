"""What each rank runs: it says that it lives, trains, and says how it went.

    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 --module refkl_lib.ranks.worker --model pocket --steps 3

Standard output carries one event a phase and a step (`events.tell`), among whatever libraries print.
"""

import argparse
import faulthandler
import gc
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from refkl_lib.ranks.events import tell


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says; an exception is told before it ends the rank."""
    settings = parse(arguments)
    with telling():
        # Only now: these imports take seconds, and a rank that fails in them should be known by its number.
        gc.disable()  # what they make stays, and looking through it again and again takes a sixth of their time
        from refkl_lib.ranks.training import train

        gc.freeze()
        gc.enable()
        train(settings)


@contextmanager
def telling() -> Iterator[None]:
    """Tell that this rank lives, and what ends it if the block raises; with the block, the process ends.

    It ends as well when nobody listens any more.
    """
    # Asked by SIGUSR1, a rank prints where it is: what to do when it hangs.
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    threading.Thread(target=end_with_the_listener, daemon=True).start()
    tell("started", pid=os.getpid())
    try:
        yield
    except BaseException as error:
        first = first_of(error)
        said = f"{type(first).__name__}: {first}"
        if first is not error:
            said = f"{said[:300]}; then {type(error).__name__}: {error}"
        # Only a part of each: an event has to fit into one write.
        tell("error", message=said[:500], traceback="".join(traceback.format_exception(first))[-2000:])
        traceback.print_exception(error)
        leave(1)
    leave(0)


def leave(status: int) -> NoReturn:
    """End this process without taking Python down; a rank that has left the others has nothing more to do.

    A thread of gloo that wakes up late may still hold a tensor, and lets go of it when there is no Python any more:
    then the system ends the process with SIGABRT (https://github.com/pytorch/pytorch/pull/179291). One that waits for
    a rank that was lost may not let Python end at all.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def first_of(error: BaseException) -> BaseException:
    """Return what an error began with: a rank that lost another fails again when it lets go of its layers.

    What was raised `from` something says on purpose what that meant, and counts as the first.
    """
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return error


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings that a command line holds."""
    parser = argparse.ArgumentParser(prog="refkl_lib.ranks.worker", description="One rank of launch_zero3.")
    parser.add_argument("--model", default="pocket", help="pocket, smollm2, a hub id or a folder")
    parser.add_argument("--steps", type=int, default=3, help="training steps")
    parser.add_argument("--lora-rank", type=int, help="train a LoRA adapter of this rank, not the whole model")
    parser.add_argument("--batch", type=int, default=1, help="sequences, the same on every rank")
    parser.add_argument("--seq", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--beta", type=float, default=0.1, help="weight of the KL in the loss")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's first weights")
    parser.add_argument("--reference", default="zero3", choices=["zero3", "plain", "adapter"], help="how it is kept")
    parser.add_argument("--offload", choices=["cpu", "nvme"], help="where a zero3 reference's shards wait")
    parser.add_argument("--nvme-path", help="the folder for --offload nvme")
    parser.add_argument("--save-to", help="folder for the trained policy")
    parser.add_argument("--comm-timeout", type=float, default=600.0, help="seconds to wait for the other ranks")
    return parser.parse_args(arguments)


def end_with_the_listener() -> None:
    """Wait until nobody can read standard output any more, then end this process.

    A rank whose launching program was killed would otherwise train on, or wait for other ranks, unseen.
    """
    hung_up = select.poll()
    # Without asking for anything, poll still reports the end of the other side; a file has none.
    hung_up.register(sys.stdout.fileno(), 0)
    hung_up.poll()
    os._exit(1)


if __name__ == "__main__":
    main()
