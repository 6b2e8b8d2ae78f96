"""Keep a frozen reference model, compute the KL to it, and read the bill.

Every public name is imported from here; what stands behind it is only loaded when the name is first used, so
that `import refkl_lib` is instant and works without the packages that a lesson does not need.
"""

from importlib import import_module
from typing import Any

_HOME_OF = {
    "load_model": "models",
    "load_tokenizer": "models",
    "model_origin": "models",
    "sample_batch": "text",
    "create_reference": "reference",
    "Reference": "reference.base",
    "create_reference_model": "reference.clone",
    "CloneReference": "reference.clone",
    "AdapterReference": "reference.adapter",
    "add_lora": "reference.adapter",
    "copy_adapter": "reference.adapter",
    "ZeRO3Reference": "reference.zero3",
    "SwapReference": "reference.swap",
    "PrecomputedReference": "reference.precomputed",
    "SyncRefModelCallback": "reference.sync",
    "verify_reference": "reference.verify",
    "ReferenceReport": "reference.verify",
    "exact_kl": "kl.exact",
    "linear_kl": "kl.linear",
    "linear_token_log_probs": "kl.linear_log_probs",
    "compute_kl_divergence": "kl.divergence",
    "estimate_kl": "kl.estimators",
    "importance_weights": "kl.estimators",
    "kl_loss": "kl.estimators",
    "kl_reward": "kl.estimators",
    "kl_gradient_table": "kl.gradients",
    "masked_mean": "kl.reduce",
    "combine_means": "kl.reduce",
    "token_log_probs": "kl.log_probs",
    "policy_loss": "step",
    "MemoryLedger": "memory.ledger",
    "price": "memory.price",
    "Bill": "memory.bill",
    "known_models": "memory.shapes",
    "storage_bytes": "tensors",
    "show_bytes": "units",
    "machine": "memory.meters",
    "read_meter": "memory.meters",
    "launch_zero3": "ranks.launch",
    "print_event": "ranks.events",
    "ZeRO3Run": "ranks.launch",
    "copy_under_zero3": "ranks.copies",
    "shards": "ranks.shards",
    "TrainRun": "train.run",
    "launch_train": "train.launch",
    "SharedRun": "train.launch",
    "advise": "advisor.advise",
    "Advice": "advisor.advise",
    "run_strategy": "comparison",
    "price_strategy": "comparison",
    "StrategyRun": "comparison",
    "bill_table": "comparison",
    "article_claims": "lessons.claims.article",
    "predict": "lessons.predictions",
    "reveal": "lessons.predictions",
    "check": "lessons.check",
    "enter": "lessons.leaderboard",
    "leaderboard": "lessons.leaderboard",
    "hint": "lessons.course",
    "solution": "lessons.course",
    "progress": "view.progress",
    "three_ways": "view.mechanisms",
    "MemoryPanel": "view.memory",
    "RanksPanel": "view.ranks",
    "shards_picture": "view.shards",
    "StrategyPanel": "view.strategy",
    "TrainPanel": "view.train",
    "frontier": "view.train_figures",
    "TreePanel": "view.tree",
    "decision_tree": "view.tree",
    "fit_map": "view.fit",
    "curves": "view.curves",
    "kl_dots": "view.adapter",
    "lora_switch": "view.adapter",
    "DirectionPanel": "view.kl",
    "both_directions": "view.kl",
    "direction_kls": "view.kl",
    "kl_strip": "view.strip",
    "KLPanel": "view.text",
    "running_means": "view.kl",
    "examine_claims": "view.claims",
    "verdicts_picture": "view.claims",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"refkl_lib has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"refkl_lib.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
