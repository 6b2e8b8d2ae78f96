"""Chunks: so few tokens at a time that their logits need not be counted.

The logits of 8,192 tokens over 151,936 words are 4.6 GiB in float32. What is wanted of them is one number a token.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from refkl_lib.tensors import device_type

Rows = tuple[Tensor, ...]

# A GPU reads the whole head for each chunk; several hundred tokens keep it busy for as long as that takes.
_GPU_BYTES = 256 * 2**20

# A block of logits: what a processor still has in its caches when the block's next step comes.
_BLOCK_BYTES = 4 * 2**20
_BLOCK_WORDS = 8192  # with few tokens: more words make nothing faster


def chunks_of(counts: Tensor, chunk: int) -> Iterator[Rows]:
    """Yield the places where `counts` is True, `chunk` at a time, each as an index for any tensor of that shape."""
    # An index, not a slice of flattened tokens: flattening logits[:, :-1] would copy all of them.
    for places in counts.nonzero().split(chunk):
        yield places.unbind(1)


def chunk_of_logits(logits: Tensor) -> int:
    """Return how many tokens' logits to take from those that exist: what fits in a core's own cache."""
    return _fitting(logits.shape[-1], _bytes(logits, 2**20))


def chunk_before_head(hidden: Tensor, vocabulary: int, chunk: int | None) -> int:
    """Return how many tokens to send through a head at a time, `chunk` if that is given.

    Below 128 tokens a matrix product takes longer than it need. Raises ValueError if `chunk` is less than 1.
    """
    if chunk is None:
        return max(128, _fitting(vocabulary, _bytes(hidden, 24 * 2**20)))
    return _checked(chunk)


def chunk_for_blocks(hidden: Tensor, chunk: int | None) -> int:
    """Return how many tokens to send through a head at a time, block by block of its words, `chunk` if that is given.

    Raises ValueError if `chunk` is less than 1.
    """
    if chunk is None:
        return 512 if device_type(hidden) == "cpu" else 2048
    return _checked(chunk)


def blocks_of(hidden: Tensor, vocabulary: int) -> Iterator[slice]:
    """Yield the words of a vocabulary, so many at a time as keep the logits of a chunk's hidden states (C, H) small."""
    block = min(_BLOCK_WORDS, _fitting(hidden.shape[0], _bytes(hidden, _BLOCK_BYTES)))
    for start in range(0, vocabulary, block):
        yield slice(start, min(start + block, vocabulary))


def log_softmax_(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return log-probs (C, V) of logits that nobody needs any more, in their memory if they have that dtype."""
    # On a CPU, torch.log_softmax adds up word after word: over 200,000 of them that costs two digits (torch 2.13).
    wide = logits.to(dtype)
    wide.sub_(wide.amax(-1, keepdim=True))  # first and exactly: logits of 10,000 have few digits for the rest
    few = wide.split(_fitting(wide.shape[-1], _bytes(wide, _BLOCK_BYTES)))  # exp() needs memory of its own
    return wide.sub_(torch.cat([rows.exp().sum(-1, keepdim=True) for rows in few]).log_())


def widened(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype to add up in: float64 if any of `dtypes` is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _checked(chunk: int) -> int:
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, but it is a number of tokens, 1 or more (None: chosen from the sizes)")
    return chunk


def _bytes(tensor: Tensor, on_cpu: int) -> int:
    return on_cpu if device_type(tensor) == "cpu" else _GPU_BYTES


def _fitting(length: int, nbytes: int) -> int:
    """Return how many rows of `length` float32 numbers fit, 1 at least."""
    return max(1, nbytes // (4 * max(1, length)))
