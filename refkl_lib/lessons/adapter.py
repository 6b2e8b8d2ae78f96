"""The exercises of notebook 03: a layer with a switch, what an adapter adds, and a pass that leaves no trace."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from refkl_lib.lessons.exercise import Case, Exercise, Mistake, WrongFormError
from refkl_lib.reference.adapter import add_lora
from refkl_lib.reference.base import evaluating

PeftModel = Any  # as a solution calls it; peft itself is for reference/adapter.py alone


# ---------------------------------------------------------------------------------------- 03.lora_layer
def lora_layer(x: Tensor, W: Tensor, A: Tensor, B: Tensor, alpha: float, on: bool) -> Tensor:
    """Return a LoRA layer's output (N, out): x (N, in), W (out, in), A (rank, in), B (out, rank)."""
    y = x @ W.T
    # An `if`, not a factor of 0 or 1: off must be off, also for an adapter that training has broken.
    if on:
        y = y + alpha / A.shape[0] * (x @ A.T @ B.T)
    return y


def _one_matrix(x: Tensor, W: Tensor, A: Tensor, B: Tensor, alpha: float, on: bool) -> Tensor:
    merged = W.double() + alpha / len(A) * B.double() @ A.double()
    return x.double() @ (merged if on else W.double()).T


def _draw_layer(generator: torch.Generator) -> tuple[Any, ...]:
    # Square, so that a product in the wrong order is a wrong number, and can be recognised.
    x, W, A, B = torch.randn(4, 3, 3, generator=generator)
    return x, W, A, B, 6.0, bool(torch.rand((), generator=generator) > 0.5)


X, EYE = torch.tensor([[1.0, 2.0]]), torch.eye(2)
BROKEN = torch.full((1, 2), torch.nan)

LORA_LAYER = Exercise(
    id="03.lora_layer",
    idea=(
        "Off, the layer is x Wᵀ, whatever stands in A and B; on, the adapter's part is added to that.",
        "The adapter's part goes through A first, which has one row for each rank, then through B: x Aᵀ Bᵀ.",
        "It is scaled by alpha / rank.",
    ),
    solution=lora_layer,
    oracle=_one_matrix,
    draw=_draw_layer,
    by_hand=Case(
        "x = (1, 2), W = 1, A of rows (1, 1) and (0, 1), B of rows (0, 1) and (2, 0), and alpha 4, switched on",
        (X, EYE, torch.tensor([[1.0, 1], [0, 1]]), torch.tensor([[0.0, 1], [2, 0]]), 4.0, True),
        torch.tensor([[5.0, 14.0]]),
    ),
    hard=(
        Case("an adapter of NaN, switched off", (X, EYE, BROKEN, BROKEN.T, 4.0, False), X),
        Case("three outputs of two inputs", (X, torch.ones(3, 2), torch.ones(1, 2), torch.ones(3, 1), 4.0, True)),
    ),
    mistakes=(
        Mistake(1, "a switch the wrong way round", lambda x, W, A, B, a, on: lora_layer(x, W, A, B, a, not on)),
        Mistake(1, "a layer without a switch, always on", lambda x, W, A, B, a, on: lora_layer(x, W, A, B, a, True)),
        Mistake(
            1,
            "an adapter in place of the layer, not beside it",
            lambda x, W, A, B, a, on: a / len(A) * x @ A.T @ B.T if on else x @ W.T,
        ),
        Mistake(
            1,
            "a switch that multiplies by 0, and NaN times 0 is NaN",
            lambda x, W, A, B, a, on: x @ W.T + on * a / len(A) * x @ A.T @ B.T,
        ),
        Mistake(2, "B before A", lambda x, W, A, B, a, on: lora_layer(x, W, B, A, a, on)),
        Mistake(2, "an A and a B that are not transposed", lambda x, W, A, B, a, on: lora_layer(x, W, A.T, B.T, a, on)),
        Mistake(3, "an adapter without its scale", lambda x, W, A, B, a, on: lora_layer(x, W, A, B, len(A), on)),
        Mistake(
            3, "alpha as the scale, not alpha / rank", lambda x, W, A, B, a, on: lora_layer(x, W, A, B, a * len(A), on)
        ),
        Mistake(3, "rank / alpha as the scale", lambda x, W, A, B, a, on: lora_layer(x, W, A, B, len(A) ** 2 / a, on)),
    ),
    hints=(
        "What should the layer give for x = (1, 2) if B is 0? And what if it is off?",
        "Begin with x @ W.T. If it is on, add x @ A.T @ B.T, scaled. Which dimension of A is the rank?",
        "Return x @ W.T if it is off, else x @ W.T + alpha / A.shape[0] * (x @ A.T @ B.T).",
    ),
)


