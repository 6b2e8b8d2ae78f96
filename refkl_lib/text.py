"""A little real text to measure on: the opening of "Alice's Adventures in Wonderland".

By Lewis Carroll, 1865, in the public domain (Project Gutenberg, no. 11); the quotation marks are made plain.
"""

from importlib.resources import files

import torch
from torch import Tensor

from refkl_lib.counts import check_counts
from refkl_lib.models import load_tokenizer
from refkl_lib.models.load import Source


def sample_text() -> str:
    """Return the text, about 6,500 characters of English prose."""
    return files("refkl_lib").joinpath("data/alice.txt").read_text(encoding="utf-8")


def sample_batch(source: Source = "smollm2", batch: int = 2, seq: int = 128) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, each (batch, seq): windows of the text, one after the other.

    The tokens are those of the tokenizer of `source`; every one is text, so the mask is all ones. The same
    arguments give the same batch. Raises ValueError if the text is shorter than batch · seq tokens,
    or one of them is no whole number of 1 or more.
    """
    check_counts(batch=batch, seq=seq)
    tokenizer = load_tokenizer(source)
    # verbose=False: no warning that the text is longer than the model's context, which sees windows of it.
    tokens = tokenizer(sample_text(), add_special_tokens=False, verbose=False).input_ids
    if batch * seq > len(tokens):
        raise ValueError(
            f"batch {batch} · seq {seq} is {batch * seq} tokens, but the text has {len(tokens)} "
            f"for {str(source)!r}; make one of them smaller"
        )
    input_ids = torch.tensor(tokens[: batch * seq]).view(batch, seq)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
