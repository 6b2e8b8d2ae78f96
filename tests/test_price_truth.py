"""The bill against the step that it is the bill of: on real tensors, under the same ledger, to the byte."""

from typing import Any

import pytest
from transformers import Gemma2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen2Config

from refkl_lib import price, run_strategy
from refkl_lib.memory.trace import Step, trace

SHAPE = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "neox": GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, sliding_window=16, query_pre_attn_scalar=16),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
}
SETTINGS: dict[str, Any] = {
    "strategy": "clone",
    "batch": 2,
    "seq": 24,
    "dtype": "fp32",
    "optimizer": "adamw",
    "lora_rank": None,
    "targets": "all-linear",
    "checkpointing": False,
    "attention": None,
    "kl": "full",
    "sync": None,
    "device": "cpu",
}
ADAPTER = {"strategy": "adapter", "lora_rank": 4}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"kl": "linear", "dtype": "bf16"}),
    ("llama", {"kl": "linear", "dtype": "mixed", "checkpointing": True}),
    ("llama", ADAPTER),
    ("llama", ADAPTER | {"kl": "linear", "checkpointing": True}),
    ("llama", ADAPTER | {"dtype": "bf16", "attention": "eager"}),
    ("llama", {"lora_rank": 4, "dtype": "mixed", "kl": "linear"}),
    ("llama", {"sync": 0.6, "optimizer": "sgd"}),
    ("llama", {"strategy": None, "kl": "linear"}),
    ("qwen2", {"dtype": "bf16"}),
    ("qwen2", {"kl": "linear", "checkpointing": True}),
    ("qwen2", ADAPTER | {"dtype": "mixed", "targets": ("q_proj", "v_proj")}),
    ("neox", {"dtype": "bf16", "attention": "eager"}),
    ("neox", {"kl": "linear", "checkpointing": True, "dtype": "mixed"}),
    ("neox", ADAPTER | {"checkpointing": True}),
    ("gemma2", {"kl": "linear", "dtype": "mixed"}),
    ("gemma2", ADAPTER | {"kl": "linear", "checkpointing": True, "dtype": "bf16"}),
    ("llama", {"strategy": "swap"}),
    ("qwen2", {"strategy": "swap", "dtype": "mixed", "checkpointing": True}),
    ("gemma2", {"strategy": "swap", "dtype": "bf16"}),
    ("neox", {"strategy": "swap", "dtype": "bf16", "kl": "linear"}),
    ("llama", {"strategy": "precomputed"}),
    ("qwen2", {"strategy": "precomputed", "kl": "linear", "dtype": "bf16", "checkpointing": True}),
    ("neox", {"strategy": "precomputed", "lora_rank": 4, "kl": "linear"}),
    ("mixtral", {"kl": "linear"}),
    ("mixtral", ADAPTER | {"dtype": "bf16", "checkpointing": True}),
]


def step(config: PreTrainedConfig, **settings: Any) -> Step:
    return Step(config=config, **SETTINGS | settings)


@pytest.mark.parametrize(("shape", "settings"), CASES)
def test_each_stretch_of_the_step_to_the_byte(shape, settings):
    priced = trace(step(CONFIGS[shape], **settings))
    lived = trace(step(CONFIGS[shape], **settings), on_meta=False)
    assert priced.at_rest == lived.at_rest
    assert priced.moments == lived.moments
    assert priced == lived
    assert sum(priced.at_rest.values()) < max(sum(owners.values()) for _, owners in priced.moments)


@pytest.mark.parametrize(
    ("strategy", "lora_rank"),
    [("clone", None), ("clone", 8), ("adapter", 8), ("swap", None), ("precomputed", None), ("precomputed", 8)],
)
def test_the_bill_is_what_the_ledger_of_a_training_run_shows(strategy, lora_rank):
    batch, seq = 2, 32
    run = run_strategy(strategy, model="pocket", lora_rank=lora_rank, batch=batch, seq=seq, steps=2)
    bill = price("pocket", strategy, lora_rank=lora_rank, batch=batch, seq=seq, dtype="fp32", kl="full", device="cpu")
    inputs = 2 * batch * seq * 8  # ids and mask, which the run made before its ledger was there
    assert bill.owners == run.owners | {"activations": run.owners["activations"] + inputs}
    assert bill.reference_bytes == run.reference_bytes
