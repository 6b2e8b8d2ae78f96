"""Estimators: values and gradients by hand and by enumeration, and the table by sampling."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from refkl_lib import (
    estimate_kl,
    exact_kl,
    importance_weights,
    kl_gradient_table,
    kl_loss,
    kl_reward,
    token_log_probs,
)

INF, NAN = math.inf, math.nan
ESTIMATORS = ("k1", "k2", "k3")
PLACES = ("loss", "weighted loss", "off-policy loss", "off-policy loss, weight detached", "reward")


def logits_of(seed, size=7, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(size, generator=generator, dtype=torch.float64)


def log_probs_of(seed, size=7, scale=1.0):
    return logits_of(seed, size, scale).log_softmax(-1)


def kl_of(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


def gradient(value, logits):
    return torch.autograd.grad(value, logits)[0]


def gradient_of_kl(p_logits, q_logits):
    """∇KL(p‖q) to p's logits by the formula p·(log p/q - KL)."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return log_p.exp() * (log_p - log_q - kl_of(log_p, log_q))


def gradient_of_reverse_kl(p_logits, q_logits):
    """∇KL(q‖p) to p's logits by the formula p - q."""
    return p_logits.softmax(-1) - q_logits.softmax(-1)


# Values


def test_estimators_by_hand():
    log_probs, ref_log_probs = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0])
    assert estimate_kl(log_probs, ref_log_probs, "k1").tolist() == [1.0, -1.0]
    assert estimate_kl(log_probs, ref_log_probs, "k2").tolist() == [0.5, 0.5]
    expected = [math.exp(-1) - 1 + 1, math.exp(1) - 1 - 1]
    assert estimate_kl(log_probs, ref_log_probs).tolist() == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 500), scale=st.sampled_from([0.01, 1.0, 5.0]))
def test_expected_k1_and_k3_are_the_exact_kl(seed, size, scale):
    log_p, log_q = log_probs_of(seed, size, scale), log_probs_of(seed + 1, size, scale)
    kl = kl_of(log_p, log_q).item()
    for estimator in ("k1", "k3"):
        assert (log_p.exp() * estimate_kl(log_p, log_q, estimator)).sum().item() == pytest.approx(kl, rel=1e-9)


def test_expected_k2_is_not():
    log_p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    log_q = torch.tensor([0.1, 0.9], dtype=torch.float64).log()
    expected = (log_p.exp() * estimate_kl(log_p, log_q, "k2")).sum().item()
    assert expected == pytest.approx(0.25 * (math.log(5) ** 2 + math.log(5 / 9) ** 2))
    assert expected != pytest.approx(kl_of(log_p, log_q).item(), rel=0.1)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    dtypes=st.tuples(*[st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])] * 2),
    seed=st.integers(0, 10**6),
    estimator=st.sampled_from(ESTIMATORS),
)
def test_any_shape_and_dtype_agrees_with_the_formula(shape, dtypes, seed, estimator):
    size = math.prod(shape)
    log_probs, ref_log_probs = (
        -logits_of(seed + i, size).abs().reshape(shape).to(dtype) for i, dtype in enumerate(dtypes)
    )
    result = estimate_kl(log_probs, ref_log_probs, estimator)
    assert result.shape == log_probs.shape
    assert result.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    r = ref_log_probs.double() - log_probs.double()
    expected = {"k1": -r, "k2": r**2 / 2, "k3": r.exp() - 1 - r}[estimator]
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def test_k3_keeps_its_digits_where_the_models_nearly_agree():
    log_probs = torch.tensor([-1.0])
    tiny = 2.0**-12
    assert estimate_kl(log_probs, log_probs + tiny).item() == pytest.approx(tiny**2 / 2, rel=1e-3)


def test_half_precision_is_widened_before_the_difference():
    log_probs = torch.tensor([-8.0], dtype=torch.bfloat16)
    ref_log_probs = torch.tensor([-0.0078125], dtype=torch.bfloat16)
    assert (log_probs - ref_log_probs).item() == -8.0  # in bfloat16 the second is rounded away
    assert estimate_kl(log_probs, ref_log_probs, "k1").item() == -7.9921875


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_token_that_the_reference_excludes_has_an_infinite_estimate(estimator):
    assert estimate_kl(torch.tensor(-1.0), torch.tensor(-INF), estimator).item() == INF


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_check_against_finite_differences(estimator):
    log_p, log_q, log_b = (log_probs_of(seed).requires_grad_() for seed in (0, 1, 2))
    options = {"clamp_log_ratio": 1.2, "clamp_value": 0.9}

    def weighted(log_p, log_q):
        return estimate_kl(log_p, log_q, estimator, weights=importance_weights(log_p, log_b.detach()), **options)

    assert torch.autograd.gradcheck(weighted, (log_p, log_q))


