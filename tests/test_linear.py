"""From hidden states: the same numbers as from logits, and never all of the logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kl_oracle import DTYPES, masks, normal, oracle
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from refkl_lib import MemoryLedger, exact_kl, linear_kl, linear_token_log_probs, token_log_probs
from refkl_lib.kl.chunks import blocks_of, chunk_before_head, chunk_for_blocks
from refkl_lib.tensors import tensors_of

INF, NAN = math.inf, math.nan
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
REDUCTIONS = ("mean", "sequence_mean", "sequence", "sum", "none")


def head(seed, hidden, vocabulary, bias=True, dtype=torch.float32, trains=True):
    layer = nn.Linear(hidden, vocabulary, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(normal(seed, vocabulary, hidden, scale=hidden**-0.5))
        if bias:
            layer.bias.copy_(normal(seed + 1, vocabulary, scale=0.5))
    return layer.requires_grad_(trains)


def gradients(value, *tensors):
    """The gradients of a value whose every entry weighs something else."""
    weights = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).view(value.shape)
    return torch.autograd.grad((value * weights).sum(), tensors)


cases = {
    "seed": st.integers(0, 10**6),
    "vocabulary": st.integers(2, 400),
    "mask": masks(),
    "chunk": st.sampled_from([None, 1, 2, 5, 1000]),
    "bias": st.booleans(),
    "options": st.fixed_dictionaries(
        {},
        optional={"softcap": st.just(2.0), "scale": st.just(0.25), "temperature": st.sampled_from([0.5, 3.0])},
    ),
}


def transformed(logits, softcap=None, scale=1.0, temperature=1.0):
    logits = logits * scale
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


@settings(max_examples=80, deadline=None)
@given(**cases, reduction=st.sampled_from(REDUCTIONS), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_linear_kl_is_exact_kl_of_the_logits(seed, vocabulary, mask, chunk, bias, options, reduction, dtype):
    p_hidden, q_hidden = normal(seed, *mask.shape, 6, dtype=dtype), normal(seed + 1, *mask.shape, 4, dtype=dtype)
    p_hidden.requires_grad_()
    p_head, q_head = head(seed + 2, 6, vocabulary, bias, dtype), head(seed + 4, 4, vocabulary, not bias, dtype)
    ours = linear_kl(p_hidden, p_head, q_hidden, q_head, mask, reduction, chunk, **options)
    p, q = (transformed(h, **options) for h in (p_head(p_hidden), q_head(q_hidden).detach()))
    theirs = exact_kl(p, q, mask, reduction)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(ours, theirs, **close)
    trained = (p_hidden, *p_head.parameters())
    for our, their in zip(gradients(ours, *trained), gradients(theirs, *trained), strict=True):
        torch.testing.assert_close(our, their, **close)


@settings(max_examples=40, deadline=None)
@given(**cases)
def test_linear_token_log_probs_are_those_of_the_logits(seed, vocabulary, mask, chunk, bias, options):
    hidden, layer = normal(seed, *mask.shape, 6).requires_grad_(), head(seed + 1, 6, vocabulary, bias)
    ids = torch.randint(vocabulary, mask.shape, generator=torch.Generator().manual_seed(seed))
    ours = linear_token_log_probs(hidden, layer, ids, chunk, **options)
    theirs = token_log_probs(transformed(layer(hidden), **options), ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    trained = (hidden, *layer.parameters())
    for our, their in zip(gradients(ours, *trained), gradients(theirs, *trained), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "scale": 0.5, "temperature": 2.0}])
@pytest.mark.parametrize("trains", [True, False])
def test_gradients_check_against_finite_differences(reduction, options, trains):
    hidden, q_hidden = normal(0, 2, 3, 4, dtype=torch.float64).requires_grad_(), normal(1, 2, 3, 4, dtype=torch.float64)
    p_head, q_head = head(2, 4, 5, dtype=torch.float64, trains=trains), head(4, 4, 5, dtype=torch.float64)

    def kl(hidden, *_weights):
        return linear_kl(hidden, p_head, q_hidden, q_head, MASK, reduction, 2, **options)

    assert torch.autograd.gradcheck(kl, (hidden, *p_head.parameters()) if trains else (hidden,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 50_000, 200_000])
def test_values_lose_no_digits_beyond_those_of_the_logits(dtype, vocabulary):
    p_hidden, q_hidden = normal(0, 1, 3, 8).to(dtype), normal(1, 1, 3, 8).to(dtype)
    p_head, q_head = head(2, 8, vocabulary, dtype=dtype), head(4, 8, vocabulary, dtype=dtype)
    result = linear_kl(p_hidden, p_head, q_hidden, q_head, reduction="none")
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        expected = oracle(p_head(p_hidden), q_head(q_hidden))
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_head_gets_a_gradient_that_was_added_up_in_float32():
    tokens = 512
    hidden, q_hidden = (normal(seed, 1, tokens, 8).bfloat16() for seed in (0, 1))
    p_head, q_head = head(2, 8, 50, dtype=torch.bfloat16), head(4, 8, 50, dtype=torch.bfloat16)
    linear_kl(hidden, p_head, q_hidden, q_head, reduction="sum", chunk=1).backward()
    p = p_head(hidden).detach().double().requires_grad_()
    oracle(p, q_head(q_hidden).detach()).sum().backward()
    expected = torch.einsum("btv,bth->vh", p.grad, hidden.double())
    assert p_head.weight.grad.dtype == torch.bfloat16
    # A sum kept in bfloat16 would be off by several per cent of the largest entry after 512 additions.
    torch.testing.assert_close(p_head.weight.grad.double(), expected, rtol=2**-8, atol=0.002 * expected.abs().max())


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_and_excluded_words(size):
    p_head, q_head = head(0, 4, 6), head(2, 4, 6)
    with torch.no_grad():
        p_head.bias[0] = size
        p_head.bias[1] = q_head.bias[1] = -INF
        p_head.bias[2] = -INF
    hidden, q_hidden = normal(3, 1, 2, 4).requires_grad_(), normal(4, 1, 2, 4)
    kl = linear_kl(hidden, p_head, q_hidden, q_head)
    kl.backward()
    assert kl.item() == pytest.approx(oracle(p_head(hidden), q_head(q_hidden)).mean().item(), rel=1e-5)
    assert all(torch.isfinite(tensor.grad).all() for tensor in (hidden, p_head.weight, p_head.bias))
    assert linear_kl(q_hidden, q_head, hidden.detach(), p_head).item() == INF


def test_padding_takes_no_part_whatever_it_holds():
    hidden, q_hidden, p_head, q_head = normal(0, 2, 3, 4), normal(1, 2, 3, 4), head(2, 4, 5), head(4, 4, 5)
    expected = linear_kl(hidden, p_head, q_hidden, q_head, MASK)
    hidden[MASK == 0] = NAN
    hidden.requires_grad_()
    result = linear_kl(hidden, p_head, q_hidden, q_head, MASK)
    assert torch.equal(result, expected)
    result.backward()
    assert (hidden.grad[MASK == 0] == 0).all()
    assert torch.isfinite(p_head.weight.grad).all()


def test_a_mask_without_tokens_has_a_sum():
    hidden, p_head = normal(0, 1, 2, 4).requires_grad_(), head(2, 4, 5)
    kl = linear_kl(hidden, p_head, normal(1, 1, 2, 4), head(4, 4, 5), torch.zeros(1, 2), "sum")
    kl.backward()
    assert kl.item() == 0.0
    assert (hidden.grad == 0).all()
    assert (p_head.weight.grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_reach_p_alone_and_of_it_what_trains(reduction):
    p_head, q_head = head(2, 4, 5), head(4, 4, 5)
    p_head.bias.requires_grad_(False)
    hidden, q_hidden = normal(0, 1, 2, 4), normal(1, 1, 2, 4)
    linear_kl(hidden, p_head, q_hidden, q_head, reduction=reduction).sum().backward()
    assert p_head.weight.grad.abs().max() > 0
    assert p_head.bias.grad is hidden.grad is q_head.weight.grad is q_head.bias.grad is None
    with torch.no_grad():
        assert not linear_kl(hidden, p_head, q_hidden, q_head, reduction=reduction).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_backward_pass_can_run_twice(reduction):
    hidden, p_head = normal(0, 1, 2, 4), head(2, 4, 5)
    kl = linear_kl(hidden, p_head, normal(1, 1, 2, 4), head(4, 4, 5), reduction=reduction).sum()
    once, twice = (torch.autograd.grad(kl, p_head.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)


# Blocks of the vocabulary


@pytest.fixture
def blocks(monkeypatch):
    """Let log-probs go through a vocabulary a few words at a time: a chunk's logits in a block are 40 numbers."""
    monkeypatch.setattr("refkl_lib.kl.chunks._BLOCK_BYTES", 4 * 40)


