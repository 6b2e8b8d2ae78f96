"""The leaderboard of notebook 07: the best reward within a leash, kept on this machine."""

from refkl_lib.lessons import store
from refkl_lib.lessons.exercise import Text
from refkl_lib.train.run import TrainRun

NATS = 10.0  # a text may be this far from the reference, at the end
LAST = 3  # iterations of which the mean counts


def enter(name: str, run: TrainRun) -> Text:
    """Enter a run under a name, in place of the name's earlier one, and return the leaderboard.

    What counts is the mean reward over the last three iterations, if their mean KL is at most 10 nats a text.
    Raises ValueError for an empty name, or a run of fewer than three iterations.
    """
    if not name.strip():
        raise ValueError("name is empty, but the leaderboard shows one: yours, or what you tried")
    if len(run.history) < LAST:
        raise ValueError(f"the run has {len(run.history)} iterations, but the last {LAST} count: train it further")
    last = run.history[-LAST:]
    reward, kl = (sum(getattr(record, field) for record in last) / LAST for field in ("reward", "kl"))
    place = f"{run.kl} in the {run.place}"
    settings = f"beta {last[-1].beta:g}, {place}, rate {run.learning_rate:g}, {len(run.history)} iterations"
    with store.changed() as progress:
        progress["runs"][name] = {"reward": reward, "kl": kl, "settings": settings}
    return leaderboard()


def leaderboard() -> Text:
    """Return the runs that were entered, the best first; those beyond the leash come last."""
    runs = store.load()["runs"]
    ranked = sorted(runs.items(), key=lambda item: (item[1]["kl"] > NATS, -item[1]["reward"]))
    width = max([len("name"), *map(len, runs)])
    lines = [f"{'':>2}  {'name':<{width}}  reward  KL, nats  settings"]
    for place, (name, run) in enumerate(ranked, 1):
        number = "–" if run["kl"] > NATS else str(place)
        lines.append(f"{number:>2}  {name:<{width}}  {run['reward']:6.1f}  {run['kl']:8.1f}  {run['settings']}")
    return Text("\n".join(lines))