# Clamps


def test_k3_far_from_the_reference_explodes_unless_clamped():
    log_probs, ref_log_probs = torch.tensor(-30.0, requires_grad=True), torch.tensor(0.0)
    k3 = estimate_kl(log_probs, ref_log_probs)
    assert k3.item() == pytest.approx(math.exp(30), rel=1e-5)
    assert gradient(k3, log_probs).item() == pytest.approx(-1.07e13, rel=1e-2)
    in_ratio = estimate_kl(log_probs, ref_log_probs, clamp_log_ratio=20.0)
    assert in_ratio.item() == pytest.approx(math.exp(20) - 21)
    assert gradient(in_ratio, log_probs).item() == 0.0
    in_value = estimate_kl(log_probs, ref_log_probs, clamp_value=10.0)
    assert in_value.item() == 10.0
    assert gradient(in_value, log_probs).item() == 0.0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_clamps_change_nothing_inside_and_stop_the_gradient_outside(estimator):
    log_probs = torch.tensor([-3.0, -0.4, -0.3, -0.1], requires_grad=True)
    ref_log_probs = torch.tensor([-0.1, -0.3, -0.4, -3.0])
    free = estimate_kl(log_probs, ref_log_probs, estimator)
    slope = gradient(free.sum(), log_probs)
    for clamps in ({"clamp_log_ratio": 0.5}, {"clamp_value": 0.5}):
        clamped = estimate_kl(log_probs, ref_log_probs, estimator, **clamps)
        assert torch.equal(clamped[1:3], free[1:3])
        assert (clamped[[0, 3]].abs() < free[[0, 3]].abs()).all()
        clamped_slope = gradient(clamped.sum(), log_probs)
        assert torch.equal(clamped_slope[1:3], slope[1:3])
        assert clamped_slope[[0, 3]].tolist() == [0.0, 0.0]


def test_clamping_an_overflown_estimate_gives_a_zero_gradient_and_not_nan():
    log_probs = torch.tensor([-100.0, -1.0], requires_grad=True)
    ref_log_probs = torch.tensor([0.0, -INF])
    for estimator in ESTIMATORS:
        clamped = estimate_kl(log_probs, ref_log_probs, estimator, clamp_value=10.0)
        assert clamped.abs().tolist() == [10.0, 10.0]
        assert gradient(clamped.sum(), log_probs).tolist() == [0.0, 0.0]


def test_a_clamp_biases_the_expected_value_towards_zero():
    log_p, log_q = log_probs_of(0, scale=2.0), log_probs_of(1, scale=2.0)
    kl = kl_of(log_p, log_q).item()
    clamped = (log_p.exp() * estimate_kl(log_p, log_q, clamp_value=0.5)).sum().item()
    assert 0 < clamped < 0.9 * kl


# Importance weights


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), estimator=st.sampled_from(["k1", "k3"]))
def test_weights_make_another_policys_tokens_unbiased(seed, estimator):
    log_p, log_q, log_b = (log_probs_of(seed + i) for i in range(3))
    kl = kl_of(log_p, log_q).item()
    weights = importance_weights(log_p, log_b)
    weighted = (log_b.exp() * estimate_kl(log_p, log_q, estimator, weights=weights)).sum().item()
    assert weighted == pytest.approx(kl, rel=1e-9, abs=1e-12)


def test_without_weights_another_policys_tokens_are_biased():
    log_p, log_q, log_b = (log_probs_of(seed) for seed in range(3))
    plain = (log_b.exp() * estimate_kl(log_p, log_q, "k3")).sum().item()
    assert plain != pytest.approx(kl_of(log_p, log_q).item(), rel=0.1)


def test_importance_weights_by_hand():
    log_probs = torch.tensor([0.5, 0.2]).log().requires_grad_()
    behaviour = torch.tensor([0.25, 0.4]).log().requires_grad_()
    weights = importance_weights(log_probs, behaviour)
    assert weights.tolist() == pytest.approx([2.0, 0.5])
    weights.sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([2.0, 0.5])
    assert behaviour.grad is None
    assert importance_weights(log_probs, log_probs).tolist() == [1.0, 1.0]


