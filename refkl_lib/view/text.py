"""KLPanel: a real text coloured by its KL, and at each token what both models would have said.

KLPanel(policy, reference, load_tokenizer("smollm2"), sample_batch("smollm2", batch=1, seq=64))
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, Self, get_args

import ipywidgets as widgets
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor, nn

from refkl_lib.kl.estimators import estimate_kl
from refkl_lib.kl.exact import exact_kl
from refkl_lib.kl.log_probs import token_log_probs
from refkl_lib.reference.base import Reference
from refkl_lib.view.choice import Menu, Radios, Slider, named
from refkl_lib.view.panel import Panel
from refkl_lib.view.strip import kl_strip_figure, visible

DIRECTIONS = ("KL(policy‖reference)", "KL(reference‖policy)")
Measure = Literal["exact", "k1", "k2", "k3"]
TOP = 5  # likely tokens to show of each model
Likely = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class TokenByToken:
    """A text under two models: its tokens after the first, and each model's logits in their place, (T-1, V).

    `policy_says` and `reference_says` are the likeliest tokens at each place, with their probabilities.
    """

    ids: Tensor
    tokens: tuple[str, ...]
    policy: Tensor
    reference: Tensor
    policy_says: tuple[Likely, ...]
    reference_says: tuple[Likely, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, policy: nn.Module, reference: Reference, tokenizer: Any, inputs: Mapping[str, Tensor]) -> Self:
        """Run both models over the first sequence of a batch, (B, T), without its padding.

        Raises ValueError if that has fewer than two tokens: nothing would be predicted.
        """
        ids = inputs["input_ids"][:1]
        if (mask := inputs.get("attention_mask")) is not None:
            ids = ids[:, mask[0].bool()]
        if ids.shape[1] < 2:
            raise ValueError(f"the text has {ids.shape[1]} tokens, but the first one that is predicted is the second")
        p = policy(input_ids=ids, use_cache=False).logits[0, :-1].float()
        q = reference.logits(input_ids=ids)[0, :-1].float()
        says = (_likeliest(tokenizer, p), _likeliest(tokenizer, q))
        return cls(ids[0, 1:], tuple(map(tokenizer.decode, ids[0, 1:])), p, q, *says)

    def kl(self, measure: Measure = "exact", direction: str = DIRECTIONS[0]) -> Tensor:
        """Return the KL at each token in nats, (T-1,): the exact one, or an estimate from the token that stands there.

        Raises ValueError for an unknown measure or direction.
        """
        if direction not in DIRECTIONS:
            raise ValueError(f"direction is {direction!r}, but must be one of {DIRECTIONS}")
        p, q = (self.policy, self.reference) if direction == DIRECTIONS[0] else (self.reference, self.policy)
        if measure == "exact":
            return exact_kl(p[None], q[None], reduction="none")[0]
        return estimate_kl(token_log_probs(p, self.ids), token_log_probs(q, self.ids), measure)


def _likeliest(tokenizer: Any, logits: Tensor) -> tuple[Likely, ...]:
    most = logits.softmax(-1).topk(TOP)
    words = ([tokenizer.decode(token) for token in ids] for ids in most.indices)
    return tuple(tuple(zip(said, p, strict=True)) for said, p in zip(words, most.values.tolist(), strict=True))


class KLPanel(Panel):
    """A text, token by token: choose direction and measure, and walk through it with the slider or its arrow keys.

    Both models run once, over the first sequence of `inputs`. `panel.text` has the numbers (`TokenByToken`).
    """

    alt = (
        "A text, token by token: the darker the box, the higher the KL; under it what policy and reference would most "
        "likely have said there, where they differ."
    )

    def __init__(
        self, policy: nn.Module, reference: Reference, tokenizer: Any, inputs: Mapping[str, Tensor], place: int = 0
    ) -> None:
        self.text = TokenByToken.of(policy, reference, tokenizer, inputs)
        self.direction = Radios("direction", named(*DIRECTIONS), DIRECTIONS[0])
        estimates = ((f"{name}, an estimate", name) for name in get_args(Measure)[1:])
        self.measure = Menu("measure", [*named("exact"), *estimates], "exact")
        steps = [(f"{at} {visible(token)}", at) for at, token in enumerate(self.text.tokens)]
        self.place = Slider("token", steps, place)
        self.strip, self.detail = widgets.HTML(), widgets.HTML(layout=widgets.Layout(min_height="190px"))
        chosen = widgets.HBox([self.direction, self.measure], layout=widgets.Layout(flex_flow="row wrap"))
        self.widget = widgets.VBox(
            [chosen, self.strip, self.place, self.detail], layout=widgets.Layout(max_width="960px")
        )
        for control in (self.direction, self.measure, self.place):
            control.observe(self._refresh, "value")
        self._refresh()

    def figure(self) -> Figure:
        """Return the strip for what is chosen now."""
        says = ([first for (first, _), *_ in model] for model in (self.text.policy_says, self.text.reference_says))
        return kl_strip_figure(self.text.tokens, self._kl(), *says)

    def _kl(self) -> Tensor:
        return self.text.kl(self.measure.value, self.direction.value)

    def _refresh(self, change: object = None) -> None:
        kl, place = self._kl(), self.place.value
        self.strip.value = strip_html(self.text, kl.tolist(), place)
        self.detail.value = detail_html(self.text, kl[place].item(), place)


def strip_html(text: TokenByToken, kl: Sequence[float], place: int) -> str:
    """Return the text as HTML: a box for each token, shaded by its KL in nats, with what both models say as its tip."""
    most = max(map(abs, kl)) or 1.0
    boxes = "".join(_box(text, at, value, value / most, at == place) for at, value in enumerate(kl))
    key = f"The darker, the further from 0, at most {most:.2f} nats; orange is below 0. Mean {sum(kl) / len(kl):.2f}."
    return f'<div style="line-height:2;margin:6px 0">{boxes}</div><div role="status">{key}</div>'


def detail_html(text: TokenByToken, kl: float, place: int) -> str:
    """Return what both models would have said at a place, as an HTML table."""
    head = "".join(
        f'<th scope="col" colspan="2" style="text-align:left;padding-right:24px">{who} would say</th>'
        for who in ("the policy", "the reference")
    )
    rows = "".join(
        f"<tr>{''.join(map(_cells, both, [text.tokens[place]] * 2))}</tr>"
        for both in zip(text.policy_says[place], text.reference_says[place], strict=True)
    )
    said = f"Token {place}, <b><code>{escape(_quoted(text.tokens[place]))}</code></b>: {kl:.2f} nats"
    return f'<div role="status">{said}</div><table style="line-height:1.5"><tr>{head}</tr>{rows}</table>'


def _box(text: TokenByToken, place: int, kl: float, shade: float, chosen: bool) -> str:
    fill = colormaps["Blues" if kl >= 0 else "Oranges"](0.85 * abs(shade))
    ink = "#fff" if abs(shade) > 0.78 else "#000"
    frame = "outline:3px solid #D55E00;outline-offset:1px" if chosen else "outline:1px solid #8886"
    tip = "; ".join(
        f"{who}: {', '.join(f'{_quoted(token)} {p:.0%}' for token, p in likely[:3])}"
        for who, likely in (("policy", text.policy_says[place]), ("reference", text.reference_says[place]))
    )
    return (
        f'<span title="{escape(f"{kl:.2f} nats. {tip}")}" style="background:{to_hex(fill)};color:{ink};{frame};'
        f'margin:0 2px;padding:1px 3px;white-space:pre;display:inline-block;line-height:1.4;font-family:monospace">'
        f"{escape(visible(text.tokens[place]))}</span>"
    )


def _cells(likely: tuple[str, float], said: str) -> str:
    token, probability = likely
    mark = " ←" if token == said else ""
    return (
        f"<td><code>{escape(_quoted(token))}</code>{mark}</td>"
        f'<td style="text-align:right;padding-right:24px">{probability:.1%}</td>'
    )


def _quoted(token: str) -> str:
    return f"“{visible(token)}”"
