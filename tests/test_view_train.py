"""TrainPanel: its buttons while a training runs, what it leaves, and that nothing goes on; the numbers in pictures."""

import asyncio
import base64
import re
import signal
import threading
import time
from functools import wraps

import pytest
import torch

from refkl_lib import TrainPanel, TrainRun, add_lora, create_reference, frontier, load_model, load_tokenizer
from refkl_lib.memory.ledger import OWNERS
from refkl_lib.tensors import storage_bytes
from refkl_lib.train.records import Record
from refkl_lib.units import MIB
from refkl_lib.view.train_figures import frontier_figure, readout_html, train_figure

PNG = b"\x89PNG\r\n"


def make(strategy="adapter", beta=1.0, sync_every=None, reward=len):
    torch.manual_seed(0)
    policy = add_lora(load_model("pocket"), rank=4)
    options = {"beta": beta, "sync_every": sync_every, "group": 2, "new_tokens": 4}
    reference = create_reference(policy, strategy)
    return TrainRun(policy, reference, load_tokenizer("pocket"), ["ab"], reward, **options)


def trained(panel):
    return asyncio.run(panel.train())


async def until(so):
    started = time.monotonic()
    while not so():
        assert time.monotonic() - started < 60
        await asyncio.sleep(0.01)


def face(thing):
    data, metadata = thing._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(PNG)
    assert metadata["image/png"]["alt"] == data["text/plain"]
    return data


def endless(**options):
    return TrainPanel(make, iterations=10_000, **options)


def in_a_kernel(test):
    """Run a test as a cell that may await."""

    @wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


def test_a_training_is_shown_and_is_the_one_without_a_panel():
    panel = TrainPanel(make, iterations=3, beta=0.5)
    before = panel.readout.value
    run = trained(panel)
    assert run is panel.run
    assert run.history == make(beta=0.5).train(3).history
    assert panel.readout.value != before
    panel.stop()  # of what is done already says nothing
    assert "Done: 3 iterations." in panel.status.value


def test_memory_is_weighed_in_every_fifth_iteration_from_the_second_on():
    panel = TrainPanel(make, iterations=8)
    run = trained(panel)
    assert [*panel.peaks] == [1, 6]
    moments = 2 * sum(weight.nbytes for weight in run.trained.values())
    for peak in panel.peaks.values():
        assert peak["policy"] == storage_bytes(run.policy)
        assert peak["activations"] > 0
        assert moments <= peak["optimizer"] < 1.1 * moments  # and the counters of steps


def test_what_is_chosen_is_made():
    panel = TrainPanel(make, iterations=2)
    panel.strategy.value, panel.beta.value, panel.sync_every.value = "clone", 2.0, 1
    run = trained(panel)
    assert (run.reference.strategy, run.sync_every, run.history[0].beta) == ("clone", 1, 2.0)
    assert panel.peaks[1]["reference"] > 0


@in_a_kernel
async def test_the_start_button_returns_at_once_and_stop_ends_it():
    panel = endless()
    start, _, stop = panel.buttons
    start.click()
    assert panel.run.history == []
    await until(lambda: len(panel.run.history) > 1)
    stop.click()
    assert "Stopping after this iteration" in panel.status.value
    assert 1 < len((await panel.wait()).history) < 10_000


@in_a_kernel
async def test_a_stop_right_after_the_start_is_heard():
    panel = endless()
    panel.start()
    panel.stop()
    assert (await panel.wait()).history == []


@in_a_kernel
async def test_pause_holds_it_and_pause_again_lets_it_go_on():
    panel = endless()
    panel.start()
    _, pause, _ = panel.buttons
    await until(lambda: panel.run.history)
    pause.click()
    assert "Pausing after this iteration" in panel.status.value
    await until(lambda: "Paused: iteration" in panel.status.value)
    held = len(panel.run.history)
    await asyncio.sleep(0.2)
    assert len(panel.run.history) == held
    pause.click()
    await until(lambda: len(panel.run.history) > held)
    pause.click()
    panel.stop()  # a paused training can be stopped
    await panel.wait()


@in_a_kernel
async def test_after_a_pause_that_was_stopped_the_next_training_runs():
    panel = TrainPanel(make, iterations=2)
    panel.start()
    panel.pause()
    panel.stop()
    await panel.wait()
    assert len((await panel.train()).history) == 2


@in_a_kernel
async def test_beta_moves_while_it_runs():
    panel = endless(beta=1.0)
    panel.start()
    await until(lambda: panel.run.history)
    panel.beta.value = 5.0
    await until(lambda: panel.run.history[-1].beta == 5.0)
    panel.stop()
    assert (await panel.wait()).history[0].beta == 1.0


def interrupting(**chosen):
    """A run that a Ctrl-C reaches in the midst of its third iteration."""
    scored = []

    def reward(text):
        scored.append(text)
        if len(scored) == 5:
            signal.raise_signal(signal.SIGINT)
        return len(text)

    return make(**chosen, reward=reward)


@in_a_kernel
async def test_an_interrupt_ends_the_training_and_is_raised_where_it_is_waited_for():
    panel = TrainPanel(interrupting, iterations=10_000)
    with pytest.raises(KeyboardInterrupt):
        await panel.train()
    assert len(panel.run.history) == 2
    assert "Interrupted: 2 iterations." in panel.status.value


@in_a_kernel
async def test_an_interrupt_ends_a_training_of_the_start_button_and_nothing_else():
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as an idle kernel does
    try:
        panel = TrainPanel(interrupting, iterations=10_000)
        panel.buttons[0].click()
        await until(lambda: "Interrupted: 2 iterations." in panel.status.value)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, ignored)


