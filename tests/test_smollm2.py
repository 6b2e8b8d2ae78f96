"""The real model, as `python -m refkl_lib.models fetch smollm2` left it."""

import pytest
import torch
from replay import THREE_RUNS, kept
from training import train

from refkl_lib import (
    AdapterReference,
    CloneReference,
    StrategyRun,
    add_lora,
    launch_zero3,
    run_strategy,
    sample_batch,
    storage_bytes,
)
from refkl_lib.models import load_model, load_tokenizer, model_origin


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2")


def test_it_is_whole(model):
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert "Q4_1" in model_origin("smollm2") or "original" in model_origin("smollm2")


def test_it_answers_and_stops_without_a_word_from_the_libraries(model, tokenizer, capfd):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    capfd.readouterr()
    answer = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    new = answer[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(new) == "The capital of France is Paris.<|im_end|>"
    assert capfd.readouterr() == ("", "")


def test_its_special_tokens(model, tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert len(tokenizer) == model.config.vocab_size == 49_152
    assert tokenizer.model_max_length == 8192


@pytest.mark.parametrize(
    "text", ["Hello, world!", "naïve 你好 🎉\n\n\t x = 3.14", "<|im_start|>user\nhi<|im_end|>", ""]
)
def test_its_tokenizer_gives_texts_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


# References of the real model


@pytest.fixture(scope="module")
def measured():
    """A job of two ranks, and the same three steps under each strategy: by notebook 00 in the browser, or else here."""
    return kept(THREE_RUNS) or measured_here()


def measured_here():
    ranks = launch_zero3(2, "smollm2", lora_rank=8)
    return ranks, [run_strategy("clone"), run_strategy("adapter"), StrategyRun.from_ranks(ranks)]


@pytest.fixture(scope="module")
def ranks(measured):
    return measured[0]


@pytest.fixture(scope="module")
def runs(measured):
    return {run.strategy: run for run in measured[1]}


def test_three_strategies_give_one_kl(runs):
    clone, adapter, zero3 = (runs[strategy].kl for strategy in ("clone", "adapter", "zero3"))
    assert clone == adapter, "bit for bit"
    assert zero3 == pytest.approx(clone, rel=1e-2, abs=1e-6), "up to the rounding that AdamW's first steps amplify"
    assert clone[0] == zero3[0] == 0.0
    assert 0.01 < clone[1] < clone[2]


def test_three_strategies_send_three_bills(runs, model):
    whole = storage_bytes(model)
    assert runs["clone"].reference_bytes == whole
    assert runs["adapter"].reference_bytes == 0
    assert whole / 2 <= runs["zero3"].reference_bytes < whole / 2 + 2**20
    assert runs["clone"].peak - runs["adapter"].peak == whole
    assert runs["zero3"].owners["policy"] < runs["adapter"].owners["policy"] * 0.51


def test_training_all_weights_a_swap_gives_the_kl_of_a_clone(model):
    clone, swap = (run_strategy(strategy, lora_rank=None, seq=32) for strategy in ("clone", "swap"))
    assert clone.kl == swap.kl, "bit for bit"
    assert clone.kl[-1] > clone.kl[0] == 0.0
    assert swap.reference_bytes == clone.reference_bytes == storage_bytes(model)


def test_precomputed_log_probs_cost_no_memory(runs):
    run = run_strategy("precomputed")
    assert run.reference_bytes == run.owners["reference"] == 0
    assert run.kl[0] == 0.0 < run.kl[1] < run.kl[2]
    assert run.peak <= runs["adapter"].peak


def test_ranks_hold_the_same_reference_and_get_the_same_log_probs(ranks, model):
    clone = CloneReference(model)
    log_probs = clone.log_probs(**sample_batch("smollm2", batch=1, seq=64))
    for report in ranks.ranks:
        assert report.reference_fingerprint == report.reference_fingerprint_before == clone.fingerprint()
        # At step 0 the KL is 0, and the loss is the cross-entropy alone.
        assert report.loss[0] == pytest.approx(-log_probs.mean().item(), rel=1e-5)


def test_log_probs_of_clone_and_adapter_are_equal_and_the_reference_never_moves():
    policy = load_model("smollm2")
    clone = CloneReference(policy)
    policy = add_lora(policy, rank=8)
    adapter = AdapterReference(policy)
    batch = sample_batch("smollm2", batch=1, seq=32)
    log_probs, fingerprint = clone.log_probs(**batch), clone.fingerprint()
    assert torch.equal(adapter.log_probs(**batch), log_probs)
    assert train(policy, adapter, batch, steps=10, learning_rate=1e-3)[-1] > 0.1
    assert clone.fingerprint() == adapter.fingerprint() == fingerprint
    assert torch.equal(adapter.log_probs(**batch), clone.log_probs(**batch))
    assert torch.equal(clone.log_probs(**batch), log_probs)


def test_shared_layers_save_their_share(model):
    """A third of the layers and the embeddings shared: 1.53 times the weights instead of twice."""
    policy = load_model("smollm2")
    reference = CloneReference(policy, num_shared_layers=10)
    total = storage_bytes(policy) + reference.owned_bytes()
    assert total / storage_bytes(model) == pytest.approx(1.53, abs=0.01)