# In the loss, in the reward


def padded(*rows):
    return torch.tensor(rows, requires_grad=True)


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_the_loss_by_hand_with_padding_that_holds_nan():
    log_probs = padded([-1.0, -2.0, NAN], [-3.0, NAN, -INF])
    ref_log_probs = torch.tensor([[-2.0, -4.0, NAN], [-3.0, -INF, 5.0]])
    loss = kl_loss(log_probs, ref_log_probs, mask=MASK)
    assert loss.item() == pytest.approx((0.5 + 2.0 + 0.0) / 3)
    (slope,) = torch.autograd.grad(loss, log_probs)
    assert slope.flatten().tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0, 0, 0])
    behaviour = torch.tensor([[-2.0, -2.0, NAN], [-3.0, -INF, 0.0]])
    weights = importance_weights(log_probs, behaviour, MASK)
    assert weights.flatten().tolist() == pytest.approx([math.e, 1, 0, 1, 0, 0])
    weighted = kl_loss(log_probs, ref_log_probs, "k1", MASK, "none", weights=weights)
    assert weighted.flatten().tolist() == pytest.approx([math.e, 2, 0, 0, 0, 0])
    (slope,) = torch.autograd.grad(weighted.sum(), log_probs)
    assert slope.flatten().tolist() == pytest.approx([2 * math.e, 3, 0, 1, 0, 0])


def test_the_reward_by_hand_has_no_gradient():
    log_probs = padded([-1.0, -2.0, NAN], [-3.0, NAN, -INF])
    ref_log_probs = torch.tensor([[-2.0, -1.0, NAN], [-5.0, -INF, 5.0]])
    penalty = kl_reward(log_probs, ref_log_probs, mask=MASK)
    assert penalty.tolist() == [[1.0, -1.0, 0.0], [2.0, 0.0, 0.0]]
    assert not penalty.requires_grad
    assert kl_reward(log_probs, ref_log_probs, mask=MASK, reduction="sequence").tolist() == [0.0, 2.0]
    assert kl_reward(log_probs, ref_log_probs, mask=MASK, clamp_value=0.5).tolist()[1] == [0.5, 0.0, 0.0]


def test_the_k2_loss_has_the_gradient_of_the_exact_kl():
    p, q = logits_of(0).requires_grad_(), logits_of(1)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    expected_loss = (log_p.detach().exp() * kl_loss(log_p, log_q, reduction="none")).sum()
    exact = gradient(exact_kl(p.view(1, 1, -1), q.view(1, 1, -1)), p)
    torch.testing.assert_close(gradient(expected_loss, p), exact, rtol=0, atol=1e-12)


# The table


@pytest.fixture(scope="module")
def example():
    torch.manual_seed(0)
    return torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)


def test_the_table_knows_which_gradient_is_which(example):
    rows = kl_gradient_table(*example).rows
    right, reverse = "∇KL(p‖q)", "∇KL(q‖p)"
    assert [[rows[estimator, place].follows for place in PLACES] for estimator in ESTIMATORS] == [
        ["zero", right, right, "zero", right],
        [right, "neither", "neither", right, "neither"],
        [reverse, right, right, reverse, "neither"],
    ]