@in_a_kernel
async def test_a_click_that_another_thread_hears_trains_in_the_kernels_own():
    trained_in = []

    def reward(text):
        trained_in.append(threading.current_thread())
        return len(text)

    panel = TrainPanel(lambda **chosen: make(**chosen, reward=reward), iterations=2)
    await asyncio.to_thread(panel.buttons[0].click)
    await panel.wait()
    assert {*trained_in} == {threading.main_thread()}


@in_a_kernel
async def test_the_end_of_the_block_ends_the_training(capsys):
    with endless() as panel:
        panel.start()
        await until(lambda: panel.run.history)
    ended = len(panel.run.history)
    await panel.wait()
    assert len(panel.run.history) == ended
    assert "Live" in capsys.readouterr().out
    assert panel._watched.layout.display == "none"
    assert panel.widget.layout.display is None  # the panel itself can still be shown


def test_an_error_of_the_training_is_shown_and_raised():
    panel = TrainPanel(lambda **chosen: make(**chosen, reward=lambda text: float("nan")), iterations=2)
    with pytest.raises(ValueError, match=r"the reward of the text .* is nan"):
        trained(panel)
    assert re.search('role="alert".*ValueError: the reward of the text', panel.status.value)


@in_a_kernel
async def test_an_error_of_the_making_is_shown_and_raised():
    def spoiled(**chosen):
        raise ValueError("no such model")

    panel = TrainPanel(spoiled)
    with pytest.raises(ValueError, match="no such model"):
        panel.start()
    assert 'role="alert"' in panel.status.value
    panel.buttons[0].click()
    assert panel.buttons[0].disabled is False


@in_a_kernel
async def test_a_second_start_is_refused_while_one_runs():
    panel = endless()
    panel.start()
    with pytest.raises(RuntimeError, match="running already: stop it first"):
        panel.start()
    panel.stop()
    await panel.wait()


def test_waiting_for_nothing_is_named():
    with pytest.raises(RuntimeError, match="nothing was started"):
        asyncio.run(TrainPanel(make).wait())


def test_a_start_where_no_loop_runs_is_named():
    with pytest.raises(RuntimeError, match=r"no event loop runs here.*asyncio\.run\(panel\.train\(\)\)"):
        TrainPanel(make).start()


def test_a_panel_has_a_face_before_and_after():
    panel = TrainPanel(make, iterations=2)
    before = face(panel)
    assert "application/vnd.jupyter.widget-view+json" in before
    trained(panel)
    after = face(panel)
    assert after["text/plain"] == before["text/plain"]
    assert after["image/png"] != before["image/png"]


# Pictures


def history(*reward_and_kl, sample="ab\ncd"):
    return [Record(at, 1.0, reward, kl, 3.0, -kl, sample) for at, (reward, kl) in enumerate(reward_and_kl)]


PEAKS = {at: dict.fromkeys(OWNERS, 0) | {"policy": 2 * MIB, "activations": at * MIB} for at in (1, 3)}


def test_the_picture_has_every_curve_and_the_texts():
    figure = train_figure(history((5.0, 0.0), (9.0, 2.0)), PEAKS)
    assert figure.get_suptitle() == "beta 1: reward 5.0 → 9.0, KL 0.0 → 2.0 nats"
    assert [list(axes.lines[0].get_ydata()) for axes in figure.axes[:3]] == [[5.0, 9.0], [0.0, 2.0], [0.0, -2.0]]
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "mean reward of a text",
        "KL, nats a text",
        "loss",
        "MiB at the peak",
    ]
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_y(), bar.get_height()) for bar in figure.axes[3].patches]
    assert bars == [(1, 0, 2), (3, 0, 2), (1, 2, 1), (3, 2, 3)]
    assert figure.get_supxlabel() == "iteration 0: “ab⏎cd”\niteration 1: “ab⏎cd”"


def test_a_text_that_the_font_cannot_draw_is_drawn_without_a_warning(recwarn):
    figure = train_figure(history((5.0, 0.0), sample="a字\x02$x_{$"), {})
    assert "“a��$x_{$”" in figure.get_supxlabel()
    figure.canvas.draw()
    assert [str(warning.message) for warning in recwarn] == []


def test_a_picture_of_nothing_says_so():
    assert [text.get_text() for text in train_figure([], {}).texts] == ["no iteration yet"]


def test_the_frontier_is_a_line_of_means_for_each_run():
    runs = {"beta 0": history((0, 0), (3, 3), (6, 6), (9, 9)), "beta 1": history((0, 0), (3, 0), (3, 3))}
    axes = frontier_figure(runs).axes[0]
    ways = [[list(line.get_xdata()), list(line.get_ydata())] for line in axes.lines[::2]]
    assert ways == [[[3, 6], [3, 6]], [[1], [2]]]
    assert [text.get_text() for text in axes.texts] == ["beta 0", "beta 1"]
    assert "beta 0, beta 1" in face(frontier(runs))["text/plain"]


@pytest.mark.parametrize("runs", [{}, {"short": [1, 2]}, {name: [1, 2, 3] for name in "abcde"}])
def test_a_frontier_that_cannot_be_drawn_is_named(runs):
    with pytest.raises(ValueError, match="a picture shows 1 to 4"):
        frontier_figure(runs)


def test_the_readout_has_the_last_values_and_no_markup_of_the_texts():
    html = readout_html(history((5.0, 0.0), (9.0, 2.0), sample="<b>$"), PEAKS)
    for shown in (
        "mean reward of a text: <b>9.00</b>",
        "KL, nats a text: <b>2.00</b>",
        "memory at the peak: <b>5.0 MiB</b>",
    ):
        assert shown in html
    assert "“&lt;b&gt;$”" in html
    assert "2.0,55.0 182.0,5.0" in html  # from the lowest left to the highest right
