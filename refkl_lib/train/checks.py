"""What can be trained with, and what cannot: each error names the thing, its value and the way out."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from refkl_lib.reference.base import Reference
from refkl_lib.reference.mix import check_alpha
from refkl_lib.step import checked_beta

Penalty = Literal["k1", "k2", "k3", "exact"]
Place = Literal["loss", "reward"]
LEAST = {
    "group": (2, "a text is judged by the mean of its group"),
    "new_tokens": (1, "it counts the tokens of a text"),
    "sync_every": (1, "it counts iterations, and None is never"),
}


def check_run(run: Any) -> None:
    """Raise TypeError or ValueError for the first setting of a `TrainRun` that cannot be trained with."""
    if not run.trained:
        raise ValueError("no weight of the policy requires grad, so nothing would train: add_lora gives it an adapter")
    if not isinstance(run.reference, Reference):
        raise TypeError(
            f"reference is a {type(run.reference).__name__}, which is none: make one with create_reference(policy, …)"
        )
    if not callable(run.reward):
        raise TypeError(f"reward is {run.reward!r}, but must be a function that takes a text and returns a number")
    _check_prompts(run.prompts, run.tokenizer)
    for name, choices in (("kl", get_args(Penalty)), ("place", get_args(Place))):
        if getattr(run, name) not in choices:
            raise ValueError(f"{name} is {getattr(run, name)!r}, but must be one of {choices}")
    if run.ratio and (run.place, run.kl) not in [("loss", estimator) for estimator in ("k1", "k2", "k3")]:
        raise ValueError(
            f"ratio=True weights an estimate in the loss, but kl is {run.kl!r} and place is {run.place!r}: leave it out"
        )
    for name, (least, why) in LEAST.items():
        value = getattr(run, name)
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}, but must be at least {least}: {why}")
    if not 0 < run.learning_rate < math.inf:
        raise ValueError(f"learning_rate is {run.learning_rate}, but must be positive and finite, like 1e-3")
    check_alpha(run.alpha)
    if run.sync_every and run.reference.strategy == "adapter" and (run.alpha != 1 or not run.reference.held()):
        run.reference.sync(run.policy, run.alpha)  # it says why it cannot, now and not after many iterations
    checked_beta(run.beta)


def checked_reward(reward: Any, text: str) -> float:
    """Return the reward as a float. Raises TypeError if it is no number, ValueError if it is not finite."""
    try:
        number = float(reward)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the reward of the text {text!r} is {reward!r}, but must be a number") from error
    if not math.isfinite(number):
        raise ValueError(f"the reward of the text {text!r} is {number}: return a finite number for every text, also ''")
    return number


def _check_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    if isinstance(prompts, str):
        raise TypeError(f"prompts is the text {prompts!r}, but must be a list of texts: [{prompts!r}]")
    if not prompts:
        raise ValueError("prompts is empty: give the policy at least one text to go on from")
    for prompt in prompts:
        if not tokenizer(prompt).input_ids:
            raise ValueError(f"the prompt {prompt!r} has no token: give the policy a text to go on from")
