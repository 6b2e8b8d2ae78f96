"""Log-probs from hidden states, block by block: what grows, what is excluded, and what there is little of."""

import math

import pytest
import torch
from kl_oracle import normal
from test_linear import gradients, head

from refkl_lib import linear_token_log_probs, token_log_probs
from refkl_lib.kl import chunks

CHUNK, BLOCK, VOCABULARY = 3, 4, 18


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(chunks, "_BLOCK_BYTES", 4 * CHUNK * BLOCK)
    monkeypatch.setattr(chunks, "_BLOCK_WORDS", BLOCK)


def words_of_all_blocks(tokens):
    """Token ids (1, T): the first word, the last one, and some between."""
    return torch.linspace(0, VOCABULARY - 1, tokens).long().unsqueeze(0)


def check(hidden, layer, ids):
    """Compare values and all gradients with those of whole logits; return the values."""
    trained = [tensor for tensor in (hidden, *layer.parameters()) if tensor.requires_grad]
    ours, theirs = linear_token_log_probs(hidden, layer, ids, CHUNK), token_log_probs(layer(hidden), ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for our, their in zip(gradients(ours, *trained), gradients(theirs, *trained), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)
    return ours


@pytest.mark.parametrize("tokens", [CHUNK, 1, 0])
def test_a_block_has_few_words_with_few_tokens_too(tokens):
    blocks = list(chunks.blocks_of(torch.zeros(tokens, 6), VOCABULARY))
    assert [words.stop - words.start for words in blocks] == [4, 4, 4, 4, 2]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("step", [0.5, -0.5, 20.0, 1e4 / VOCABULARY])
def test_a_maximum_that_grows_from_block_to_block(trains, step):
    layer = head(1, 6, VOCABULARY, trains=trains)
    with torch.no_grad():
        layer.bias.copy_(step * torch.arange(VOCABULARY))
    check(normal(0, 1, 7, 6).requires_grad_(), layer, words_of_all_blocks(7))


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("excluded", [slice(0, 4), slice(0, 9), slice(4, 8), slice(14, 18), slice(0, 17)])
def test_blocks_of_excluded_words(trains, excluded):
    layer = head(1, 6, VOCABULARY, trains=trains)
    with torch.no_grad():
        layer.bias[excluded] = -math.inf
    ids = words_of_all_blocks(13)
    values = check(normal(0, 1, 13, 6).requires_grad_(), layer, ids)
    assert torch.equal(values == -math.inf, (ids >= excluded.start) & (ids < excluded.stop))


@pytest.mark.parametrize("trains", [False, True])
def test_no_tokens_have_no_log_probs(trains):
    hidden, layer = torch.zeros(2, 0, 4, requires_grad=True), head(0, 4, 5, trains=trains)
    values = linear_token_log_probs(hidden, layer, torch.zeros(2, 0, dtype=torch.long))
    values.sum().backward()
    assert values.shape == (2, 0)
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_of_a_head_only_what_trains_gets_a_gradient(part):
    hidden, layer, ids = normal(0, 1, 7, 6), head(1, 6, VOCABULARY, trains=False), words_of_all_blocks(7)
    getattr(layer, part).requires_grad_()
    check(hidden, layer, ids)
    with torch.no_grad():
        assert not linear_token_log_probs(hidden, layer, ids).requires_grad


@pytest.mark.parametrize("trains", [False, True])
def test_the_backward_pass_can_run_twice(trains):
    hidden, layer = normal(0, 1, 7, 6).requires_grad_(), head(1, 6, VOCABULARY, trains=trains)
    values = linear_token_log_probs(hidden, layer, words_of_all_blocks(7), CHUNK).sum()
    once, twice = (torch.autograd.grad(values, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)
