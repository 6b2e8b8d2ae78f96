"""Panels: their callbacks, their static faces, and what they leave behind."""

import base64
import re
import threading
from dataclasses import replace

import pytest
import torch

from refkl_lib import MemoryPanel, StrategyPanel, load_model
from refkl_lib.comparison import StrategyRun, bill_table, run_strategy
from refkl_lib.tensors import storage_bytes
from refkl_lib.view.figures import runs_figure, timeline_figure
from refkl_lib.view.mechanisms import three_ways
from refkl_lib.view.memory import COLUMNS, readout_html, timeline_html
from refkl_lib.view.panel import png
from refkl_lib.view.strategy import runs_html

MIB = 2**20
PNG = b"\x89PNG\r\n"
CLONE = StrategyRun(
    strategy="clone",
    lora_rank=8,
    batch=1,
    seq=64,
    ranks=1,
    kl=(0.0, 0.05),
    owners={"policy": 500 * MIB, "reference": 513 * MIB, "gradients": 0, "optimizer": 0, "activations": MIB},
    reference_bytes=513 * MIB,
    step_seconds=1.25,
    reference_seconds=0.25,
)


def face(thing):
    data, metadata = thing._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(PNG)
    assert metadata["image/png"]["alt"] == data["text/plain"]
    return data


# Figures


def test_an_estimated_kl_is_called_one():
    assert replace(CLONE, strategy="precomputed").name == "precomputed, LoRA 8, KL estimated"
    assert "KL estimated" in runs_html([replace(CLONE, strategy="precomputed")])


def test_bars_are_the_bytes_of_the_owners_end_to_end():
    axes = runs_figure([CLONE]).axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [500, 513, 1]
    assert [bar.get_x() for bar in axes.patches] == [0, 500, 1013]
    assert axes.get_yticklabels()[0].get_text() == "clone, LoRA 8"
    assert "KL 0.050" in axes.texts[0].get_text()
    assert "1.2 s a step" in axes.texts[0].get_text()


def test_timeline_marks_the_peak_and_leaves_out_owners_that_never_held_anything():
    timeline = [(0.0, {"policy": MIB, "reference": 0}), (1.0, {"policy": 2 * MIB, "reference": 0})]
    axes = timeline_figure(timeline, {"policy": 2 * MIB, "reference": 0}).axes[0]
    assert axes.get_title(loc="left") == "peak 2.0 MiB"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["policy 2.0 MiB"]
    assert axes.lines[0].get_ydata()[0] == 2


def test_figures_of_nothing_are_still_pictures():
    assert png(runs_figure([])).startswith(PNG)
    assert png(timeline_figure([], {"policy": 0})).startswith(PNG)


def test_the_opening_picture_has_a_text():
    assert "adapter on is the policy" in face(three_ways())["text/plain"]


# MemoryPanel


def test_memory_panel_counts_by_owner_and_leaves_a_picture():
    with MemoryPanel(rate=100) as panel:
        model = panel.own("policy", load_model("pocket"))
        kept = torch.zeros(MIB)
    peak = panel.ledger.peak()
    assert peak["policy"] == storage_bytes(model)
    assert peak["activations"] >= kept.nbytes
    assert face(panel)["text/plain"] == MemoryPanel.alt


def test_memory_panel_needs_a_rate():
    with pytest.raises(ValueError, match="rate is 0"):
        MemoryPanel(rate=0)


def test_memory_panel_ends_its_thread_whatever_ends_the_block():
    before = threading.active_count()

    def fail(error):
        with MemoryPanel(rate=100):
            assert threading.active_count() == before + 1
            raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            fail(error)
        assert threading.active_count() == before


