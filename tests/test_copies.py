"""`deepcopy` of a policy that real ranks share: what is made, what it can do, and what it does to the original."""

import sys
from typing import Any

import pytest
from replay import COPIES, kept

from refkl_lib.models import load_model
from refkl_lib.ranks import copies
from refkl_lib.ranks.copies import NOT_TRIED, SUCCEEDS, CopyOutcome, copy_under_zero3
from refkl_lib.ranks.launch import Heard, run_ranks
from refkl_lib.tensors import storage_bytes

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="real ranks need Linux"),
    pytest.mark.usefixtures("nothing_left"),
]

EMPTY = "AssertionError: Padding_idx must be within num_embeddings"
STRANGE = "AttributeError: 'Parameter' object has no attribute 'ds_status'"
NOT_PICKLED = "TypeError: cannot pickle 'torch._C._distributed_c10d.ProcessGroup' object"
POISONED = ("AttributeError: 'Parameter' object has no attribute 'ds_id'", "IndexError: pop from an empty deque")
WELL = (SUCCEEDS, SUCCEEDS)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each rank tells of a copy."""
    told: list[dict[str, Any]] = []

    def heard(*arguments: Any) -> Heard:
        heard = run_ranks(*arguments)
        told.extend(event for event in heard.events if event["event"] == "done")
        return heard

    monkeypatch.setattr(copies, "run_ranks", heard)
    return told


def outcome_of(what: Any, gathered: bool) -> CopyOutcome:
    """What notebook 08 saw in the browser, where it tried this one, or else what is seen here."""
    seen = [outcome for outcome in kept(COPIES) or () if (outcome.what, outcome.gathered) == (what, gathered)]
    return seen[0] if seen else copy_under_zero3(what, gathered=gathered)


@pytest.mark.parametrize(
    ("what", "gathered", "whole", "forward", "original"),
    [
        ("model", False, False, EMPTY, WELL),
        ("model", True, True, SUCCEEDS, WELL),
        ("engine.module", False, False, STRANGE, POISONED),
        ("engine.module", True, True, STRANGE, POISONED),
    ],
    ids=["model", "gathered-model", "module", "gathered-module"],
)
def test_a_copy_is_made_without_a_word_whatever_it_is_worth(
    what: Any,
    gathered: bool,
    whole: bool,
    forward: str,
    original: tuple[str, str],
    told: list[dict[str, Any]],
) -> None:
    model = load_model("pocket", device="cpu")
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    outcome = outcome_of(what, gathered)
    assert outcome.copied == SUCCEEDS
    assert outcome.shapes
    for name, shape in outcome.shapes.items():
        assert shape == (model.get_parameter(name).shape if whole else (0,))
    assert outcome.copy_bytes == (storage_bytes(model) if whole else buffers)
    assert outcome.original_bytes < 0.51 * storage_bytes(model)
    assert outcome.forward == forward
    assert outcome.original == original
    assert outcome.same_logits is (True if forward == SUCCEEDS else None)
    facts = [{name: fact for name, fact in event.items() if name not in ("rank", "at")} for event in told]
    if facts or (what, gathered) == ("engine.module", True):  # which no notebook tries
        assert facts == [facts[0]] * 2


def test_an_engine_cannot_be_copied_and_goes_on() -> None:
    assert copy_under_zero3("engine", ranks=1) == CopyOutcome(
        what="engine",
        gathered=False,
        ranks=1,
        copied=NOT_PICKLED,
        shapes={},
        copy_bytes=0,
        original_bytes=storage_bytes(load_model("pocket", device="cpu")),
        forward=NOT_TRIED,
        original=WELL,
        same_logits=None,
    )


def test_it_is_the_copys_forward_pass_that_breaks_the_original() -> None:
    outcome = copy_under_zero3("engine.module", forward=False)
    assert (outcome.copied, outcome.forward, outcome.original) == (SUCCEEDS, NOT_TRIED, WELL)


def test_it_shows_in_a_few_lines() -> None:
    outcome = CopyOutcome("model", True, 2, SUCCEEDS, {"w": (5, 2)}, 2**20, 2**19, SUCCEEDS, WELL, True)
    assert repr(outcome).splitlines() == [
        "with GatheredParameters(…): deepcopy(model), 2 ranks",
        "  the copy: succeeds",
        "  its w: shape (5, 2)",
        "  a rank holds: 1.0 MiB, of the original 0.5 MiB",
        "  its forward pass: succeeds, with the original's logits",
        "  the original's next passes: succeeds",
    ]
    outcome = CopyOutcome("engine", False, 2, NOT_PICKLED, {}, 0, 2**19, NOT_TRIED, POISONED, None)
    assert repr(outcome).splitlines() == [
        "deepcopy(engine), 2 ranks",
        f"  the copy: {NOT_PICKLED}",
        f"  the original's next passes: {POISONED[0]}; then {POISONED[1]}",
    ]


def test_what_cannot_be_copied_is_refused() -> None:
    with pytest.raises(ValueError, match="what is 'optimizer', but must be one of"):
        copy_under_zero3("optimizer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ranks is 0"):
        copy_under_zero3("model", ranks=0)
