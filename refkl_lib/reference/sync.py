"""Let the reference follow the policy, slowly or now and then.

A reference that never moves holds a long training back; one that moves at every step restrains nothing,
since the KL is measured to where the policy just was. Hence a share `alpha` and a period `every`
(the defaults are TRL's; the idea is TR-DPO's, arXiv 2404.09656).

    trainer = Trainer(..., callbacks=[SyncRefModelCallback(reference, alpha=0.6, every=512)])
"""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from refkl_lib.reference.base import Reference
from refkl_lib.reference.mix import check_alpha


class SyncRefModelCallback(TrainerCallback):
    """Calls `reference.sync(policy, alpha)` after every `every`-th optimizer step of a `Trainer`.

    Raises ValueError if `alpha` is not in [0, 1] or `every` is less than 1.
    """

    def __init__(self, reference: Reference, alpha: float = 0.6, every: int = 512) -> None:
        check_alpha(alpha)
        if every < 1:
            raise ValueError(f"every is {every}, but it counts optimizer steps: 1 or more")
        self.reference = reference
        self.alpha = alpha
        self.every = every

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Sync if the step that just ended is a multiple of `every`."""
        if state.global_step % self.every == 0:
            self.reference.sync(model, self.alpha)
