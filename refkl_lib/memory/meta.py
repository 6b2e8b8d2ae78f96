"""A device that is not there: run real code on tensors that have only a shape.

    with MetaDevice("cuda") as device, MemoryLedger(meta=True) as ledger:
        batch = device.put(real_batch)
        model(**batch)

PyTorch's meta device computes shapes and nothing else. Three things keep a training step from running on it as it
would on the device that is meant, and each is seen to here: code asks for values (is every token counted?), so what is
made of the batch alone keeps its values; attention is taken apart on meta, and here stays the one kernel
that it is; and code that sizes its work by the device has to be told which (`tensors.device_type`).
"""

import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from refkl_lib.memory.recall import Recall
from refkl_lib.tensors import meta_stands_for

Device = Literal["cpu", "cuda"]
aten = torch.ops.aten

# Of larger tensors no values are kept; code asks for those of masks and positions (B, T).
_LARGEST_TWIN = 2**20
# One thread at a time: of two that replace a function and put it back, the second would put back the first's.
_REPLACING = threading.RLock()


class MetaDevice:
    """Run what is in a `with` block on meta tensors as if they were on a "cpu" or a "cuda" device.

    Raises NotImplementedError where code asks for a value that was not made of the batch alone, for then what it would
    do next cannot be known.
    """

    def __init__(self, stands_for: Device = "cuda") -> None:
        self._values = _Values(stands_for)
        self._parts = (self._values, _kernels_of(stands_for), meta_stands_for(stands_for))
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def put(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch on meta; its values stay known."""
        return {name: self._values.put(tensor) for name, tensor in batch.items()}


class _Values(TorchDispatchMode):
    """Keep the values of small integers and booleans that are made of known ones; floats have none.

    A storage on meta has a twin on the CPU, so that views and writing in place need no care.
    """

    def __init__(self, stands_for: Device) -> None:
        super().__init__()
        self._stands_for = stands_for
        self._twins: MutableMapping[Any, Tensor] = WeakIdKeyDictionary()
        self._recall = Recall()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as the ledger's: wrapping each call in `torch._disable_dynamo` costs more than the call

    def put(self, tensor: Tensor) -> Tensor:
        meta = torch.empty_like(tensor, device="meta")
        self._know(meta, tensor)
        return meta

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERS:
            return _ANSWERS[func](self, func, args, kwargs)
        result = self._recall(func, args, kwargs)
        if isinstance(result, Tensor) and result.is_meta and _may_be_known(func, result):
            self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: tuple, kwargs: dict, result: Tensor) -> None:
        """Compute on the twins too, if all inputs have one."""
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if all(map(self._knows, inputs)):
            args, kwargs = tree_map_only(Tensor, self._twin, (args, kwargs))
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("cpu")
            self._know(result, func(*args, **kwargs))
        elif self._knows(result):
            del self._twins[result.untyped_storage()]  # what was known has been written over

    def _knows(self, tensor: Tensor) -> bool:
        return not tensor.is_meta or tensor.untyped_storage() in self._twins

    def _twin(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        flat = self._twins[tensor.untyped_storage()].view(tensor.dtype)
        return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def _know(self, meta: Tensor, value: Tensor) -> None:
        storage = meta.untyped_storage()
        if storage not in self._twins:
            self._twins[storage] = torch.zeros(storage.nbytes(), dtype=torch.uint8)
        self._twin(meta).copy_(value)

    def answer_scalar(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Answer `.item()` and `bool()`."""
        if not self._knows(args[0]):
            raise NotImplementedError(
                "this code asks for the value of a tensor that depends on the model's numbers, and on the meta device "
                "there are none: what it would do next cannot be priced"
            )
        return self._twin(args[0]).item()

    def answer_nonzero(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        """Answer where a mask is 1."""
        return self.put(self._places(args[0])) if args[0].is_meta else func(*args, **kwargs)

    def answer_index(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        """Answer an indexing by masks: how much it takes is known from their values."""
        tensor, indices, *rest = args
        result = func(tensor, [i for index in indices for i in self._as_integers(index)], *rest, **kwargs)
        if func is aten.index.Tensor and _may_be_known(func, result):
            self._follow(func, args, kwargs, result)
        return result

    def answer_isnan(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        """Answer that there is no NaN."""
        result = func(*args, **kwargs)
        if result.is_meta:
            self._know(result, torch.zeros(result.shape, dtype=torch.bool))
        return result

    def answer_finite(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        """Answer that a number equals itself, and is not infinity, but less."""
        result = func(*args, **kwargs)
        if not result.is_meta:
            return result
        left, right = args
        if left is right or (isinstance(right, float) and right == torch.inf):
            self._know(result, torch.ones(result.shape, dtype=torch.bool))
        elif _may_be_known(func, result):
            self._follow(func, args, kwargs, result)
        return result

    def answer_allclose(self, func: Any, args: tuple, kwargs: dict) -> bool:
        """Answer that two tensors agree, where there are no numbers."""
        return True if args[0].is_meta else func(*args, **kwargs)

    def answer_grouped_mm(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        """Answer a product by groups in the dtype of its factors; on meta it is for bfloat16 alone (torch 2.13)."""
        left, right, *rest = args
        if not left.is_meta:
            return func(*args, **kwargs)
        result = func(left.to(torch.bfloat16), right.to(torch.bfloat16), *rest, **kwargs)
        return torch.empty_like(result, dtype=left.dtype)

    def answer_layer_norm(self, func: Any, args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
        """Answer that a CPU keeps the mean and deviation of half-precision rows in half precision."""
        result, *statistics = func(*args, **kwargs)
        if result.is_meta and self._stands_for == "cpu":
            statistics = [torch.empty_like(part, dtype=result.dtype) for part in statistics]
        return result, *statistics

    def _as_integers(self, index: Tensor | None) -> list[Tensor | None]:
        if index is None or index.dtype not in (torch.bool, torch.uint8) or not index.is_meta:
            return [index]
        return [place.to("meta") for place in self._places(index).unbind(1)]

    def _places(self, mask: Tensor) -> Tensor:
        if not self._knows(mask):
            raise NotImplementedError(
                "this code selects by a mask that depends on the model's numbers, and on the meta device there are "
                "none: how much it would select cannot be priced"
            )
        return self._twin(mask).nonzero()


_ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _Values.answer_scalar,
    aten.nonzero.default: _Values.answer_nonzero,
    aten.index.Tensor: _Values.answer_index,
    aten.index_put.default: _Values.answer_index,
    aten.index_put_.default: _Values.answer_index,
    aten.isnan.default: _Values.answer_isnan,
    aten.eq.Tensor: _Values.answer_finite,
    aten.ne.Scalar: _Values.answer_finite,
    aten.lt.Scalar: _Values.answer_finite,
    aten.allclose.default: _Values.answer_allclose,
    aten._grouped_mm.default: _Values.answer_grouped_mm,
    aten.native_layer_norm.default: _Values.answer_layer_norm,
}


def _may_be_known(func: Any, result: Tensor) -> bool:
    if result.is_floating_point() or not 0 < result.numel() <= _LARGEST_TWIN:
        return False
    return not (func.is_view or func._schema.name.startswith(("aten::empty", "aten::new_empty")))


@contextmanager
def _kernels_of(stands_for: Device) -> Iterator[None]:
    """Let attention and dropout on meta be the kernels that the device would run; torch takes them apart there (2.13).

    Tensors that are elsewhere go the usual way, in this thread and in others. (A TorchFunctionMode would be tidier,
    but none is on while checkpointed activations are computed again.)
    """
    with _REPLACING, ExitStack() as stack:
        stack.enter_context(_on_meta(F, "scaled_dot_product_attention", _ATTENTION[stands_for]))
        if stands_for == "cuda":
            stack.enter_context(_on_meta(F, "dropout", _cuda_dropout))
        # There is no autocast on meta, not even to switch it off.
        stack.enter_context(_on_meta(torch, "autocast", lambda *args, **kwargs: nullcontext()))
        yield


@contextmanager
def _on_meta(owner: Any, name: str, replacement: Callable) -> Iterator[None]:
    """Replace a function for a block, where its first argument is, or is on, the meta device."""
    usual = getattr(owner, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        on_meta = first.is_meta if isinstance(first, Tensor) else first == "meta"
        return (replacement if on_meta else usual)(*args, **kwargs)

    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, usual)


def _cuda_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Keep a boolean mask; elsewhere it has the dtype of `x`."""
    return torch.native_dropout(x, p, True)[0] if training and 0 < p < 1 else _plain_dropout(x, p, training, inplace)


def _cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p > 0 or not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return _taken_apart(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    mask = _additive(attn_mask, q)
    kernel = aten._scaled_dot_product_flash_attention_for_cpu.default
    return kernel(q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


def _cuda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is None and q.dtype.itemsize == 2 and q.shape[-1] == v.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention.default(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if q.shape[1] != k.shape[1]:  # the other kernel does not know grouped queries
        return _taken_apart(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    bias = _additive(attn_mask, q)
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    kernel = aten._scaled_dot_product_efficient_attention.default
    return kernel(q, k, v, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


_ATTENTION = {"cpu": _cpu_attention, "cuda": _cuda_attention}
_taken_apart, _plain_dropout = F.scaled_dot_product_attention, F.dropout


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return a boolean mask as what is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero, never = torch.scalar_tensor(0.0, dtype=q.dtype), torch.scalar_tensor(-torch.inf, dtype=q.dtype)
    return torch.where(mask, zero, never)
