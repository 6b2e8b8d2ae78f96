"""How a reference is kept: one short file a strategy, one protocol (`base.Reference`)."""

from typing import Any

from torch import nn

from refkl_lib.reference.base import Reference

STRATEGIES = ("clone", "adapter", "zero3", "swap", "precomputed")


def create_reference(policy: nn.Module, strategy: str, **options: Any) -> Reference:
    """Return a reference for `policy`, kept by `strategy`; the options are that strategy's own.

    "clone" copies the policy (`CloneReference`), "adapter" switches its adapter off
    (`AdapterReference`), "zero3" loads its checkpoint, or the one given as `source`, again, partitioned over the ranks
    (`ZeRO3Reference`), "swap" lets its weights wait in host memory (`SwapReference`),
    "precomputed" computes log-probs of a data set once (`PrecomputedReference.compute`, which needs `batches=`,
    `folder=` and `tokenizer=`).
    Raises ValueError for an unknown strategy, and what the strategy raises if it does not fit the policy.
    """
    if strategy == "clone":
        from refkl_lib.reference.clone import CloneReference

        return CloneReference(policy, **options)
    if strategy == "adapter":
        from refkl_lib.reference.adapter import AdapterReference

        return AdapterReference(policy, **options)
    if strategy == "zero3":
        from refkl_lib.reference.zero3 import ZeRO3Reference, source_of

        if "source" not in options:
            options["source"] = source_of(policy)
        return ZeRO3Reference(**options)
    if strategy == "swap":
        from refkl_lib.reference.swap import SwapReference

        return SwapReference(policy, **options)
    if strategy == "precomputed":
        from refkl_lib.reference.precomputed import PrecomputedReference

        return PrecomputedReference.compute(policy, **options)
    raise ValueError(f"strategy is {strategy!r}, but must be one of {STRATEGIES}")
