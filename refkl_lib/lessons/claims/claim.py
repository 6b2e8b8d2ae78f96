"""What a claim under test is made of: a sentence, a measurement, and a judge that sees the figures alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from refkl_lib.units import folded

Verdict = Literal["holds", "holds with a condition", "does not hold"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
HOLDS, CONDITION, FAILS = VERDICTS

Figures = dict[str, Any]
GB = 10**9  # the article counts in these


@dataclass(frozen=True)
class Claim:
    """A sentence of the article, and how it is tested.

    `measure` runs what it takes and returns figures by name: bytes, nats, seconds, or a bare count. `judge` makes a
    verdict of figures, and `shows` the line that says which of them decide; they see nothing else, so that both can be
    asked about figures that nobody measured. `lesson` is a notebook of the course, and a heading in it. `ranks` says
    that it takes real ranks, which need Linux.
    """

    id: str  # the article's section, and the place there: "A1"
    name: str  # in three words or so, for a picture
    says: str
    lesson: str  # a link from the folder of the notebooks: "02_full_clone.ipynb#The-whole-bill"
    measure: Callable[[], Figures]
    judge: Callable[[Figures], Verdict]
    shows: Callable[[Figures], str]
    ranks: bool = False

    def examine(self) -> "Finding":
        """Measure, and return the figures with what they say of this claim."""
        return Finding(self, self.measure())


@dataclass(frozen=True, repr=False)
class Finding:
    """A claim and the figures that were measured for it."""

    claim: Claim
    figures: Figures

    @property
    def verdict(self) -> Verdict:
        """Return what the claim's judge makes of the figures."""
        return self.claim.judge(self.figures)

    @property
    def number(self) -> str:
        """Return the figures that decide, in a line."""
        return self.claim.shows(self.figures)

    def __repr__(self) -> str:
        start = f"{self.claim.id}  {self.verdict:<22}  "
        return folded(start + self.number, indent=len(start))


def within(value: float, said: float, tolerance: float = 0.1) -> bool:
    """Tell whether a figure is the one that was said, give or take a share of it."""
    return abs(value - said) <= tolerance * abs(said)
