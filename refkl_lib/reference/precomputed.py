"""Precomputed: what the reference said, written down, and the model let go.

To a data set that stays the same, a model that stays the same gives the same log-probs in every epoch. So they are
computed once. Training then needs no second model and no second pass, only a number for each token.

    reference = PrecomputedReference.compute(policy, batches, "log-probs", tokenizer=tokenizer)
    reference.log_probs(**batch)         # (B, T-1), of sequences of that data set

TRL does this for DPO and KTO (`precompute_ref_log_probs=True`), where the log-probs of an answer are one sum.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from refkl_lib.models.cache import flush
from refkl_lib.reference.base import Reference
from refkl_lib.reference.clone import CloneReference
from refkl_lib.reference.mix import check_alpha
from refkl_lib.tensors import is_partitioned

KEY, SHARDS = "log-probs.json", "log-probs-*.safetensors"


class PrecomputedReference(Reference):
    """The log-probs in a folder, which `PrecomputedReference.compute` has filled; they stay on disk until asked for.

    It cannot serve an exact KL: that is a sum over the whole vocabulary, and here is one log-prob for each position,
    of the token that the data set has there. Estimate it (`kl_loss`).
    Raises ValueError if the folder has no log-probs, or not yet all of them.
    """

    strategy = "precomputed"
    has_logits = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.key = _read_key(self.folder)
        self._shards = _shards(self.folder)
        if len(self._shards) < self.key["sequences"]:
            raise ValueError(
                f"{self.folder} has log-probs of {len(self._shards)} of {self.key['sequences']} sequences: go on with "
                "PrecomputedReference.compute and the same arguments, which computes those that are missing"
            )

    @classmethod
    def compute(
        cls,
        model: nn.Module | Reference,
        batches: Iterable[Mapping[str, Tensor]],
        folder: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase,
        every: int = 16,
        progress: bool = True,
    ) -> Self:
        """Return the log-probs of all sequences of `batches`, computed by `model` unless `folder` has them already.

        `model` is the policy before training (its adapter is switched off) or a reference, and is not kept. Each of
        `batches` has input_ids and maybe attention_mask, (B, T). After every `every` of them what was computed is
        on disk; whatever ends the process, the next call goes on from there. A bar shows the progress on stderr.
        Raises ValueError if the folder's log-probs are of another model, tokenizer or data set, `batches` is empty, a
        mask is not one block of ones, a model is partitioned by ZeRO-3 or `every` is below 1; TypeError if `batches` is
        an iterator.
        """
        _check(batches, every)
        reference = _reference_of(model)
        device = _device_of(reference)
        names = {row.name for batch in batches for row in _rows(**_inputs(batch))}
        if not names:
            raise ValueError("batches is empty: there is no sequence to compute log-probs of")
        key = {
            "weights": reference.fingerprint(),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "data": _digest(*sorted(names)),
            "sequences": len(names),
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # the ranks of a job may all ask for it; one computes
            _claim(folder, key)
            with logging.tqdm(total=len(names), desc="log-probs", unit="sequence", disable=not progress) as bar:
                _fill(folder, partial(_log_probs, reference, device), batches, names, every, bar.update)
        return cls(folder)

    def log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the log-prob of each next token, (B, T-1), in float32, in whatever batch and padding it comes.

        A sequence is known by its tokens where the mask is 1. Where the next token is padding there is 0; of the first
        token after padding on the left, which follows nothing, there is NaN: count by mask[:, 1:] * mask[:, :-1].
        Raises ValueError for a sequence that the data set does not have.
        """
        values = torch.zeros(input_ids.shape[0], input_ids.shape[1] - 1)
        for number, row in enumerate(_rows(input_ids, attention_mask)):
            if row.name not in self._shards:
                raise ValueError(
                    f"sequence {number} of the batch ({row.end - row.start} tokens) is not in the data set whose "
                    f"log-probs are in {self.folder}: compute those of the new data set into another folder, or keep a "
                    "reference that can still be asked, like a clone"
                )
            with safe_open(self._shards[row.name], framework="pt") as shard:
                values[number, row.start : row.end - 1] = shard.get_tensor(row.name)
            values[number, max(row.start - 1, 0) : row.start] = torch.nan
        return values.to(input_ids.device)

    def as_reference(self) -> NoReturn:
        """Raise ValueError: there is no model any more."""
        raise ValueError(
            "a precomputed reference has let its model go, so there are no logits and no exact KL: that is a sum over "
            "the vocabulary, of which only the log-probs of the data set's own tokens are known. Estimate it with "
            'kl_loss(log_probs, reference.log_probs(**batch), mask=…), or keep a "clone", "swap" or "adapter" reference'
        )

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing: no weight is kept."""
        return iter(())

    def held(self) -> list[Tensor]:
        """Return nothing, for nothing is kept in memory."""
        return []

    def fingerprint(self) -> str:
        """Return the `fingerprint_of` the weights that computed these log-probs."""
        return self.key["weights"]

    def sync(self, policy: nn.Module, alpha: float = 1.0) -> None:
        """Raise ValueError: what was written down cannot follow."""
        check_alpha(alpha)
        raise ValueError(
            "precomputed log-probs cannot follow the policy: compute those of the new reference into another folder, "
            'or keep a "clone" or "swap" reference'
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 over what decides which ids a text becomes; padding and truncation do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocabulary": sorted(tokenizer.get_vocab().items())} if backend is None else json.loads(backend.to_str())
    # Calls leave their last padding and truncation in a fast tokenizer.
    kept = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest(json.dumps([kept, special], sort_keys=True))


class _Row(NamedTuple):
    """A sequence in a batch: a name made of its tokens, and the columns where it begins and ends."""

    name: str
    start: int
    end: int


def _rows(input_ids: Tensor, attention_mask: Tensor | None = None) -> Iterator[_Row]:
    ids = input_ids.cpu().numpy().astype("<i8")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    for number, (tokens, counts) in enumerate(zip(ids, mask.cpu().numpy(), strict=True)):
        places = counts.nonzero()[0]
        if len(places) == 0 or places[-1] - places[0] + 1 != len(places):
            raise ValueError(
                f"the mask of sequence {number} is not one block of ones: a sequence is known by its tokens, and "
                "padding may only stand before or after them"
            )
        start, end = int(places[0]), int(places[-1]) + 1
        yield _Row(hashlib.sha256(tokens[start:end].tobytes()).hexdigest(), start, end)


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}


class _AsItIs(CloneReference):
    """A model before training, which needs no copy for as long as it is only asked."""

    def __init__(self, model: nn.Module) -> None:
        self.policy = self.model = model


def _reference_of(model: nn.Module | Reference) -> Reference:
    if isinstance(model, Reference):
        return model
    if hasattr(model, "peft_config"):
        from refkl_lib.reference.adapter import AdapterReference

        return AdapterReference(model)
    return _AsItIs(model)


def _check(batches: Iterable[Mapping[str, Tensor]], every: int) -> None:
    if every < 1:
        raise ValueError(f"every is {every}, but it counts batches: 1 or more")
    if iter(batches) is batches:
        raise TypeError(
            f"batches is a {type(batches).__name__}, which can be gone through once, and it takes twice (to know the "
            "data set, and to compute): give a list, or a DataLoader"
        )


def _device_of(reference: Reference) -> torch.device:
    with reference.as_reference() as model:
        if is_partitioned(model):
            raise ValueError(
                "this model is partitioned by DeepSpeed ZeRO-3, so no rank can compute alone: compute the log-probs "
                "in a process of its own, with the model loaded plainly"
            )
        return next(chain(model.parameters(), model.buffers())).device


def _claim(folder: Path, key: dict[str, Any]) -> None:
    """Write the key, or raise ValueError if there is another one; clear away what a killed process left."""
    for unfinished in folder.glob(".*.partial"):
        unfinished.unlink()
    if not (folder / KEY).exists():
        _write(folder / KEY, lambda path: path.write_text(json.dumps(key, indent=2) + "\n"))
    present = _read_key(folder)
    if other := [name for name in ("weights", "tokenizer", "data") if present[name] != key[name]]:
        raise ValueError(
            f"the log-probs in {folder} are stale: they are of other {' and other '.join(other)}. Compute into another "
            "folder, or delete this one; and compute before training, for then the policy still is the reference"
        )


def _fill(
    folder: Path,
    compute: Callable[[dict[str, Any], set[str]], dict[str, Tensor]],
    batches: Iterable[Mapping[str, Tensor]],
    names: set[str],
    every: int,
    tell: Callable[[int], object],
) -> None:
    """Compute what is missing, and write it, a shard for so many batches."""
    missing = names - _shards(folder).keys()
    tell(len(names) - len(missing))
    shard: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, 1):
        shard |= compute(_inputs(batch), missing)
        tell(len(missing & shard.keys()))
        missing -= shard.keys()
        if number % every == 0:
            _write_shard(folder, shard)
            shard = {}
    _write_shard(folder, shard)
    if missing:
        raise ValueError(
            f"batches came to an end without {len(missing)} of the sequences they had the first time: give a list, or "
            "what yields the same ones each time"
        )


def _log_probs(
    reference: Reference, device: torch.device, batch: dict[str, Any], missing: set[str]
) -> dict[str, Tensor]:
    """Return the log-probs of those sequences of a batch that are missing, each without its padding."""
    rows = {row.name: (number, row) for number, row in enumerate(_rows(**batch)) if row.name in missing}
    if not rows:
        return {}
    kept = torch.tensor([number for number, _ in rows.values()])
    inputs = {name: tensor[kept].to(device) for name, tensor in batch.items() if tensor is not None}
    values = reference.log_probs(**inputs).float().cpu()
    found = {name: line[r.start : r.end - 1].clone() for line, (name, (_, r)) in zip(values, rows.items(), strict=True)}
    if any(bool(torch.isnan(log_probs).any()) for log_probs in found.values()):
        raise ValueError(
            "the model gives NaN as log-probs of these batches, so nothing is written down: look for NaN in its "
            "weights, or an overflow in float16"
        )
    return found


def _write_shard(folder: Path, shard: dict[str, Tensor]) -> None:
    if shard:
        name = SHARDS.replace("*", _digest(*shard)[:16])
        _write(folder / name, lambda path: save_file(shard, path))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file that has its name when all of it is on disk, and not before."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        write(unfinished)
        flush(unfinished)
        unfinished.chmod(0o644)  # as in the cache of models: others may read it too
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _shards(folder: Path) -> dict[str, Path]:
    """Return in which file each sequence is."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(SHARDS)):
        with safe_open(path, framework="pt") as shard:
            found |= dict.fromkeys(shard.keys(), path)
    return found


def _read_key(folder: Path) -> dict[str, Any]:
    if not (folder / KEY).is_file():
        raise ValueError(f"{folder} has no precomputed log-probs: PrecomputedReference.compute writes them there")
    return json.loads((folder / KEY).read_text())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
