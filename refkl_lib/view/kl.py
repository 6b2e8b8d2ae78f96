"""Pictures of the KL: its two directions, and the way to it by samples."""

from collections.abc import Mapping

import ipywidgets as widgets
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from refkl_lib.kl.exact import exact_kl
from refkl_lib.view.choice import Slider
from refkl_lib.view.panel import Panel, Picture, image_html, message, plain

POLICY, REFERENCE = "#0072B2", "#E69F00"
ESTIMATOR_STYLES = {"k1": ("#0072B2", "-"), "k2": ("#E69F00", "--"), "k3": ("#009E73", "-.")}
PEAKS, PEAK_WIDTH = (-2.0, 2.0), 0.6
WORDS = torch.linspace(-6, 6, 241, dtype=torch.float64)  # a vocabulary with an order, so that it can be drawn
MEANS = torch.linspace(-4, 4, 81, dtype=torch.float64)


# Two directions


def direction_kls(mean: float, width: float) -> tuple[float, float]:
    """Return (KL(policy‖reference), KL(reference‖policy)) in nats, for the two peaks of `both_directions`."""
    kl, reverse_kl = _both_kls(torch.tensor([mean], dtype=torch.float64), width)
    return kl.item(), reverse_kl.item()


def direction_figure(mean: float, width: float) -> Figure:
    """Return a policy of one peak over a reference of two, beside both directions' KL for every mean.

    `mean` and `width` are the policy's, on a line of 241 words from -6 to 6, where the reference's peaks are at
    ±2 and 0.6 wide. Raises ValueError if `width` is not positive.
    """
    figure = Figure(figsize=(9.0, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_peaks(left, mean, width)
    _draw_directions(right, mean, width)
    return figure


def both_directions(mean: float, width: float) -> Picture:
    """Return what `DirectionPanel` shows for a policy of this mean and width."""
    return Picture(direction_figure(mean, width), DirectionPanel.alt)


class DirectionPanel(Panel):
    """Sliders for `direction_figure`: put one peak over two, and read the KL of both directions."""

    alt = (
        "Left, a policy of one peak over a reference of two. Right, the KL for every mean of a policy of this width: "
        "KL(policy‖reference) and KL(reference‖policy), with the present policy marked on both."
    )

    def __init__(self, mean: float = 2.0, width: float = 0.6) -> None:
        self.mean = _slider("mean", mean, -4.0, 4.0)
        self.width = _slider("width", width, 0.3, 3.0)
        self.readout = widgets.HTML()
        # About what the picture needs in a window of any width, so that nothing below it jumps.
        self.picture = widgets.HTML(layout=widgets.Layout(min_height="min(350px, 23vw)"))
        self.widget = widgets.VBox(
            [self.mean, self.width, self.readout, self.picture], layout=widgets.Layout(max_width="960px")
        )
        for slider in (self.mean, self.width):
            slider.observe(self._refresh, "value")
        self._refresh()

    def figure(self) -> Figure:
        """Return the picture for the sliders' present values."""
        return direction_figure(self.mean.value, self.width.value)

    def _refresh(self, change: object = None) -> None:
        kl, reverse_kl = direction_kls(self.mean.value, self.width.value)
        self.readout.value = message(f"KL(policy‖reference) {kl:.2f} nats, KL(reference‖policy) {reverse_kl:.2f} nats")
        self.picture.value = image_html(self.figure(), self.alt)


def _slider(label: str, value: float, low: float, high: float) -> Slider:
    steps = [round(low + step / 10, 1) for step in range(round((high - low) * 10) + 1)]
    return Slider(label, [(f"{step:.1f}", step) for step in steps], value)


def _peak(mean: float | Tensor, width: float) -> Tensor:
    if not width > 0:
        raise ValueError(f"width is {width}, but a peak must be wider than 0")
    return -((WORDS - mean) / width).square() / 2


def _reference() -> Tensor:
    return torch.logaddexp(*(_peak(mean, PEAK_WIDTH) for mean in PEAKS))


def _both_kls(means: Tensor, width: float) -> tuple[Tensor, Tensor]:
    policy = _peak(means.unsqueeze(-1), width).unsqueeze(0)
    reference = _reference().expand_as(policy)
    return exact_kl(policy, reference, reduction="none")[0], exact_kl(reference, policy, reduction="none")[0]


def _draw_peaks(axes: Axes, mean: float, width: float) -> None:
    words = WORDS.numpy()
    reference, policy = (logits.softmax(-1).numpy() for logits in (_reference(), _peak(mean, width)))
    axes.fill_between(words, reference, color=REFERENCE, alpha=0.45, hatch="//", edgecolor="white", label="reference")
    axes.plot(words, policy, color=POLICY, linewidth=2, label="policy")
    axes.set(xlabel="words, on a line", ylabel="probability", ylim=(0, max(policy.max(), reference.max()) * 1.3))
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", ncols=2)
    plain(axes)


def _draw_directions(axes: Axes, mean: float, width: float) -> None:
    names = ("KL(policy‖reference)", "KL(reference‖policy)")
    styles = ((POLICY, "-", "o"), (REFERENCE, "--", "s"))
    curves, here = _both_kls(MEANS, width), direction_kls(mean, width)
    for name, (color, line, marker), curve, value in zip(names, styles, curves, here, strict=True):
        axes.plot(MEANS.numpy(), curve.numpy(), line, color=color, label=f"{name} {value:.2f}")
        axes.plot([mean], [value], marker, color=color, markeredgecolor="black")
    axes.set(xlabel="mean of the policy", ylabel="nats", yscale="log", ylim=(0.05, 200))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=8.5, loc="upper center")
    plain(axes)


# By samples

RUNNING_ALT = "The mean of the first n samples against n, for each estimator; a line marks the exact KL."


def running_means_figure(estimates: Mapping[str, Tensor], exact: float) -> Figure:
    """Return the mean of the first n of each estimator's samples (N,) against n, with the exact KL as a line.

    Raises ValueError if an estimator has no samples.
    """
    figure = Figure(figsize=(8.2, 3.1), layout="constrained")
    axes = figure.add_subplot()
    for name, samples in estimates.items():
        if samples.dim() != 1 or not samples.numel():
            raise ValueError(f"{name!r} has shape {tuple(samples.shape)}, but must be samples (N,), at least one")
        counts, means = running_means_of(samples)
        color, line = ESTIMATOR_STYLES.get(name, ("#555555", ":"))
        axes.plot(counts, means, line, color=color, label=f"{name} {means[-1]:.2f}")
    axes.axhline(exact, color="black", linewidth=1)
    axes.text(1.01, exact, f"exact {exact:.2f}", transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    axes.set(xscale="log", xlabel="samples", ylabel="mean so far, nats", xlim=(1, None))
    axes.legend(title="mean of all", frameon=False, fontsize=8.5, title_fontsize=8.5)
    plain(axes)
    return figure


def running_means(estimates: Mapping[str, Tensor], exact: float) -> Picture:
    """Return `running_means_figure` as notebook output."""
    return Picture(running_means_figure(estimates, exact), RUNNING_ALT)


def running_means_of(samples: Tensor) -> tuple[list[int], list[float]]:
    """Return some 200 sample counts, evenly spaced on a log scale up to all N, and the mean of the first so many."""
    last = torch.tensor(float(samples.numel()), dtype=torch.float64).log10().item()
    counts = torch.logspace(0, last, 200, dtype=torch.float64).round().long().unique()
    means = samples.double().cumsum(0)[counts - 1] / counts
    return counts.tolist(), means.tolist()