def both_ways(hidden, layer, ids, chunk=8, **options):
    """Value and gradients in blocks, and in float64 from whole logits."""
    trained = [tensor for tensor in (hidden, *layer.parameters()) if tensor.requires_grad]
    ours = linear_token_log_probs(hidden, layer, ids, chunk, **options)
    logits = transformed(layer(hidden), **options).double()
    theirs = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return [(value.detach(), *gradients(value, *trained)) for value in (ours, theirs)]


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "scale": 0.5, "temperature": 2.0}])
def test_blocks_add_up_whatever_block_the_id_is_in(blocks, trains, bias, options):
    vocabulary = 23  # blocks of 5 words, and a last one of 3
    hidden, layer = normal(0, 1, vocabulary, 6).requires_grad_(), head(1, 6, vocabulary, bias, trains=trains)
    assert [words.stop - words.start for words in blocks_of(hidden[0, :8], vocabulary)] == [5, 5, 5, 5, 3]
    ours, theirs = both_ways(hidden, layer, torch.arange(vocabulary)[None], **options)
    assert len(ours) == 2 + trains * (1 + bias)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "scale": 0.5, "temperature": 2.0}])
def test_gradients_in_blocks_check_against_finite_differences(blocks, trains, options):
    hidden = normal(0, 2, 3, 4, dtype=torch.float64).requires_grad_()
    layer, ids = head(2, 4, 23, dtype=torch.float64, trains=trains), torch.tensor([[0, 7, 22], [4, 5, 20]])

    def log_probs(hidden, *_weights):
        return linear_token_log_probs(hidden, layer, ids, 4, **options)

    assert torch.autograd.gradcheck(log_probs, (hidden, *layer.parameters()) if trains else (hidden,))


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_heads_are_added_up_in_float32(blocks, trains, dtype):
    hidden, layer = normal(0, 1, 23, 6).to(dtype).requires_grad_(), head(1, 6, 23, dtype=dtype, trains=trains)
    ours, theirs = both_ways(hidden, layer, torch.arange(23)[None])
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-5, atol=1e-5)
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        assert our.dtype == dtype
        torch.testing.assert_close(our, their, rtol=0.02, atol=0.02 * their.abs().max().item())


