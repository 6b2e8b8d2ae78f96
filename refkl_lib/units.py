"""Bytes and lines as people read them."""

import textwrap

WIDTH = 88  # characters in a line, what a notebook shows of a window 800 pixels wide

MIB, GIB = 2**20, 2**30


def show_bytes(count: int) -> str:
    """Return bytes in MiB, from 1 GiB on in GiB, with the unit: "513.1 MiB"."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def folded(line: str, indent: int = 3) -> str:
    """Return a line as lines of at most `WIDTH` characters, those after the first `indent` further in."""
    if len(line) <= WIDTH:
        return line
    further_in = " " * (len(line) - len(line.lstrip()) + indent)
    return textwrap.fill(line, WIDTH, subsequent_indent=further_in, break_on_hyphens=False)