def test_the_table_printed(example):
    assert str(kl_gradient_table(*example)) == (
        "KL(p‖q) = 0.3299 nats, KL(q‖p) = 0.3765 nats\n"
        "\n"
        "                                  k1              k2              k3\n"
        "expected value                    0.3299          0.3188          0.3299\n"
        "variance of one sample            0.5287          0.0635          0.1972\n"
        "\n"
        "relative error of the expected gradient against ∇KL(p‖q), and what it follows\n"
        "loss                              1.00 zero       0.00 ∇KL(p‖q)   0.38 ∇KL(q‖p)\n"
        "weighted loss                     0.00 ∇KL(p‖q)   0.31 neither    0.00 ∇KL(p‖q)\n"
        "off-policy loss                   0.00 ∇KL(p‖q)   0.31 neither    0.00 ∇KL(p‖q)\n"
        "off-policy loss, weight detached  1.00 zero       0.00 ∇KL(p‖q)   0.38 ∇KL(q‖p)\n"
        "reward                            0.00 ∇KL(p‖q)   1.09 neither    1.24 neither"
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(3, 40), given_behaviour=st.booleans())
def test_every_gradient_that_the_table_names_is_that_gradient(seed, size, given_behaviour):
    p, q = logits_of(seed, size), logits_of(seed + 1, size)
    behaviour = logits_of(seed + 2, size) if given_behaviour else None
    table = kl_gradient_table(p, q, behaviour_logits=behaviour)
    forward, reverse = gradient_of_kl(p, q), gradient_of_reverse_kl(p, q)
    named = {"∇KL(p‖q)": forward, "∇KL(q‖p)": reverse, "zero": torch.zeros_like(p)}
    for row in table.rows.values():
        if row.follows != "neither":
            torch.testing.assert_close(row.gradient, named[row.follows], rtol=0, atol=1e-12)
    torch.testing.assert_close(table.rows["k3", "reward"].gradient, forward - reverse, rtol=0, atol=1e-12)
    assert table.rows["k3", "loss"].follows == "∇KL(q‖p)"


def test_off_policy_rows_have_the_weighted_estimates_variance(example):
    p, q = example
    log_p, log_q, log_b = (logits.log_softmax(-1) for logits in (p, q, (p + q) / 2))
    for table in (kl_gradient_table(p, q), kl_gradient_table(p, q, behaviour_logits=(p + q) / 2)):
        row = table.rows["k1", "off-policy loss"]
        second_moment = (log_p.exp() ** 2 / log_b.exp() * (log_p - log_q) ** 2).sum().item()
        assert row.value == pytest.approx(table.kl)
        assert row.variance == pytest.approx(second_moment - table.kl**2)
        assert row.variance != pytest.approx(table.rows["k1", "loss"].variance, rel=0.1)


def test_the_table_of_two_equal_distributions_has_no_error_and_no_negative_zero():
    table = kl_gradient_table(logits_of(0), logits_of(0) + 1)
    assert all(row.error == 0.0 and row.follows == "∇KL(p‖q)" for row in table.rows.values())
    assert "-0" not in str(table)
    assert "nan" not in str(table)


def sampled_gradient(estimator, place, p, q, behaviour, batch, generator):
    """One training step's gradient: sample tokens, take their log-probs, back-propagate the mean."""
    off_policy = place.startswith("off-policy")
    sampler = behaviour if off_policy else p.detach()
    tokens = torch.multinomial(sampler.softmax(-1), batch, replacement=True, generator=generator)
    log_p, log_q, log_b = (token_log_probs(logits.expand(batch, -1), tokens) for logits in (p, q, sampler))
    if place == "reward":
        loss = (kl_reward(log_p, log_q, estimator) * log_p).mean()
    elif place == "loss":
        loss = kl_loss(log_p, log_q, estimator)
    else:
        weights = importance_weights(log_p, log_b)
        loss = kl_loss(log_p, log_q, estimator, weights=weights.detach() if place.endswith("detached") else weights)
    return gradient(loss, p)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sampling_confirms_the_table(example, estimator, place):
    p, q = example[0].clone().requires_grad_(), example[1]
    behaviour = logits_of(2)
    row = kl_gradient_table(p, q, behaviour_logits=behaviour).rows[estimator, place]
    generator = torch.Generator().manual_seed(0)
    steps = torch.stack([sampled_gradient(estimator, place, p, q, behaviour, 4000, generator) for _ in range(50)])
    mean, standard_error = steps.mean(0), steps.std(0) / math.sqrt(len(steps))
    assert ((mean - row.gradient).abs() < 5 * standard_error + 1e-12).all()
    # Sharp enough to fail: a gradient that the table does not name is many standard errors away.
    names = {"∇KL(p‖q)": gradient_of_kl(p, q), "∇KL(q‖p)": gradient_of_reverse_kl(p, q), "zero": torch.zeros(7)}
    for name, other in names.items():
        if name != row.follows:
            assert ((mean - other).abs() > 10 * standard_error).any(), name


# Published code that is wrong, and ours beside it