@pytest.mark.parametrize("trains", [True, False])
def test_hundreds_of_blocks_are_added_up_in_float32(blocks, trains):
    hidden = normal(0, 1, 8, 6, scale=0.1).bfloat16().requires_grad_()
    layer = head(1, 6, 2003, dtype=torch.bfloat16, trains=trains)
    with torch.no_grad():
        layer.weight.mul_(0.1).add_(1.0)  # all pull the same way: a sum kept in bfloat16 would come to a halt
    ours, theirs = both_ways(hidden, layer, torch.arange(8)[None] * 250)
    # The words' mean weight, about 1, is rounded by the product to bfloat16, to 2^-9 of it.
    torch.testing.assert_close(ours[1], theirs[1], rtol=0.0, atol=0.02)


def test_a_token_that_is_almost_certain_keeps_the_digits_of_its_gradient(blocks):
    hidden, layer = normal(0, 1, 1, 6).bfloat16().requires_grad_(), head(1, 6, 23, dtype=torch.bfloat16, trains=False)
    with torch.no_grad():
        layer.bias[7] = layer(hidden).max() + 16  # 1 - p is 1e-6 or so
    ours, theirs = both_ways(hidden, layer, torch.tensor([[7]]))
    torch.testing.assert_close(ours[1], theirs[1], rtol=0.05, atol=0.02 * theirs[1].abs().max().item())


# Memory: no tensor is larger than a chunk of logits or the head


