"""Bytes as people read them."""

MIB, GIB = 2**20, 2**30


def show_bytes(count: int) -> str:
    """Return bytes in MiB, from 1 GiB on in GiB, with the unit: "513.1 MiB"."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
