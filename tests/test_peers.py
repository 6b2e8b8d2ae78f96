"""The kit's KL and log-probs beside those of TRL, Liger and PyTorch: the same where they are right, and where not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import selective_log_softmax

from refkl_lib import estimate_kl, exact_kl, linear_kl, linear_token_log_probs, token_log_probs

liger = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is installed on Linux only")
from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction  # noqa: E402
from liger_kernel.chunked_loss.grpo_loss import k3_loss_fn  # noqa: E402

VOCABULARY, WIDTH, TOKENS = 211, 24, 17


@pytest.fixture
def case():
    """Hidden states (1, T, H) and heads of policy and reference, and ids (1, T)."""
    torch.manual_seed(0)
    heads = [nn.Linear(WIDTH, VOCABULARY, bias=False) for _ in range(2)]
    hidden = [3 * torch.randn(1, TOKENS, WIDTH) for _ in range(2)]
    return hidden[0].requires_grad_(), heads[0], hidden[1], heads[1].requires_grad_(False), ids()


def ids():
    return torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def with_gradients(value, *inputs):
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def trl_divergence(p_hidden, p_head, q_hidden, q_head, beta):
    given = (p_hidden[0], p_head.weight, None, q_hidden[0], q_head.weight, None)
    return ChunkedDivergenceFunction.apply(*given, beta)[0].mean()


def liger_divergence(p_hidden, p_head, q_hidden, q_head, labels, beta):
    loss = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=5
    )
    return loss(p_hidden[0], p_head.weight, q_hidden[0], q_head.weight, labels[0])


def test_linear_kl_is_trls_chunked_divergence_with_beta_1(case):
    hidden, head, *q, _ = case
    theirs = with_gradients(trl_divergence(hidden, head, *q, beta=1.0), hidden, head.weight)
    ours = with_gradients(linear_kl(hidden, head, *q, chunk=5), hidden, head.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_linear_kl_is_ligers_chunked_divergence_with_beta_1(case):
    hidden, head, *q, labels = case
    theirs = with_gradients(liger_divergence(hidden, head, *q, labels, beta=1.0), hidden, head.weight)
    ours = with_gradients(linear_kl(hidden, head, *q, chunk=5), hidden, head.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_beta_of_0_is_the_other_direction_in_both(case):
    hidden, head, q_hidden, q_head, labels = case
    reverse = exact_kl(q_head(q_hidden), head(hidden))
    torch.testing.assert_close(trl_divergence(hidden, head, q_hidden, q_head, beta=0.0), reverse, rtol=1e-4, atol=0)
    theirs = liger_divergence(hidden, head, q_hidden, q_head, labels, beta=0.0)
    torch.testing.assert_close(theirs, reverse, rtol=1e-4, atol=0)
    assert abs(reverse - linear_kl(hidden, head, q_hidden, q_head)) > 0.05


def test_token_log_probs_are_trls_selective_log_softmax(case):
    hidden, head, *_, labels = case
    logits = head(hidden).detach().requires_grad_()
    theirs = with_gradients(selective_log_softmax(logits, labels).sum(), logits)
    torch.testing.assert_close(with_gradients(token_log_probs(logits, labels).sum(), logits), theirs)


def test_linear_token_log_probs_are_trls_and_ligers_chunked_ones(case):
    hidden, head, *_, labels = case
    ours = with_gradients(linear_token_log_probs(hidden, head, labels, chunk=5).sum(), hidden, head.weight)
    flat = (hidden[0], head.weight, None, labels[0])
    trls = ChunkedLogProbFunction.apply(*flat, 1.0, 64, None, 1.0, ())[0].sum()
    ligers = _ChunkedSelectiveLogProbFunction.apply(hidden[0], head.weight, labels[0], None, 1.0, 64).sum()
    for theirs in (trls, ligers):
        torch.testing.assert_close(ours, with_gradients(theirs, hidden, head.weight), rtol=1e-4, atol=1e-5)


def test_k3_is_ligers_where_the_models_differ():
    log_p, log_q = -3 * torch.rand(2, 100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(estimate_kl(log_p, log_q, "k3"), k3_loss_fn(log_q, log_p), rtol=1e-4, atol=1e-6)


# Where a peer is not right


def test_ligers_k3_has_no_digits_left_where_the_models_nearly_agree():
    log_p, log_q = torch.tensor([-1.0]), torch.tensor([-1.0 + 2.0**-12])
    exact = 2.0**-25  # r²/2, and the next term is 12,000 times smaller
    assert estimate_kl(log_p, log_q, "k3").item() == pytest.approx(exact, rel=1e-3)
    assert k3_loss_fn(log_q, log_p).item() != pytest.approx(exact, rel=0.5)


def test_trls_log_probs_of_bfloat16_logits_have_three_digits():
    logits = 5 * torch.randn(1, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = token_log_probs(logits.double(), ids())
    torch.testing.assert_close(token_log_probs(logits, ids()).double(), exact, rtol=1e-5, atol=0)
    assert (selective_log_softmax(logits, ids()) - exact).abs().max() > 0.01


def test_kl_div_is_nan_where_both_models_exclude_a_word():
    p, q = torch.tensor([[[0.0, 1.0, -torch.inf]]]), torch.tensor([[[1.0, 0.0, -torch.inf]]])
    assert exact_kl(p, q).isfinite()
    assert F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum").isnan()
