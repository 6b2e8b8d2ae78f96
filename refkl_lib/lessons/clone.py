"""The exercises of notebook 02: the copy itself, how it follows the policy, and the bytes that it costs."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from refkl_lib.lessons.exercise import Case, Exercise, Mistake, WrongFormError
from refkl_lib.tensors import storage_bytes, storages_of


# --------------------------------------------------------------------------------------------- 02.clone
def create_reference_model(model: nn.Module) -> nn.Module:
    """Return a frozen copy of `model` in evaluation mode; the model stays as it was."""
    # Deep: a shallow copy would be a second module around the same weights, and train with the policy.
    reference = copy.deepcopy(model)
    # Both are done to the copy alone, so the policy goes on training, with its dropout.
    return reference.requires_grad_(False).eval()


CLONE_FACTS = (
    "the copy is a module of its own",
    "its weights are stored apart from the policy's",
    "it holds the policy's weights and buffers",
    "what is tied in the policy is tied in it",
    "none of its weights requires grad",
    "each of its modules is in evaluation mode",
    "the policy's weights train as before",
    "the policy's modules are in the modes they were in",
)


class _Tied(nn.Module):
    """What a copy can get wrong: tied weights, buffers, dropout; with one part frozen if asked for."""

    def __init__(self, table: Tensor, frozen: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(table.detach().clone(), freeze=False)
        self.norm = nn.BatchNorm1d(table.shape[1]).requires_grad_(not frozen)
        self.norm.running_mean = self.embed.weight.detach().mean(0)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(table.shape[1], table.shape[0], bias=False)
        self.head.weight = self.embed.weight


def _ask_clone(function: Callable[[nn.Module], Any], table: Tensor, frozen: bool) -> Tensor:
    policy = _Tied(table, frozen)
    values = {name: value.clone() for name, value in policy.state_dict().items()}
    flags, modes = _flags(policy), _modes(policy)
    made = function(policy)
    if not isinstance(made, nn.Module):
        raise WrongFormError(f"your function returned a {type(made).__name__}; it must return a module: the copy.")
    theirs = made.state_dict()
    facts = (
        made is not policy,
        not storages_of(made).keys() & storages_of(policy).keys(),
        theirs.keys() == values.keys() and all(torch.equal(theirs[name], values[name]) for name in values),
        len(storages_of(made)) == len(storages_of(policy)),
        not any(_flags(made)),
        not any(_modes(made)),
        _flags(policy) == flags,
        _modes(policy) == modes,
    )
    return torch.tensor(facts).to(table)


def _flags(model: nn.Module) -> list[bool]:
    return [weight.requires_grad for weight in model.parameters()]


def _modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def _frozen_in_place_of_the_copy(model: nn.Module) -> nn.Module:
    reference = copy.deepcopy(model)
    model.requires_grad_(False)
    return reference.eval()


CLONE = Exercise(
    id="02.clone",
    idea=(
        "copy.deepcopy: new storages for all weights and buffers; what was tied in the model is tied in its copy.",
        "requires_grad_(False), on the copy: none of its weights trains, and those of the policy still do.",
        "eval(), on the copy: no dropout in what it says, and the policy keeps its own.",
    ),
    solution=create_reference_model,
    oracle=lambda table, frozen: torch.ones(len(CLONE_FACTS)),
    draw=lambda generator: (torch.randn(5, 3, generator=generator), False),
    by_hand=Case(
        "a model with tied weights, a batch norm and dropout, which trains",
        (torch.arange(15.0).view(5, 3), False),
        torch.ones(len(CLONE_FACTS)),
    ),
    hard=(Case("a model of which a part is frozen", (torch.arange(15.0).view(5, 3), True)),),
    keeps_gradient=False,
    ask=_ask_clone,
    facts=CLONE_FACTS,
    imports="import copy\n\nfrom torch import nn",
    mistakes=(
        Mistake(1, "the policy itself, which trains, so the KL stays 0", lambda model: model),
        Mistake(1, "the policy itself, frozen, so nothing trains", lambda model: model.requires_grad_(False).eval()),
        Mistake(
            1,
            "a shallow copy, copy.copy: a second module around the same weights",
            lambda model: copy.copy(model).requires_grad_(False).eval(),
        ),
        Mistake(2, "a copy without requires_grad_(False), which trains", lambda model: copy.deepcopy(model).eval()),
        Mistake(
            2,
            "requires_grad_(False) on the policy before it is copied",
            lambda model: copy.deepcopy(model.requires_grad_(False)).eval(),
        ),
        Mistake(2, "requires_grad_(False) on the policy in place of the copy", _frozen_in_place_of_the_copy),
        Mistake(3, "a copy without eval()", lambda model: copy.deepcopy(model).requires_grad_(False)),
        Mistake(
            3,
            "eval() on the policy before it is copied",
            lambda model: copy.deepcopy(model.eval()).requires_grad_(False),
        ),
        Mistake(3, "a deep copy and no more", copy.deepcopy),
    ),
    hints=(
        "What does the copy share with the model, if only the outer module is copied?",
        "First make the copy. Then call two methods on it, and none on the model.",
        "Return copy.deepcopy(model).requires_grad_(False).eval().",
    ),
)


# ---------------------------------------------------------------------------------------------- 02.sync
def synced(policy: Tensor, reference: Tensor, alpha: float) -> Tensor:
    """Return a reference weight moved towards the policy's by the share alpha, as a new tensor without a gradient."""
    # lerp, not r + alpha·(p - r): with alpha = 1 it gives the policy's weight to the last digit.
    # Detached: the reference takes over the policy's numbers, not the way in which they came about.
    return torch.lerp(reference, policy.detach(), alpha)


