"""How the kit sets DeepSpeed up; written without it, so that a bill can be priced for the same settings."""

from typing import Any


def job_config(learning_rate: float) -> dict[str, Any]:
    """Return the DeepSpeed configuration of the job."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        # torch's AdamW: DeepSpeed's own would be compiled first.
        "optimizer": {"type": "AdamW", "params": {"lr": learning_rate, "weight_decay": 0.0, "torch_adam": True}},
        "zero_optimization": {
            "stage": 3,
            # Every layer is gathered when it computes and not a moment longer, so that the peak shows what
            # ZeRO-3 saves. With DeepSpeed's defaults a model this small stays gathered, whole.
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
            # Norms and small adapters stay with every rank: too small to be worth a message.
            "stage3_param_persistence_threshold": 6_000,
            "reduce_bucket_size": 300_000,
            "sub_group_size": 10_000_000,
        },
    }
