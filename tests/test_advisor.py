"""Advice: the path through the tree, what it is made of, and the command that prints it."""

import subprocess
import sys
from dataclasses import replace

import pytest
from checkout import ROOT
from conftest import OFFLINE

from refkl_lib import Advice, advise, known_models, price
from refkl_lib.advisor import ways
from refkl_lib.advisor.__main__ import main
from refkl_lib.advisor.article import AMPLE, LARGE, rule_for
from refkl_lib.advisor.changes import KINDS
from refkl_lib.advisor.tree import FIRST, LADDERS, step_of, walk
from refkl_lib.advisor.ways import WAYS, Option, Run
from refkl_lib.memory.shapes import _shapes, config_of
from refkl_lib.reference import STRATEGIES
from refkl_lib.units import GIB, MIB, WIDTH

MODEL = "Qwen2.5-0.5B"
FULL, LORA = {"lora_rank": None}, {"lora_rank": 16}


def advice_at(memory: float, **run) -> Advice:
    """Advice for a model, a small one unless told, on GPUs of so many GiB."""
    return advise(**{"model": MODEL, "seq": 64, "device_memory": int(memory * GIB)} | run)


def needed(way: str, **run) -> int:
    """What a way needs with headroom, in bytes."""
    [option] = [option for option in advice_at(80, **run).options if option.way.name == way]
    assert option.fit is not None
    return option.fit.needed


# The tree


def test_every_strategy_is_a_way():
    assert {way.arguments["strategy"] for way in WAYS.values()} == set(STRATEGIES)


def test_every_way_is_at_the_end_of_one_question():
    ends = [question.way.name for ladder in LADDERS.values() for question in ladder]
    assert sorted(ends) == sorted(WAYS)


@pytest.mark.parametrize(
    ("run", "way"),
    [
        ({}, "clone"),
        ({"ranks": 4}, "clone"),
        (LORA, "adapter"),
        (LORA | {"ranks": 4}, "adapter"),
    ],
)
def test_with_ample_memory_the_simplest_way_is_taken(run, way):
    assert advice_at(80, **run).recommended == way


@pytest.mark.parametrize(
    ("run", "tight", "way"),
    [
        ({"ranks": 8}, "clone", "zero3"),
        ({"host_memory": 64 * GIB}, "clone", "swap"),
        ({"fixed_data": True}, "clone", "precomputed"),
        ({"host_memory": 64 * GIB, "fixed_data": True}, "clone", "swap"),
        ({}, "clone", None),
        (LORA | {"ranks": 8, "model": "Qwen2.5-7B"}, "adapter", "adapter, zero3"),
        (LORA | {"ranks": 8}, "adapter", "adapter, zero3"),
        (LORA | {"ranks": 8, "seq": 2048}, "adapter", None),  # whole logits are more than is shared
        (LORA, "adapter", None),
    ],
)
def test_a_byte_short_of_it_the_next_way_is_taken(run, tight, way):
    threshold = needed(tight, **run)
    assert advice_at(threshold / GIB, **run).recommended == tight
    assert advice_at(0, **run | {"device_memory": threshold - 1}).recommended == way


def test_host_memory_must_hold_what_waits():
    memory = needed("clone") - 1
    waiting = sum(advice_at(80).bills["swap"].host.values())
    assert waiting > 0
    run = {"seq": 64, "device_memory": memory}
    assert advise(MODEL, **run, host_memory=waiting).recommended == "swap"
    short = advise(MODEL, **run, host_memory=waiting - 1)
    assert short.recommended is None
    assert "of host memory needed" in short.path[3].because


def test_the_path_says_what_decided_it():
    between = (needed("zero3", ranks=8) + needed("clone", ranks=8)) // 2
    path = advice_at(between / GIB, ranks=8).path
    assert [answer.question for answer in path] == [FIRST, *(q.text for q in LADDERS[False][: len(path) - 1])]
    assert [answer.yes for answer in path[1:]] == [False] * (len(path) - 2) + [True]
    assert "too much" in path[1].because
    assert "to spare" in path[-1].because
    alone = advice_at(5).path
    assert alone[2].because == "there is one rank"
    assert len(alone) == 1 + len(LADDERS[False])
    assert [answer.yes for answer in advice_at(80, **LORA).path] == [True, True]


def test_only_the_path_is_priced(monkeypatch):
    asked = []
    monkeypatch.setattr(ways, "priced", lambda model, arguments: asked.append(arguments) or price(model, **arguments))
    advice = advice_at(80, ranks=8)
    assert [arguments["strategy"] for arguments in asked] == ["clone"]
    assert advice.recommended == "clone"
    asked.clear()
    assert set(advice.bills) == {"clone", "zero3", "swap", "precomputed"}
    assert len(asked) == 4


