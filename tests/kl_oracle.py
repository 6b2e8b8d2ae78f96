"""What tests of the KL share: its definition in float64, and logits to try it on."""

import torch
from hypothesis import strategies as st

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def oracle(p_logits, q_logits):
    """KL(p‖q) for each token by its definition in float64: Σ p·log(p/q), with 0·log 0 = 0."""
    log_p, log_q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def normal(seed, *shape, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


@st.composite
def masks(draw, max_rows=3, max_columns=7):
    """A mask in which something counts."""
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    row = st.lists(st.integers(0, 1), min_size=columns, max_size=columns)
    mask = torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))
    mask[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = 1
    return mask
