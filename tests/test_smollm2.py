"""The real model, as `python -m refkl_lib.models fetch smollm2` left it."""

import pytest
import torch

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