def test_what_was_priced_before_is_not_priced_again(monkeypatch):
    before = repr(advice_at(6, ranks=4))
    monkeypatch.setattr(ways, "price", None)
    assert repr(advice_at(6, ranks=4)) == before
    with pytest.raises(TypeError):
        advice_at(6, ranks=4, seq=65)


def test_equal_configurations_share_a_bill_and_different_ones_do_not(monkeypatch):
    run = {"seq": 64, "device_memory": 80 * GIB}
    one = advise(config_of(MODEL), **run)
    assert one.bills["clone"] is advise(config_of(MODEL), **run).bills["clone"]
    deeper = config_of(MODEL)
    deeper.num_hidden_layers += 4
    deeper.layer_types = [*deeper.layer_types, *deeper.layer_types[:4]]
    assert advise(deeper, **run).bills["clone"].peak > one.bills["clone"].peak


# Bills


def test_bills_are_those_of_price():
    advice = advice_at(80, ranks=8, checkpointing=True, **LORA)
    same = {"seq": 64, "ranks": 8, "lora_rank": 16, "dtype": "mixed", "checkpointing": True}
    assert advice.bills["clone"] == price(MODEL, "clone", **same)
    assert advice.bills["adapter, zero3"] == price(MODEL, "adapter", ds_config={}, **same)
    assert set(advice.bills) == {"clone", "adapter", "zero3", "adapter, zero3", "precomputed"}


def test_what_fits_is_listed_whether_recommended_or_not():
    advice = advice_at(80, ranks=8, fixed_data=True, host_memory=64 * GIB)
    assert advice.fitting == ("clone", "zero3", "swap", "precomputed")
    assert advice_at(80).fitting == ("clone",)


# What would change it


def test_a_small_change_comes_before_a_large_one():
    memory = needed("clone", batch=16, seq=512) - 1
    advice = advise(MODEL, device_memory=memory, batch=16, seq=512)
    assert advice.recommended is None
    first, second = advice.changes[:2]
    assert first.what == "with gradient checkpointing"
    assert second.what == "at batch 8"  # not 4 or 1, with which it would fit as well
    assert first.option.way.name == second.option.way.name == "clone"


