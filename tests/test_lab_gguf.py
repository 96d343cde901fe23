"""A GGUF file becomes an ordinary model: dequantised, trainable, able to be saved."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from overtone.lab.model.gguf import is_gguf, load_gguf

WORDS = ["<s>", "</s>", "<unk>", "a", "b", "ab", *(f"w{index}" for index in range(26))]
HIDDEN, INNER = 32, 64


def write_llama(path):
    """One block, random weights, the projections in Q8_0."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    shapes = {
        "token_embd": (len(WORDS), HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN, HIDDEN),
        "blk.0.attn_v": (HIDDEN, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
        "output": (len(WORDS), HIDDEN),
    }
    for name, shape in shapes.items():
        weight = gguf.quantize(rng.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", weight, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_weights_are_those_that_the_file_holds_and_the_model_can_be_saved(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_llama(path)
    model, tokenizer = load_gguf(path)
    held = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    mlp = model.model.layers[0].mlp
    for name, weight in (("gate", mlp.gate_proj), ("up", mlp.up_proj), ("down", mlp.down_proj)):
        torch.testing.assert_close(weight.weight.detach(), torch.tensor(held[f"blk.0.ffn_{name}.weight"]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert tokenizer("ab").input_ids[-1] == WORDS.index("ab")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        load_gguf(tmp_path / "none.gguf")


def test_a_file_is_told_from_a_folder_by_its_ending():
    assert is_gguf("models/Gemma-Q4.GGUF")
    assert not is_gguf("models/gguf")
