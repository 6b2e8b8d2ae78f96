import re

import pytest
import torch

from refkl_lib import KLPanel, add_lora, create_reference, exact_kl, load_model, load_tokenizer
from refkl_lib.view.text import DIRECTIONS, TokenByToken, strip_html


@pytest.fixture(scope="module")
def drifted():
    """A policy that has left its reference, and that reference."""
    policy = add_lora(load_model("pocket"), rank=4)
    torch.manual_seed(0)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return policy, create_reference(policy, "adapter")


@pytest.fixture(scope="module")
def batch():
    ids = torch.tensor([[0, 0, *range(70, 82)], [*range(60, 74)]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.fixture
def panel(drifted, batch):
    return KLPanel(*drifted, load_tokenizer("pocket"), batch)


def test_the_numbers_are_those_of_the_library_without_padding(drifted, batch):
    policy, reference = drifted
    text = TokenByToken.of(policy, reference, load_tokenizer("pocket"), batch)
    alone = {"input_ids": batch["input_ids"][:1, 2:]}
    with torch.no_grad():
        p, q = policy(**alone).logits[:, :-1], reference.logits(**alone)[:, :-1]
    assert len(text.tokens) == 11
    torch.testing.assert_close(text.kl(), exact_kl(p, q, reduction="none")[0])
    torch.testing.assert_close(text.kl("exact", DIRECTIONS[1]), exact_kl(q, p, reduction="none")[0])
    ratio = (p.log_softmax(-1) - q.log_softmax(-1))[0].gather(-1, alone["input_ids"][0, 1:, None])[:, 0]
    torch.testing.assert_close(text.kl("k1"), ratio)
    torch.testing.assert_close(text.kl("k1", DIRECTIONS[1]), -ratio)
    (word, probability), *others = text.policy_says[3]
    assert word == load_tokenizer("pocket").decode(p[0, 3].argmax())
    assert probability == pytest.approx(p[0, 3].softmax(-1).max().item())
    assert all(probability >= less for _, less in others)


def test_one_token_predicts_nothing(drifted):
    with pytest.raises(ValueError, match="the text has 1 tokens"):
        TokenByToken.of(*drifted, load_tokenizer("pocket"), {"input_ids": torch.tensor([[5]])})


def test_an_unknown_direction_is_named(panel):
    with pytest.raises(ValueError, match="direction is 'up', but must be one of"):
        panel.text.kl("exact", "up")


def test_every_control_changes_what_is_shown(panel):
    for control, value in ((panel.direction, DIRECTIONS[1]), (panel.measure, "k1"), (panel.place, 7)):
        before = panel.strip.value
        control.value = value
        assert panel.strip.value != before
    kl = panel.text.kl("k1", DIRECTIONS[1])
    assert f"Token 7, <b><code>“{panel.text.tokens[7]}”</code></b>: {kl[7]:.2f} nats" in panel.detail.value
    for word, probability in panel.text.policy_says[7] + panel.text.reference_says[7]:
        assert f"{probability:.1%}" in panel.detail.value, word


def test_a_box_has_its_numbers_as_its_tip_and_one_is_chosen(panel):
    kl = panel.text.kl().tolist()
    boxes = re.findall("<span .*?</span>", strip_html(panel.text, kl, place=4))
    assert [f'title="{value:.2f} nats. policy: ' in box for value, box in zip(kl, boxes, strict=True)] == [True] * 11
    assert ["outline:3px" in box for box in boxes] == [place == 4 for place in range(11)]


def test_below_zero_looks_other_than_above(panel):
    above, below = re.findall("background:#(..)....", strip_html(panel.text, [1.0, -1.0] + [0.0] * 9, 0))[:2]
    assert int(above, 16) < int(below, 16)  # little red in blue, much in orange


def test_markup_in_a_text_stays_text(panel):
    hostile = TokenByToken(
        *(panel.text.ids, ("<b>",) * 11, panel.text.policy, panel.text.reference),
        *([(('"><script>', 0.5),)] * 11 for _ in range(2)),
    )
    html = strip_html(hostile, [0.0] * 11, 0)
    assert "<b>" not in html
    assert "<script>" not in html


def test_its_face_is_the_strip_of_what_is_chosen(panel):
    panel.measure.value = "k3"
    texts = {text.get_text() for text in panel.figure().axes[0].texts}
    assert {f"{value:.2f}" for value in panel.text.kl("k3").tolist()} <= texts
    data, _ = panel._repr_mimebundle_()
    assert data["text/plain"] == KLPanel.alt
    assert "application/vnd.jupyter.widget-view+json" in data
