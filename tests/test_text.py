import pytest
import torch

from refkl_lib.models import load_tokenizer
from refkl_lib.text import sample_batch, sample_text


@pytest.mark.parametrize("source", ["pocket", "smollm2"])
def test_the_batch_is_the_opening_of_the_book_in_consecutive_windows(source):
    batch = sample_batch(source, batch=4, seq=256)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 256)
    assert batch["input_ids"].dtype == torch.long
    assert batch["attention_mask"].all()
    # The last token may be the first bytes of a character; the rest is the text.
    decoded = load_tokenizer(source).decode(batch["input_ids"].flatten()[:-1]).rstrip("\ufffd")
    assert sample_text().startswith(decoded)
    assert len(decoded) > 900


def test_the_batch_is_always_the_same():
    assert torch.equal(sample_batch("pocket")["input_ids"], sample_batch("pocket")["input_ids"])


def test_a_batch_longer_than_the_text_says_how_much_there_is():
    everything = len(load_tokenizer("pocket")(sample_text(), verbose=False).input_ids)
    assert sample_batch("pocket", 1, everything)["input_ids"].numel() == everything
    with pytest.raises(ValueError, match=f"the text has {everything}"):
        sample_batch("pocket", 1, everything + 1)


@pytest.mark.parametrize(("batch", "seq"), [(0, 8), (2, 0), (-1, 8)])
def test_an_empty_batch_is_refused(batch, seq):
    with pytest.raises(ValueError, match="at least 1"):
        sample_batch("pocket", batch, seq)
