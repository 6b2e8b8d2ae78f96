"""A small policy-gradient loop with a leash: the reward goes up, and the policy stays near its reference.

    policy = add_lora(load_model("smollm2"), rank=8)
    reference = create_reference(policy, "adapter")
    run = TrainRun(policy, reference, load_tokenizer("smollm2"), ["My best friend"], reward=len, beta=1.0)
    run.train(20)             # after Ctrl-C, the same line goes on where it stopped
    run.save("run.pt")        # and so it does after run.load("run.pt"), in another process too

In each iteration the policy writes a group of texts for every prompt. A text's advantage is its reward less the mean of
its group: GRPO (arXiv 2402.03300), without its divisions by deviation and length (arXiv 2503.20783). One step of AdamW
then makes more probable what was better than its group. What grows is

    mean reward of a text - beta · KL(policy‖reference) of a text, in nats

so beta is the price of a nat, in units of the reward.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refkl_lib.kl.estimators import importance_weights, kl_loss
from refkl_lib.kl.exact import exact_kl
from refkl_lib.kl.log_probs import token_log_probs
from refkl_lib.reference.base import Reference
from refkl_lib.step import checked_beta
from refkl_lib.tensors import tensors_of
from refkl_lib.train.checks import Penalty, Place, check_run, checked_reward
from refkl_lib.train.records import Record, kl_and_entropy
from refkl_lib.train.resume import dice, read_checkpoint, unbroken, write_checkpoint
from refkl_lib.train.texts import Texts, write_texts

SETTINGS = ("prompts", "kl", "place", "ratio", "group", "new_tokens", "learning_rate", "sync_every", "alpha", "seed")


def group_loss(
    logits: Tensor,
    ref_logits: Tensor,
    texts: Texts,
    rewards: Tensor,
    beta: float,
    kl: Penalty = "k2",
    place: Place = "loss",
    ratio: bool = False,
) -> Tensor:
    """Return the loss, a scalar: logits (B, L, V), rewards (P, G) for groups of G texts to each of P prompts."""
    log_probs, ref_log_probs = (token_log_probs(one, texts.tokens) for one in (logits, ref_logits))  # (B, L)
    ones = importance_weights(log_probs, log_probs, texts.mask)  # each 1 has the gradient of its token's log-prob
    if kl == "exact":
        nats = exact_kl(logits, ref_logits, texts.mask, "sequence")  # (B,)
    else:
        weights = ones if ratio else None
        nats = kl_loss(log_probs, ref_log_probs, kl, texts.mask, "sequence", weights=weights)
    if place == "reward":
        rewards = rewards - beta * nats.detach().view_as(rewards)
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()  # (B,)
    gains = advantages * ones.sum(1)
    return (beta * nats - gains if place == "loss" else -gains).mean()


@dataclass(eq=False, repr=False)
class TrainRun:
    """A training of what requires grad in `policy`, with a `Record` in `history` for each iteration so far.

    `reward` takes a text, without its prompt, and returns a number. The penalty `kl` acts in the `place` "loss" or
    "reward"; with `ratio` the loss weights an estimate by 1s that carry a gradient (what is right where: `kl_loss`).
    For each prompt a `group` of texts of up to `new_tokens` tokens is written. With `sync_every`, the reference moves
    towards the policy by `alpha` after every so many iterations. `beta` may be changed while it runs.
    The same arguments give the same run, on one machine. Raises ValueError or TypeError for what cannot work.
    """

    policy: PreTrainedModel
    reference: Reference
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    reward: Callable[[str], float]
    _: KW_ONLY
    beta: float = 0.1
    kl: Penalty = "k2"
    place: Place = "loss"
    ratio: bool = False
    group: int = 8
    new_tokens: int = 12
    learning_rate: float = 1e-3
    sync_every: int | None = None
    alpha: float = 1.0
    seed: int = 0
    history: list[Record] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.trained = {name: weight for name, weight in self.policy.named_parameters() if weight.requires_grad}
        check_run(self)
        self.prompts = [*self.prompts]
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=self.learning_rate, weight_decay=0.0)
        self._stopped = threading.Event()

    def train(self, iterations: int, on_record: Callable[[Record], object] = lambda record: None) -> Self:
        """Go on until the history has `iterations` records, each of which is told to `on_record`.

        `stop` ends it after the present iteration, Ctrl-C at once. Both leave the run as it was after its last record.
        """
        self._stopped.clear()
        while len(self.history) < iterations and not self._stopped.is_set():
            on_record(self.step())
        return self

    def stop(self) -> None:
        """Let `train` return after the present iteration; any thread may ask."""
        self._stopped.set()

    def step(self, watch: AbstractContextManager[object] | None = None) -> Record:
        """Make one iteration and return its record. Raises ValueError if the loss is not finite; then nothing moves.

        `watch`, a ledger say, is entered while the policy learns from its texts, not while it writes them.
        """
        beta = checked_beta(self.beta)
        with dice(self.seed, len(self.history)):
            texts = write_texts(self.policy, self.tokenizer, self.prompts, self.group, self.new_tokens)
            rewards = torch.tensor([checked_reward(self.reward(words), words) for words in texts.words])
            with nullcontext() if watch is None else watch:
                return self._learn(texts, rewards, beta)

    def _learn(self, texts: Texts, rewards: Tensor, beta: float) -> Record:
        # The reference first: under ZeRO-3 no other pass may come between the policy's and its backward.
        ref_logits = self.reference.logits(**texts.inputs)[:, :-1]
        logits = self.policy(**texts.inputs).logits[:, :-1]
        groups = rewards.to(logits).view(len(self.prompts), self.group)
        loss = group_loss(logits, ref_logits, texts, groups, beta, self.kl, self.place, self.ratio)
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [weight.grad for weight in self.trained.values() if weight.grad is not None]
        iteration = len(self.history)
        if not all(value.isfinite().all() for value in (loss, *gradients)):
            raise ValueError(
                f"loss {loss.item()} or its gradient is not finite in iteration {iteration}, so no step was taken: "
                f"go back to a checkpoint, and take a learning_rate below {self.learning_rate} or a beta below {beta}"
            )
        kl, entropy = kl_and_entropy(logits.detach(), ref_logits, texts.mask)
        record = Record(iteration, beta, rewards.mean().item(), kl, entropy, loss.item(), texts.words[0])
        with unbroken():
            self.optimizer.step()
            self.history.append(record)
            if self.sync_every and len(self.history) % self.sync_every == 0:
                self.reference.sync(self.policy, self.alpha)
        return record

    def save(self, file: str | Path) -> None:
        """Write to one file, whole or not at all, what `load` needs: all that has moved, and the history.

        Raises ValueError if the file's folder does not exist.
        """
        write_checkpoint(file, self._state())

    def load(self, file: str | Path) -> Self:
        """Go back to what was saved. What followed then follows again, as each iteration has dice of its own.

        Raises FileNotFoundError if there is no such file, ValueError if it is of other settings or weights, or no
        checkpoint; then nothing has changed.
        """
        here = self._state()
        saved = read_checkpoint(file, like=here)
        for name, weight in here["weights"].items():
            weight.copy_(saved["weights"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.beta, self.history = saved["beta"], [Record(**record) for record in saved["history"]]
        return self

    def _state(self) -> dict[str, Any]:
        moved = {name: weight.detach() for name, weight in self.trained.items()}
        if self.sync_every:  # a reference that stays is made again from the model, by whoever makes the run
            moved |= {f"reference {place}": weight for place, weight in enumerate(tensors_of(self.reference.held()))}
        return {
            "settings": {name: getattr(self, name) for name in SETTINGS},
            "weights": moved,
            "optimizer": self.optimizer.state_dict(),
            "beta": self.beta,
            "history": [asdict(record) for record in self.history],
        }