# --------------------------------------------------------------------------------------------- 03.share
def adapter_share(weights: list[Tensor], rank: int, base: int) -> float:
    """Return the percentage that trains: LoRA on these weights (out, in), in a model of `base` parameters."""
    # B is (out, rank) and A is (rank, in): a sum of the two sides, where the weight itself is their product.
    adapter = sum(rank * sum(weight.shape) for weight in weights)
    return 100 * adapter / (base + adapter)


def _ask_share(function: Callable[..., Any], shapes: Tensor, rank: int, base: int) -> Tensor:
    weights = [torch.empty(int(outputs), int(inputs)) for outputs, inputs in shapes.tolist()]
    share = function(weights, rank, base)
    if not isinstance(share, (int, float)):
        raise WrongFormError(
            f"your function returned a {type(share).__name__}; it must return a number: the percentage."
        )
    return torch.tensor(share).to(shapes)


def _percentage(adapter: Callable[[int, int, int], int]) -> Callable[..., float]:
    """Return the percentage if an adapter of a rank, beside a weight (out, in), had as many parameters as `adapter`."""

    def share(weights: list[Tensor], rank: int, base: int) -> float:
        count = sum(adapter(rank, *weight.shape) for weight in weights)
        return 100 * count / (base + count)

    return share


def _of_the_base(weights: list[Tensor], rank: int, base: int) -> float:
    return 100 * sum(rank * sum(weight.shape) for weight in weights) / base


SHARE = Exercise(
    id="03.share",
    idea=(
        "LoRA puts two matrices beside a weight (out, in): A is (rank, in), B is (out, rank).",
        "Every weight in the list gets its own pair: sum over them.",
        "The percentage is 100 times the adapter's parameters over all of them: the base's and the adapter's.",
    ),
    solution=adapter_share,
    oracle=lambda shapes, rank, base: 100 * rank * shapes.sum() / (base + rank * shapes.sum()),
    draw=lambda generator: (torch.randint(2, 9, (3, 2), generator=generator).float(), 4, 1000),
    by_hand=Case(
        "weights of 4 by 2 and 2 by 2, rank 1, in a model of 90",
        (torch.tensor([[4.0, 2.0], [2.0, 2.0]]), 1, 90),
        torch.tensor(10.0),
    ),
    keeps_gradient=False,
    ask=_ask_share,
    imports="from torch import Tensor",
    mistakes=(
        Mistake(1, "rank · out · in: the weight itself, rank times", _percentage(lambda r, out, into: r * out * into)),
        Mistake(1, "A alone: B is missing", _percentage(lambda r, out, into: r * into)),
        Mistake(1, "B alone: A is missing", _percentage(lambda r, out, into: r * out)),
        Mistake(1, "two matrices of one size", _percentage(lambda r, out, into: 2 * r * into)),
        Mistake(2, "the first weight alone", lambda weights, rank, base: adapter_share(weights[:1], rank, base)),
        Mistake(3, "the percentage of the base alone", _of_the_base),
        Mistake(
            3, "the percentage that is frozen", lambda weights, rank, base: 100 - adapter_share(weights, rank, base)
        ),
        Mistake(
            3, "a fraction, not a percentage", lambda weights, rank, base: adapter_share(weights, rank, base) / 100
        ),
    ),
    hints=(
        "How many numbers has a matrix (rank, in)? And one (out, rank)?",
        "For one weight it is rank * (out + in), and sum(weight.shape) is out + in. What is the sum to be divided by?",
        "With adapter = sum(rank * sum(w.shape) for w in weights), return 100 * adapter / (base + adapter).",
    ),
)


