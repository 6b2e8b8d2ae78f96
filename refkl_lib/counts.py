"""Counts that are given: ranks, steps, sequences, tokens."""


def check_counts(least: int = 1, why: str = "", **counts: object) -> None:
    """Raise ValueError for a count that is no whole number, or less than `least`."""
    for name, count in counts.items():
        if type(count) is not int or count < least:  # True is an int, and no count
            because = f": {why}" if why else ""
            raise ValueError(f"{name} is {count!r}, but must be a whole number, at least {least}{because}")
