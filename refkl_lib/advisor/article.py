"""The rule of the article that this kit puts to the test, to stand beside the bill."""

from dataclasses import dataclass, replace

from refkl_lib.advisor.ways import WAYS, Option, Run

# "Over 20B parameters: ZeRO-3; else, with ample memory (A100 80 GB): full; else PEFT."
LARGE, AMPLE = 20 * 10**9, 80 * 10**9
LORA_RANK = 16  # where it does not say


@dataclass(frozen=True)
class Rule:
    """What the article would do, and why."""

    because: str
    option: Option

    def __str__(self) -> str:
        """Return both in words, with the bill."""
        what = f"{self.because}, so {self.option.way.name} ({self.option.run.trains})"
        return f"{what}. {'It fits' if self.option.usable else 'It does not fit'}: {self.option.verdict}"


def rule_for(run: Run, parameters: int) -> Rule:
    """Return what the article's rule gives for a run.

    The rule chooses whether all weights train or an adapter; where it says ZeRO-3, that is left to the run.
    """
    rank = run.settings["lora_rank"]
    if parameters > LARGE:
        because, name = "over 20 billion parameters", "zero3"
    elif run.device_memory >= AMPLE:
        because, name, rank = "ample memory (80 GB)", "clone", None
    else:
        because, name, rank = "less than 80 GB", "adapter", rank or LORA_RANK
    return Rule(because, Option(replace(run, settings={**run.settings, "lora_rank": rank}), WAYS[name]))
