"""The pocket model: shaped like SmolLM2, small enough for tests, random but always the same.

Its tokenizer knows the 256 bytes and three special tokens: any text becomes one token for each UTF-8 byte.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from refkl_lib.models.cache import note_origin, write_model

FOLDER = "pocket-1"  # a new number whenever the model or the tokenizer below changes
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_pocket(folder: Path) -> None:
    """Save the pocket model and its tokenizer to a folder."""
    write_model(pocket_model(), pocket_tokenizer(), folder)
    note_origin(folder, "seed", "random, and always the same")


def pocket_model() -> LlamaForCausalLM:
    """Return the pocket model, float32 on the CPU; PyTorch's random state is left as it was."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:  # the norms' scales stay 1
            # 0.1 is wide enough for predictions that are not a uniform guess.
            weight.data.normal_(std=0.1, generator=generator)
    return model


def pocket_tokenizer() -> PreTrainedTokenizerFast:
    """Return the pocket tokenizer: one token a byte."""
    vocabulary = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    # Byte-pair encoding without a single merge leaves the bytes.
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
