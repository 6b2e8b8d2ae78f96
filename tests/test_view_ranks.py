"""RanksPanel: what it shows of a job while that runs, and the picture that it leaves."""

import pytest

from refkl_lib import RanksPanel
from refkl_lib.view.ranks import ranks_figure, ranks_html

MIB = 2**20
HALF = {"policy": MIB, "reference": MIB, "activations": 0}
FULL = {"policy": MIB, "reference": MIB, "activations": 2 * MIB}


def said(rank, event, at, **facts):
    return {"rank": rank, "event": event, "at": at, **facts}


def job():
    for rank in (0, 1):
        yield said(rank, "started", 100.0 + rank, pid=1)
        yield said(rank, "memory", 102.0 + rank, owners=HALF)
        yield said(rank, "memory", 103.0 + rank, owners=FULL)
        yield said(rank, "step", 103.5 + rank, step=0, kl=0.25, seconds=1.0)
        yield said(rank, "memory", 104.0 + rank, owners=HALF)
        yield said(rank, "done", 105.0 + rank, peak={**FULL, "activations": 3 * MIB})


def test_a_job_is_kept_as_a_timeline_for_each_rank_and_its_exact_peak():
    panel = RanksPanel(ranks=2)
    for event in job():
        panel.hear(event)
    assert panel.timelines[0] == [(2.0, HALF), (3.0, FULL), (4.0, HALF)]
    assert panel.timelines[1] == [(3.0, HALF), (4.0, FULL), (5.0, HALF)]
    assert sum(panel.peaks[1].values()) == 5 * MIB


def test_a_rank_without_a_bar_is_named():
    with pytest.raises(ValueError, match="ranks is 0"):
        RanksPanel(ranks=0)
    with pytest.raises(ValueError, match="rank 2 has no bar"):
        RanksPanel(ranks=2).hear(said(2, "memory", 1.0, owners=HALF))


def test_it_writes_at_most_four_times_a_second_and_at_the_end(monkeypatch):
    now = iter([0.5, 0.5, *(0.6 for _ in range(100))])
    monkeypatch.setattr("refkl_lib.view.ranks.time.monotonic", lambda: next(now))
    panel, written = RanksPanel(ranks=1), []
    panel.widget.observe(lambda change: written.append(change["new"]), "value")
    for count in range(1, 20):
        panel.hear(said(0, "memory", 100.0 + count, owners={"policy": count * MIB}))
    assert len(written) == 1
    panel.hear(said(0, "done", 130.0, peak={"policy": 19 * MIB}))
    assert len(written) == 2
    assert written[1].count("19.0 MiB") == 2


def test_a_bar_is_as_wide_as_its_share_of_the_highest_peak():
    html = ranks_html({0: HALF, 1: {}}, {0: FULL, 1: {}}, {0: "step 0", 1: "<not started>"})
    assert html.count("width:25.0%") == 2
    assert "&lt;not started&gt;" in html
    assert "2.0 MiB" in html
    assert "4.0 MiB" in html


def test_each_rank_has_a_strip_with_its_peak_and_all_have_one_legend():
    figure = ranks_figure({0: [(0.0, HALF), (1.0, FULL)], 1: [(0.0, HALF)]}, {0: FULL, 1: HALF})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["rank 0: peak 4.0 MiB", "rank 1: peak 2.0 MiB"]
    [legend] = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {"policy", "reference", "activations"}
    assert len(figure.axes[0].collections) == 3


def test_a_job_that_said_nothing_is_still_a_picture():
    data, _ = RanksPanel(ranks=2)._repr_mimebundle_()
    assert data["text/plain"] == RanksPanel.alt