SYNC = Exercise(
    id="02.sync",
    idea=(
        "ref ← (1 - alpha)·ref + alpha·policy: alpha is the policy's share.",
        "Written as ref + alpha·(policy - ref) it rounds: a difference of numbers far apart loses the smaller.",
        "The reference is frozen: what it becomes is a number, and carries no gradient.",
    ),
    solution=synced,
    oracle=lambda policy, reference, alpha: (1 - alpha) * reference.double() + alpha * policy.double(),
    draw=lambda generator: (*(torch.randn(2, 3, generator=generator) for _ in range(2)), 0.6),
    by_hand=Case(
        "a policy of 3, a reference of 1, and alpha 0.25",
        (torch.tensor([3.0]), torch.tensor([1.0]), 0.25),
        torch.tensor([1.5]),
    ),
    hard=(
        Case(
            "a policy of 1e-9, a reference of 1, and alpha 1",
            (torch.tensor([1e-9]), torch.tensor([1.0]), 1.0),
            torch.tensor([1e-9]),
            atol=0.0,
        ),
    ),
    keeps_gradient=False,
    mistakes=(
        Mistake(1, "alpha the wrong way round, as the reference's share", lambda p, r, alpha: synced(r, p, alpha)),
        Mistake(1, "a copy of the policy, without alpha", lambda p, r, alpha: p.detach().clone()),
        Mistake(1, "a sum: the reference keeps all of its own", lambda p, r, alpha: r + alpha * p.detach()),
        Mistake(1, "the policy's share alone", lambda p, r, alpha: alpha * p.detach()),
        Mistake(1, "the reference as it was", lambda p, r, alpha: r.clone()),
        Mistake(2, "ref + alpha·(policy - ref), which rounds", lambda p, r, alpha: r + alpha * (p.detach() - r)),
        Mistake(3, "the right numbers, not detached", lambda p, r, alpha: torch.lerp(r, p, alpha)),
    ),
    hints=(
        "What should come out for alpha = 0? And for alpha = 1?",
        "torch.lerp(start, end, weight) gives start at 0 and end at 1. Which of the two models is the start?",
        "Detach the policy, and return torch.lerp(reference, policy.detach(), alpha).",
    ),
)


# --------------------------------------------------------------------------------------------- 02.bytes
def bytes_of(tensors: list[Tensor]) -> int:
    """Return the bytes of the storages behind `tensors`, each storage once."""
    # The address of the storage, not of the tensor: a view that begins further on has an address of its own.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    # The size of the storage, not of the tensor: a row keeps its whole matrix in memory.
    return sum(storage.nbytes() for storage in storages.values())


def _some_tensors(matrix: Tensor, row_alone: bool) -> list[Tensor]:
    matrix = matrix.detach().clone()
    return [matrix[1]] if row_alone else [matrix, matrix, matrix[1], matrix.bfloat16()]


def _ask_bytes(function: Callable[[list[Tensor]], Any], matrix: Tensor, row_alone: bool) -> Tensor:
    count = function(_some_tensors(matrix, row_alone))
    if not isinstance(count, int):
        raise WrongFormError(f"your function returned a {type(count).__name__}; bytes are counted: return an int.")
    return torch.tensor(count).to(matrix)


def _once(tensors: list[Tensor]) -> list[Tensor]:
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in reversed(tensors)}.values())


BYTES = Exercise(
    id="02.bytes",
    idea=(
        "Tied weights and views lie in one storage, and only storages cost memory: count each of them once.",
        "Bytes, not elements: one of float32 has 4, one of bfloat16 has 2.",
        "A view keeps its whole storage in memory, so count what the storage holds.",
    ),
    solution=bytes_of,
    oracle=lambda matrix, row_alone: torch.tensor(storage_bytes(_some_tensors(matrix, row_alone))),
    draw=lambda generator: (torch.randn(3, 4, generator=generator), False),
    by_hand=Case(
        "a 2 by 3 matrix of float32, itself once more, its second row, and its copy in bfloat16",
        (torch.ones(2, 3), False),
        torch.tensor(24.0 + 12.0),
    ),
    hard=(Case("the second row of a 2 by 3 matrix, alone", (torch.ones(2, 3), True), torch.tensor(24.0)),),
    keeps_gradient=False,
    ask=_ask_bytes,
    mistakes=(
        Mistake(1, "every tensor counted, those that share a storage too", lambda ts: sum(t.nbytes for t in ts)),
        Mistake(
            1,
            "every tensor counted once, and a view beside what it is a view of",
            lambda ts: sum(t.nbytes for t in {id(t): t for t in ts}.values()),
        ),
        Mistake(
            1,
            "the whole storage once for each view of it",
            lambda ts: sum({t.data_ptr(): t.untyped_storage().nbytes() for t in ts}.values()),
        ),
        Mistake(2, "elements, not bytes", lambda ts: sum(t.numel() for t in _once(ts))),
        Mistake(2, "four bytes an element, whatever the dtype", lambda ts: sum(4 * t.numel() for t in _once(ts))),
        Mistake(
            3,
            "the bytes of the first view of a storage, not those of the storage",
            lambda ts: sum(t.nbytes for t in _once(ts)),
        ),
        Mistake(
            3,
            "the bytes of the last view of a storage, not those of the storage",
            lambda ts: sum({t.untyped_storage().data_ptr(): t.nbytes for t in ts}.values()),
        ),
    ),
    hints=(
        "How much more memory does a second name for a tensor take? And how much does a row of it take?",
        "tensor.untyped_storage() has a data_ptr(), by which two storages are told apart, and nbytes().",
        "Make a dict of all tensors' storages, {storage.data_ptr(): storage.nbytes()}, and sum its values.",
    ),
)

EXERCISES = (CLONE, SYNC, BYTES)
