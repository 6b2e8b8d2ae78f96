"""What is recalled of an operation on meta is what PyTorch works out."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from refkl_lib import price
from refkl_lib.memory.recall import Recall

aten = torch.ops.aten


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layout(tensor: torch.Tensor) -> tuple:
    return tensor.size(), tensor.stride(), tensor.dtype, tensor.device, tensor.untyped_storage().nbytes()


class _Compared(TorchDispatchMode):
    """Ask for each operation twice, and PyTorch itself."""

    def __init__(self):
        super().__init__()
        self.recall, self.compared = Recall(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.recall(func, args, kwargs)
        recalled, worked_out = self.recall(func, args, kwargs), func(*args, **kwargs)
        if isinstance(worked_out, torch.Tensor):
            assert layout(recalled) == layout(worked_out), func
            shares = [
                [a.untyped_storage()._cdata == r.untyped_storage()._cdata for a in args if torch.is_tensor(a)]
                for r in (recalled, worked_out)
            ]
            assert shares[0] == shares[1], func
            self.compared += 1
        return worked_out


def test_it_is_like_what_pytorch_works_out():
    with _Compared() as compared:
        x, narrow, column = on_meta(4, 6), on_meta(4, 6, dtype=torch.bfloat16), on_meta(4, 1)
        made = [x.t() + x.t(), x * column, x + narrow, narrow * 2.0, x > 0, x.to(torch.float64), x[:, ::2].exp()]
        made += [x.sum(0), x.sum(), x @ x.t(), torch.cat([x, x]), torch.zeros_like(x.t()), aten._unsafe_view(x, [24])]
        made += [x.softmax(-1), x.gather(1, on_meta(4, 2, dtype=torch.int64)), x.expand(2, 4, 6).clone(), x.new_ones(0)]
        x.add_(1).mul_(column).masked_fill_(x > 0, 0.0)
    assert compared.compared > len(made)


def test_numbers_that_are_equal_but_not_alike_are_kept_apart():
    recall, mask = Recall(), on_meta(4, 3, dtype=torch.bool)
    made = [recall(aten.add.Tensor, (mask, one), {}) for one in (1, 1.0, True)]
    assert [tensor.dtype for tensor in made] == [torch.int64, torch.float32, torch.bool]


def test_what_changes_a_shape_in_place_is_run_each_time():
    recall, square, flat = Recall(), on_meta(6, 6), on_meta(4)
    for numel in (8, 2, 8):
        recall(aten.t_.default, (square,), {})
        recall(aten.resize_.default, (flat, [numel]), {})
        assert flat.shape == (numel,)
    assert square.stride() == (1, 6)


def test_what_cannot_work_fails_each_time():
    recall = Recall()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broadcast"):
            recall(aten.add.Tensor, (on_meta(4), on_meta(3)), {})


def test_a_layer_like_one_before_is_not_worked_out_again():
    worked_out = []
    recall, x = Recall(), on_meta(4, 6)
    for _ in range(3):
        for func, args in ((aten.exp.default, (x,)), (aten.mul_.Tensor, (x, 2.0))):
            with _Heard(worked_out):
                recall(func, args, {})
    assert [func for func in worked_out if func is not aten.empty_strided.default] == [
        aten.exp.default,
        aten.mul_.Tensor,
    ]


class _Heard(TorchDispatchMode):
    def __init__(self, heard: list):
        super().__init__()
        self._heard = heard

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._heard.append(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("Qwen2.5-0.5B", {"strategy": "clone", "device": "cpu", "dtype": "fp32"}),
        ("Qwen2.5-0.5B", {"strategy": "adapter", "lora_rank": 8, "checkpointing": True, "attention": "eager"}),
        ("gemma-2-2b", {"strategy": "zero3", "ranks": 4}),
        ("Mixtral-8x7B-v0.1", {"strategy": "clone", "dtype": "mixed", "optimizer": "adamw8bit"}),
    ],
)
def test_a_bill_is_the_same_without_it(monkeypatch, model, settings):
    recalled = price(model, seq=64, **settings)
    monkeypatch.setattr(Recall, "__call__", lambda self, func, args, kwargs: func(*args, **kwargs))
    worked_out = price(model, seq=64, **settings)
    assert recalled.moments == worked_out.moments
    assert (recalled.at_rest, recalled.host) == (worked_out.at_rest, worked_out.host)