def test_k3_with_its_ratio_reversed_is_no_estimate_of_the_kl():
    log_p, log_q = log_probs_of(0), log_probs_of(1)
    kl = kl_of(log_p, log_q).item()
    reversed_k3 = torch.exp(log_p - log_q) - 1 - (log_p - log_q)
    chi_square = (log_p.exp() ** 2 / log_q.exp()).sum().item() - 1
    expected = (log_p.exp() * reversed_k3).sum().item()
    assert expected == pytest.approx(chi_square - kl)
    assert expected != pytest.approx(kl, rel=0.2)
    assert (log_p.exp() * estimate_kl(log_p, log_q, "k3")).sum().item() == pytest.approx(kl)


def test_kl_div_of_log_probs_without_log_target_is_nan():
    p, q = logits_of(0).view(1, 1, -1), logits_of(1).view(1, 1, -1)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    assert math.isnan(F.kl_div(log_q, log_p, reduction="sum").item())
    right = F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()  # KL(target‖input)
    assert exact_kl(p, q).item() == pytest.approx(right)


def test_the_mean_of_k1_as_a_loss_restrains_nothing():
    p, q = logits_of(0).requires_grad_(), logits_of(1)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    chances = log_p.detach().exp()
    as_published = gradient((chances * (log_p - log_q)).sum(), p)
    assert as_published.abs().max() < 1e-15
    log_p = p.log_softmax(-1)
    ours = gradient((chances * kl_loss(log_p, log_q, reduction="none")).sum(), p)
    torch.testing.assert_close(ours, gradient_of_kl(p, q).detach(), rtol=0, atol=1e-12)
    assert ours.norm() > 0.1


# Wrong inputs, each with its own sentence

P = torch.full((2, 3), -1.0)
BAD = torch.tensor([[-1.0, NAN, -1.0]] * 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimate_kl(P, P, "k4"), "'k4', but must be one of"),
        (lambda: estimate_kl(P, P[0]), r"\(2, 3\) and ref_log_probs is \(3,\): both must be about the same tokens"),
        (lambda: estimate_kl(P - INF, P), "the policy sampled these tokens"),
        (lambda: estimate_kl(BAD, P), "log_probs has NaN"),
        (lambda: estimate_kl(P, BAD), "ref_log_probs has NaN"),
        (lambda: estimate_kl(P, P + INF), r"ref_log_probs has NaN or \+inf"),
        (lambda: estimate_kl(P, P, clamp_value=0.0), "clamp_value is 0.0, but must be positive"),
        (lambda: estimate_kl(P, P, clamp_log_ratio=-20), "clamp_log_ratio is -20, but must be positive"),
        (lambda: estimate_kl(P, P, clamp_value=NAN), "clamp_value is nan"),
        (lambda: estimate_kl(P, P, weights=P[0]), r"weights is \(3,\)"),
        (lambda: estimate_kl(P, P, weights=P), "weights has an entry that is negative"),
        (lambda: estimate_kl(P, P, weights=-BAD), "negative, NaN or infinite"),
        (lambda: estimate_kl(P, P - INF, weights=P + 1), "a weight of 0 meets an infinite estimate"),
        (lambda: importance_weights(P, P[0]), r"behaviour_log_probs is \(3,\)"),
        (lambda: importance_weights(P, P - INF), "must come from the policy that sampled"),
        (lambda: importance_weights(P, BAD), "must come from the policy that sampled"),
        (lambda: kl_loss(P, P[0]), "both must be about the same tokens"),
        (lambda: kl_loss(P, P, mask=torch.zeros(2, 3)), "no token that counts"),
        (lambda: kl_loss(P, P, mask=torch.ones(3, 2)), r"mask has shape \(3, 2\)"),
        (lambda: kl_loss(P, P, reduction="batchmean"), "'batchmean', but must be one of"),
        (lambda: kl_loss(P, BAD), "NaN in a value that counts"),
        (lambda: kl_reward(BAD, P), "NaN in a value that counts"),
        (lambda: kl_reward(P, P, "k0"), "'k0', but must be one of"),
        (lambda: kl_gradient_table(P, P), r"p_logits is \(2, 3\), but all logits must be \(V,\)"),
        (lambda: kl_gradient_table(P[0], P[0, :2]), r"q_logits is \(2,\)"),
        (lambda: kl_gradient_table(P[0], BAD[0]), "q_logits has an entry that is NaN"),
        (lambda: kl_gradient_table(P[0], P[0], behaviour_logits=P[0] - INF), "behaviour_logits has an entry"),
        (lambda: kl_gradient_table(torch.tensor([0.0, 1e4]), torch.zeros(2)), "differ by .* nats"),
    ],
)
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