class LargestRows(TorchDispatchMode):
    """Note the most rows that any tensor over the vocabulary has, whoever makes it."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result if isinstance(result, (tuple, list)) else [result]):
            if tensor.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


def tokens_through_head(tokens, reduction="mean", trains=False, chunk=8, vocabulary=5000):
    hidden, q_hidden = normal(0, 2, tokens // 2, 4).requires_grad_(), normal(1, 2, tokens // 2, 4)
    p_head, q_head = head(2, 4, vocabulary, trains=trains), head(4, 4, vocabulary)
    ids = torch.zeros(2, tokens // 2, dtype=torch.long)

    def run():
        linear_kl(hidden, p_head, q_hidden, q_head, None, reduction, chunk).sum().backward()
        linear_token_log_probs(hidden, p_head, ids, chunk).sum().backward()

    return run


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trains", [False, True])
def test_logits_exist_for_a_chunk_of_tokens_at_a_time(reduction, trains):
    run = tokens_through_head(64, reduction, trains)
    with LargestRows(5000) as seen:
        run()
    assert seen.rows == 8


class LargestTensor(TorchDispatchMode):
    """Note the most numbers that any tensor has that is no view of another, and not of some shape."""

    def __init__(self, apart):
        super().__init__()
        self.apart, self.numbers = apart, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view() and result.shape != self.apart:
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "scale": 0.5, "temperature": 2.0}])
@pytest.mark.parametrize("trains", [False, True])
def test_log_probs_make_a_chunk_and_block_of_logits_at_a_time(monkeypatch, trains, options):
    monkeypatch.setattr("refkl_lib.kl.chunks._BLOCK_BYTES", 4 * 8 * 100)
    hidden, layer = normal(0, 2, 32, 4).requires_grad_(), head(1, 4, 5000, bias=False, trains=trains)
    ids = torch.zeros(2, 32, dtype=torch.long)
    for chunk in (8, 16):
        with LargestTensor(apart=layer.weight.shape) as largest:  # a head's gradient is as large as the head
            linear_token_log_probs(hidden, layer, ids, chunk, **options).sum().backward()
        assert largest.numbers == 8 * 100


@pytest.mark.parametrize("trains", [False, True])
def test_the_peak_does_not_grow_with_the_tokens(trains):
    peaks = {}
    for tokens in (32, 256):
        run = tokens_through_head(tokens, trains=trains)
        with MemoryLedger() as ledger:
            run()
            peaks[tokens] = sum(ledger.peak().values())
    per_token = (peaks[256] - peaks[32]) / (256 - 32)
    assert per_token < 200  # bytes: gradients of hidden states of 4 numbers, values and indices; the logits are 20,000
    head_bytes = 4 * 5000 * 4
    assert peaks[256] < 4 * 8 * 4 * 5000 + 3 * trains * head_bytes + 256 * 200


def test_the_default_chunk_follows_the_sizes():
    hidden = torch.zeros(1, 1, 1)
    assert chunk_before_head(hidden, 32_000, None) == 24 * 2**20 // (4 * 32_000)
    assert chunk_before_head(hidden, 151_936, None) == 128
    assert chunk_before_head(hidden, 2, None) > 1_000_000
    assert chunk_before_head(hidden, 49_152, 3) == 3
    assert chunk_for_blocks(hidden, None) == 512
    assert next(blocks_of(torch.zeros(512, 1), 151_936)) == slice(0, 2048)


# Wrong inputs, each with its own sentence

H, Q = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
HEAD = head(0, 4, 5)
IDS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_kl(H, HEAD, torch.zeros(2, 2, 4), HEAD), r"\(2, 3, 4\) and q_hidden is \(2, 2, 4\)"),
        (lambda: linear_kl(H[0], HEAD, Q[0], HEAD), r"must be \(B, T, H\)"),
        (lambda: linear_kl(H, HEAD, Q, head(0, 4, 6)), "vocabulary of 5 and q of 6"),
        (lambda: linear_kl(H, head(0, 3, 5), Q, HEAD), r"p_hidden is \(2, 3, 4\), and the weight of p_head \(5, 3\)"),
        (lambda: linear_kl(H, HEAD, Q, head(0, 3, 5)), r"q_hidden is \(2, 3, 4\), and the weight of q_head \(5, 3\)"),
        (lambda: linear_kl(H, HEAD, Q, HEAD, torch.ones(2, 4)), r"mask has shape \(2, 4\)"),
        (lambda: linear_kl(H, HEAD, Q, HEAD, torch.zeros(2, 3)), "no token that counts"),
        (lambda: linear_kl(H, HEAD, Q, HEAD, torch.full((2, 3), 0.5)), "other than 0 and 1"),
        (lambda: linear_kl(H, HEAD, Q, HEAD, reduction="batchmean"), "'batchmean', but must be one of"),
        (lambda: linear_kl(H * NAN, HEAD, Q, HEAD), "NaN in a value that counts"),
        (lambda: linear_kl(H, HEAD, Q * NAN, HEAD), "NaN in a value that counts"),
        (lambda: linear_kl(H, HEAD, Q, HEAD, chunk=0), "chunk is 0, but"),
        (lambda: linear_kl(H, HEAD, Q, HEAD, temperature=0.0), r"temperature is 0.0, but it must be"),
        (lambda: linear_kl(H, HEAD, Q, HEAD, softcap=-1.0), r"softcap is -1.0, but it must be"),
        (lambda: linear_kl(H, HEAD, Q, HEAD, scale=NAN), "scale is nan, but it must be"),
        (lambda: linear_kl(H, HEAD, Q.clone().requires_grad_(), HEAD), "q_hidden requires a gradient"),
        (lambda: linear_token_log_probs(H[0], HEAD, IDS[0]), r"must be \(B, T, H\), but hidden is \(3, 4\)"),
        (lambda: linear_token_log_probs(H, HEAD, IDS[:, 1:]), r"needs token_ids of shape \(2, 3\), not \(2, 2\)"),
        (lambda: linear_token_log_probs(H, HEAD, IDS - 100), "token_ids has -100"),
        (lambda: linear_token_log_probs(H, head(0, 3, 5), IDS), r"hidden is \(2, 3, 4\), and the weight of head"),
        (lambda: linear_token_log_probs(H, HEAD, IDS, -1), "chunk is -1, but"),
    ],
)
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_head_that_is_more_than_a_linear_layer_is_refused():
    class Adapted(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"q_head is a Adapted, but must be a plain nn\.Linear"):
        linear_kl(H, HEAD, Q, Adapted(4, 5))
