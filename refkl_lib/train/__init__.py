"""Train with a leash: `run.py` is the loop, to be read first."""
