"""All claims of the article, and the table that testing them makes."""

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

from refkl_lib.lessons.claims import choosing, cloning, diverging, sharding, switching
from refkl_lib.lessons.claims.claim import VERDICTS, Claim, Finding, Verdict
from refkl_lib.units import WIDTH

SECTIONS = {
    "A": "Full fine-tuning: clone the model",
    "B": "PEFT: switch the adapter off",
    "C": "DeepSpeed ZeRO-3: load it again",
    "D": "The KL",
    "E": "Which one",
}
_CLAIMS = (*cloning.CLAIMS, *switching.CLAIMS, *sharding.CLAIMS, *diverging.CLAIMS, *choosing.CLAIMS)


def article_claims(*ids: str) -> tuple[Claim, ...]:
    """Return the claims of the article in its order: all, or those with these ids; "B" stands for its whole section.

    Raises ValueError for an id that there is not.
    """
    known = {claim.id for claim in _CLAIMS} | SECTIONS.keys()
    if unknown := [id for id in ids if id not in known]:
        raise ValueError(f"there is no claim {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return tuple(claim for claim in _CLAIMS if not ids or claim.id in ids or claim.id[0] in ids)


@dataclass(frozen=True, repr=False)
class Findings:
    """Claims that were tested, in order; as text a table."""

    rows: tuple[Finding, ...]

    @classmethod
    def of(cls, claims: Iterable[Claim], tell: Callable[[Finding], object] = lambda finding: None) -> Self:
        """Test claims one after the other, and return what was found; `tell` is called with each as it comes."""
        rows = []
        for claim in claims:
            rows.append(claim.examine())
            tell(rows[-1])
        return cls(tuple(rows))

    def __getitem__(self, id: str) -> Finding:
        """Return what was found of one claim. Raises KeyError if it was not tested."""
        return {row.claim.id: row for row in self.rows}[id]

    @property
    def counts(self) -> dict[Verdict, int]:
        """Return how many claims have each verdict."""
        return {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in VERDICTS}

    @property
    def summary(self) -> str:
        """Return the counts as a sentence."""
        holds, condition, fails = self.counts.values()
        return f"Of {len(self.rows)} claims {holds} hold, {condition} hold with a condition, {fails} do not hold."

    def __repr__(self) -> str:
        """Return the table as text: claim, verdict, what was measured, and the lesson."""
        return "\n".join([*map(_lines, self.rows), self.summary])


def _lines(row: Finding) -> str:
    below = textwrap.wrap(f"{row.number} ({row.claim.lesson.partition('.')[0]})", WIDTH)
    return "\n".join([f"{row.claim.id}  {row.verdict:<22}  {row.claim.says}", *(f"    {line}" for line in below)])
