"""The network is off in every Python that has this folder on its PYTHONPATH: kernels, ranks, scripts.

Only this machine can be reached. Python imports a module of this name when it starts; an audit hook sees each
connection, whichever library makes it.
"""

import errno
import sys
from typing import Any

LOCAL = ("localhost", "127.", "::1", "0.0.0.0")


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise OSError for a connection to another machine."""
    if event not in ("socket.connect", "socket.sendto"):
        return
    address = arguments[1]
    # A local socket of Unix is addressed by a path.
    if isinstance(address, tuple) and not str(address[0]).startswith(LOCAL):
        raise OSError(errno.ENETUNREACH, f"the network is off in tests: nothing may be asked of {address[0]}")


sys.addaudithook(refuse)
