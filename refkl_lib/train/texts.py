"""Let the policy write: groups of texts, each sampled as the policy is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Texts:
    """B sampled texts of L new tokens. A model given `inputs` returns logits (B, L + 1, V); the last is not needed."""

    inputs: dict[str, Any]
    tokens: Tensor  # (B, L)
    mask: Tensor  # (B, L), 1 up to and including the end token
    words: list[str]


def write_texts(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], group: int, new_tokens: int
) -> Texts:
    """Return `group` texts for each prompt, sampled from the policy as it is: no temperature, no cut-off."""
    given = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt").to(policy.device)
    plain = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "pad_token_id": tokenizer.pad_token_id}
    ids = policy.generate(**given, **plain, max_new_tokens=new_tokens, num_return_sequences=group)
    tokens = ids[:, given["input_ids"].shape[1] :]
    ends = (tokens == tokenizer.eos_token_id).long()
    mask = (ends.cumsum(1) - ends == 0).long()
    attention = torch.cat([given["attention_mask"].repeat_interleave(group, 0), mask], 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)  # a prompt that is padded on its left begins at 0, too
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    inputs |= {"logits_to_keep": tokens.shape[1] + 1, "use_cache": False}
    return Texts(inputs, tokens, mask, tokenizer.batch_decode(tokens, skip_special_tokens=True))