def test_memory_panel_writes_while_the_block_runs():
    with MemoryPanel(rate=100) as panel:
        panel.own("policy", torch.zeros(3 * MIB // 4))
        written = threading.Event()
        panel.widget.observe(lambda change: written.set(), "value")
        assert written.wait(10)
        assert "3.0 MiB" in panel.widget.value


def test_readout_shows_now_and_peak_of_each_owner():
    html = readout_html({"policy": MIB, "<b>": 0}, {"policy": 4 * MIB, "<b>": 0}, "RSS 1 GiB")
    assert "width:25.0%" in html
    assert "1.0 MiB" in html
    assert "4.0 MiB" in html
    assert "<b>" not in html


def test_the_timeline_marks_the_peak_and_stacks_the_owners():
    held = [{"policy": 0, "gradients": 0}, {"policy": MIB, "gradients": 3 * MIB}, {"policy": MIB, "gradients": 0}]
    html = timeline_html(list(zip((2.0, 5.0, 6.0), held, strict=True)))
    assert "4.0 s so far; the peak, 4.0 MiB, was at 3.0 s" in html
    all_of_it, policy = re.findall(r'points="(.*?)"', html)  # the lower area is drawn over the higher one
    assert f" {3 * COLUMNS // 4 + 1},0 " in all_of_it
    assert f" {3 * COLUMNS // 4 + 1},75 " in policy
    assert policy.endswith(f" {COLUMNS},75 {COLUMNS},100")


def test_the_timeline_of_nothing_is_drawn():
    assert "the peak, 0.0 MiB" in timeline_html([(0.0, {"policy": 0})])


# StrategyPanel


@pytest.fixture
def panel():
    return StrategyPanel(model="pocket")


def test_the_button_runs_what_is_chosen_and_adds_a_row_and_a_bar(panel):
    before = panel.picture.value
    panel.strategy.value = "adapter"
    panel.lora_rank.value = 4
    panel.batch.value = 2
    panel.seq.value = 32
    panel.buttons[1].click()
    (run,) = panel.runs
    assert (run.strategy, run.lora_rank, run.batch, run.seq) == ("adapter", 4, 2, 32)
    assert panel.picture.value != before
    assert panel.table.value.count("adapter, LoRA 4") == 1
    assert "Done: adapter, LoRA 4." in panel.status.value
    assert not panel.buttons[1].disabled
    panel.strategy.value = "clone"
    assert panel.run().kl == run.kl
    assert len(panel.runs) == 2


def test_the_button_shows_ranks_at_work(panel, monkeypatch):
    def ranks(strategy, on_event, **options):
        on_event({"rank": 1, "event": "loaded"})
        assert "rank 1: loaded" in panel.status.value
        assert panel.buttons[1].disabled
        return CLONE

    monkeypatch.setattr("refkl_lib.view.strategy.run_strategy", ranks)
    panel.strategy.value = "zero3"
    panel.buttons[1].click()
    assert panel.runs == [CLONE]


def test_a_bill_stands_beside_what_was_measured(panel):
    panel.buttons[0].click()
    assert "Done: clone, LoRA 8, priced." in panel.status.value
    panel.buttons[1].click()
    priced, lived = panel.runs
    inputs = 2 * 64 * 8  # ids and mask, which the run made before its ledger was there
    assert priced.owners == lived.owners | {"activations": lived.owners["activations"] + inputs}
    assert priced.reference_bytes == lived.reference_bytes
    assert panel.table.value.count("clone, LoRA 8") == 2
    pale, *full = (bar for bar in panel.figure().axes[0].patches if bar.get_x() == 0)
    assert pale.get_alpha() < full[0].get_alpha()


def test_shares_are_priced_as_well(panel):
    panel.strategy.value, panel.lora_rank.value, panel.ranks.value = "zero3", None, 4
    four = panel.price()
    panel.ranks.value = 1
    assert four.reference_bytes * 3.9 < panel.price().reference_bytes
    assert four.name == "zero3, all weights, each of 4, priced"
    assert "zero3" in bill_table(panel.runs)


def test_an_error_is_shown_and_raised(panel):
    panel.strategy.value = "adapter"
    panel.lora_rank.value = None
    with pytest.raises(TypeError, match="no adapter to switch off"):
        panel.run()
    assert 'role="alert"' in panel.status.value
    assert "no adapter to switch off" in panel.status.value
    assert panel.runs == []
    panel.buttons[1].click()
    assert not panel.buttons[1].disabled, "a failure must not lock the button"


def test_strategy_panel_has_a_static_face_and_a_live_one(panel):
    data = face(panel)
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"] == face(StrategyPanel(model="pocket", runs=[CLONE]))["text/plain"]


def test_table_has_every_number_of_a_run():
    html = runs_html([CLONE])
    for text in ("clone, LoRA 8", "1 × 64", "513.0 MiB", "1014.0 MiB", "0.000, 0.050", "1.25 s", "0.25 s"):
        assert text in html


# run_strategy


def test_the_bills_are_a_table_with_a_line_for_each_run():
    head, line = bill_table([CLONE]).splitlines()
    assert head.split() == ["policy", "reference", "gradients", "optimizer", "activations", "peak", "KL", "step"]
    held = ["500.0", "MiB", "513.0", "MiB", "0.0", "MiB", "0.0", "MiB", "1.0", "MiB", "1014.0", "MiB"]
    assert line.removeprefix("clone, LoRA 8").split() == [*held, "0.050", "1.2", "s"]
    assert len(head) == len(line)


def test_strategies_agree_on_the_kl_and_differ_in_the_bill():
    clone, adapter = (run_strategy(s, model="pocket", lora_rank=4, seq=32) for s in ("clone", "adapter"))
    assert clone.kl == adapter.kl
    assert clone.kl[0] == 0.0 < clone.kl[1] < clone.kl[2]
    assert adapter.reference_bytes == adapter.owners["reference"] == 0
    assert clone.reference_bytes == clone.owners["reference"] > MIB
    assert clone.peak - adapter.peak == clone.reference_bytes
    assert 0 < clone.reference_seconds < clone.step_seconds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "swop"}, "'swop'"),
        ({"strategy": "clone", "steps": 0}, "steps is 0"),
        ({"strategy": "clone", "seq": 1}, "no token after the first counts"),
        ({"strategy": "clone", "beta": -1.0}, "beta is -1"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run_strategy(model="pocket", **options)