# ------------------------------------------------------------------------------------ 03.reference_pass
def reference_logits(policy: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits (B, T, V) of the model without its adapter; the policy is as it was afterwards."""
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad(), policy.disable_adapter():
            return policy(**inputs).logits
    # Also after a pass that failed: a policy that has lost its dropout trains on, and nobody notices.
    finally:
        policy.train(was_training)


PASS_FACTS = (
    "the logits are not the policy's own",
    "they are those of the model without its adapter",
    "they are the same when the policy trains, with its dropout",
    "they carry no gradient, even if the inputs require one",
    "afterwards the adapter is on again",
    "afterwards a policy in evaluation mode still is",
    "afterwards a policy in training mode still is",
)


class _FailedError(Exception):
    """What a pass raises that is made to fail."""


def _tiny_policy(inputs: dict[str, Tensor]) -> tuple[PeftModel, Tensor, Tensor]:
    """Return a policy with dropout in its base, and its logits with the adapter off and on."""
    config = LlamaConfig(
        vocab_size=7,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.5,
        initializer_range=0.5,
    )
    base = LlamaForCausalLM(config).eval()
    off = base(**inputs).logits.detach()
    policy = add_lora(base, rank=2, init_lora_weights=False)  # B is not 0: on is not off
    return policy, off, policy(**inputs).logits.detach()


def _ask_pass(function: Callable[..., Any], embeddings: Tensor, fails: bool) -> Tensor:
    inputs = {"inputs_embeds": embeddings.detach().clone().requires_grad_()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy, off, on = _tiny_policy(inputs)
        hook = policy.get_base_model().register_forward_pre_hook(_fail if fails else lambda *_: None)
        passes, as_before = [], []
        for training in (False, True):
            policy.train(training)
            with suppress(_FailedError):
                passes.append(_logits(function(policy, inputs)))
            as_before.append(all(module.training == training for module in policy.modules()))
        hook.remove()
        on_again = torch.equal(policy.eval()(**inputs).logits, on)
    facts = [True] * 4 if fails else _of_the_logits(passes, off, on)
    return torch.tensor([*facts, on_again, *as_before]).to(embeddings)


def _of_the_logits(passes: list[Tensor], off: Tensor, on: Tensor) -> list[bool]:
    evaluated, trained = passes
    return [
        not _close(evaluated, on),
        _close(evaluated, off),
        _close(trained, evaluated),
        not evaluated.requires_grad and not trained.requires_grad,
    ]


def _fail(*_: Any) -> None:
    raise _FailedError


def _logits(got: Any) -> Tensor:
    if not isinstance(got, Tensor):
        raise WrongFormError(f"your function returned a {type(got).__name__}; it must return a tensor: the logits.")
    return got


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, 1e-4, 1e-5)


def _with_the_adapter_on(policy: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    with evaluating(policy), torch.no_grad():
        return policy(**inputs).logits


def _with_a_gradient(policy: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    with evaluating(policy), policy.disable_adapter():
        return policy(**inputs).logits


def _with_dropout(policy: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), policy.disable_adapter():
        return policy(**inputs).logits


def _off_for_good(policy: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    policy.base_model.disable_adapter_layers()
    return _with_the_adapter_on(policy, inputs)


def _put_in_training_mode(policy: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    logits = _with_dropout(policy.eval(), inputs)
    policy.train()
    return logits


def _without_finally(policy: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    was_training = policy.training
    logits = _with_dropout(policy.eval(), inputs)
    policy.train(was_training)
    return logits


REFERENCE_PASS = Exercise(
    id="03.reference_pass",
    idea=(
        "Inside `with policy.disable_adapter():` the policy is its base model; after it the adapter is on again.",
        "The pass is made under torch.no_grad(): whatever the inputs require, nothing of it is differentiated.",
        "The pass is made in evaluation mode; afterwards, also if it failed, the policy has the mode that it had.",
    ),
    solution=reference_logits,
    oracle=lambda embeddings, fails: torch.ones(len(PASS_FACTS)),
    draw=lambda generator: (torch.randn(2, 4, 8, generator=generator), False),
    by_hand=Case("a small policy with dropout", (torch.ones(1, 4, 8).cumsum(1), False), torch.ones(len(PASS_FACTS))),
    hard=(Case("a pass that raises an exception", (torch.ones(1, 4, 8), True)),),
    keeps_gradient=False,
    ask=_ask_pass,
    facts=PASS_FACTS,
    imports="import torch\nfrom peft import PeftModel\nfrom torch import Tensor",
    mistakes=(
        Mistake(1, "a pass with the adapter on: it gives the policy's own logits", _with_the_adapter_on),
        Mistake(1, "an adapter that stays off afterwards", _off_for_good),
        Mistake(2, "a pass without no_grad", _with_a_gradient),
        Mistake(3, "a pass with the policy's dropout", _with_dropout),
        Mistake(
            3,
            "a policy left in evaluation mode: it trains on without dropout",
            lambda policy, inputs: _with_dropout(policy.eval(), inputs),
        ),
        Mistake(3, "a policy put in training mode, whatever its mode was", _put_in_training_mode),
        Mistake(3, "a policy left in evaluation mode when the pass fails", _without_finally),
    ),
    hints=(
        "What does the policy need to be, during the pass, and what after it?",
        "Note policy.training, call policy.eval(), make the pass in two `with` blocks, and set policy.train(noted).",
        "In a try: `with torch.no_grad(), policy.disable_adapter(): return policy(**inputs).logits`; then its finally.",
    ),
)

EXERCISES = (LORA_LAYER, SHARE, REFERENCE_PASS)