def test_each_change_is_enough_and_the_next_smaller_is_not():
    advice = advice_at(needed("zero3", ranks=4) / GIB)
    assert len(advice.changes) >= 2
    for change in advice.changes:
        assert change.option.usable
        assert walk(change.option.run)[1] is not None
    [ranks] = [change.option.run.ranks for change in advice.changes if "ranks" in change.what]
    assert ranks == 4
    assert Option(replace(advice.run, ranks=ranks), WAYS["zero3"]).usable
    assert not Option(replace(advice.run, ranks=ranks // 2), WAYS["zero3"]).usable


def test_the_host_memory_that_would_be_enough_is_named():
    between = (needed("clone") + needed("swap")) // 2
    advice = advise(MODEL, seq=64, device_memory=between)
    [change] = [change for change in advice.changes if "host memory" in change.what]
    assert change.option.way.name == "swap"
    assert change.option.run.host_memory == sum(advice.bills["swap"].host.values())


def test_where_one_change_is_not_enough_they_come_together():
    [change] = advise("Qwen2.5-7B", device_memory=24 * GIB, lora_rank=16, batch=8, seq=2048).changes
    assert change.what.startswith("with gradient checkpointing, at batch ")
    assert change.option.way.name == "adapter"


def test_where_the_best_way_fits_there_is_nothing_to_change():
    assert advice_at(80).changes == advice_at(80, **LORA).changes == ()


def test_no_change_makes_room_on_a_gpu_that_is_far_too_small():
    advice = advise(MODEL, device_memory=64 * MIB, checkpointing=True)
    assert advice.recommended is None
    assert advice.changes == ()
    assert advice.reason.startswith("Nothing fits. Nearest is ")
    assert advice.reason.endswith(" too much.")


def test_kinds_of_changes_need_less_and_less():
    run = advice_at(4, batch=8).run
    for kind in KINDS:
        peaks = [Option(after, WAYS["zero3" if after.ranks > 1 else "clone"]).fit for _, after in kind.of(run)[:3]]
        fits = [fit.needed for fit in peaks if fit is not None]
        assert fits == sorted(fits, reverse=True)


def test_steps_count_down_a_ladder():
    run = advice_at(80, **LORA).run
    assert [step_of(Option(run, WAYS[name])) for name in ("clone", "zero3", "swap", "precomputed")] == [0, 1, 2, 3]
    assert [step_of(Option(run, WAYS[name])) for name in ("adapter", "adapter, zero3")] == [0, 1]
    assert step_of(None) == 4


# The article


@pytest.mark.parametrize(
    ("parameters", "memory", "way", "rank"),
    [
        (LARGE + 1, 8 * GIB, "zero3", None),
        (LARGE, AMPLE, "clone", None),
        (LARGE, AMPLE - 1, "adapter", 16),
        (10**9, 80 * GIB, "clone", None),
        (10**9, 24 * GIB, "adapter", 16),
    ],
)
def test_the_rule_of_the_article(parameters, memory, way, rank):
    run = Run(MODEL, memory, 1, 0, False, advice_at(80).run.settings)
    rule = rule_for(run, parameters)
    assert rule.option.way.name == way
    assert rule.option.run.settings["lora_rank"] == rank


def test_where_the_article_differs_it_stands_beside_with_its_bill():
    advice = advise("Qwen2.5-7B", device_memory=80 * GIB, ranks=8)
    assert advice.differs
    assert not advice.rule.option.usable
    assert str(advice.rule) in repr(advice).replace("\n   ", " ")
    agreed = advise("Qwen2.5-1.5B", device_memory=80 * GIB)
    assert not agreed.differs
    assert "The article" not in repr(agreed)


# As a text


def test_advice_reads_as_a_table_a_path_and_a_reason():
    text = repr(advise("Qwen/Qwen2.5-7B", device_memory=80 * GIB, ranks=8, checkpointing=True))
    assert text.startswith("Qwen/Qwen2.5-7B, 7.62 billion parameters, all weights\n8 GPUs of 80.00 GiB, ")
    assert "checkpointing" in text.splitlines()[1]
    for name in WAYS:
        assert f"\n{name} " in text
    assert f"\n1. {FIRST} No: all weights do.\n" in text
    assert "\nzero3: load the model again, partitioned over the ranks. It fits: " in text
    assert "What would change it:\n- " in text


@pytest.mark.parametrize("run", [{}, {"host_memory": GIB}, {"lora_rank": 16}])
def test_a_text_fits_a_narrow_window(run):
    assert max(map(len, repr(advise("Qwen/Qwen2.5-7B", device_memory=200 * GIB, **run)).splitlines())) <= WIDTH


# What is refused


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"device_memory": 80}, r"device_memory is 80, but must be a whole number of bytes: write 80 \* 2\*\*30"),
        ({"device_memory": 80.0 * GIB}, "device_memory is 85899345920.0"),
        ({"host_memory": -1}, "host_memory is -1"),
        ({"ranks": 0}, "ranks is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"seq": 1}, "seq is 1"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"attention": "flash"}, "attention is 'flash'"),
        ({"targets": "no_such_layer", "lora_rank": 4}, "no_such_layer"),
    ],
)
def test_an_argument_that_cannot_work_is_named(run, message):
    with pytest.raises(ValueError, match=message):
        advise(MODEL, **{"device_memory": 80 * GIB} | run)


def test_a_model_that_is_none_is_named():
    with pytest.raises(TypeError, match="model is a int"):
        advise(7, device_memory=80 * GIB)  # type: ignore[arg-type]


# In a terminal


def test_the_command_prints_the_same():
    """With the network off."""
    options = "--gpus 8 --memory 16 --lora 8 --batch 2 --seq 64 --host-memory 0.5 --fixed-data --optimizer adamw8bit"
    run = subprocess.run(
        [sys.executable, "-m", "refkl_lib.advisor", MODEL, "--checkpointing", *options.split()],
        cwd=ROOT,
        env={"PYTHONPATH": str(OFFLINE), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    same = advise(
        MODEL,
        device_memory=16 * GIB,
        ranks=8,
        host_memory=GIB // 2,
        fixed_data=True,
        lora_rank=8,
        batch=2,
        seq=64,
        optimizer="adamw8bit",
        checkpointing=True,
    )
    assert run.stderr == ""
    assert run.returncode == 0
    assert run.stdout == f"{same}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nobody/nothing", "--memory", "80"], 1, "error: 'nobody/nothing' is not a model whose shapes are known here"),
        ([MODEL, "--memory", "80", "--gpus", "0"], 1, "error: ranks is 0"),
        ([MODEL, "--memory", "0"], 1, "error: device_memory is 0"),
        ([MODEL, "--memory", "nan"], 2, "'nan' is no number of GiB: write 80, say"),
        ([MODEL], 2, "the following arguments are required: --memory"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, status, message, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's client waits longer before each of its tries
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(arguments))
    said = capsys.readouterr()
    assert ended.value.code == status
    assert said.out == ""
    assert message in said.err


# The shapes


def test_it_is_written_down_what_each_shape_was_compared_with():
    for name, entry in _shapes().items():
        assert entry["compared_with"], name
        assert set(entry["not_compared"]) <= entry["config"].keys()
    compared = sum(not entry["not_compared"] for entry in _shapes().values())
    assert 2 * compared == len(known_models())  # "half of them", says the docstring of known_models
