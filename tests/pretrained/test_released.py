"""Configs of released models, as they lie on the hub: sizes, positions, windows.

Numbers of parameters are those that the releases state (the hub's count of the safetensors, for
Pythia table 1 of arXiv:2304.01373), which a wrong bias, norm or tie would miss.
"""

from typing import Any

import pytest

from lcm import models, positions
from lcm.pretrained.assemble import read_config
from lcm.pretrained.families import family_of
from lcm.pretrained.layout import layout, tensor_shapes


def config(kind: str, width: int, hidden: int, depth: int, heads: int, **keys: Any) -> dict:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        **keys,
    }


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
RELEASED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 3.1 8B": (
        config("llama", 4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256,
               rope_theta=500000.0, rope_scaling=LLAMA3, max_position_embeddings=131072,
               rms_norm_eps=1e-5, attention_bias=False, mlp_bias=False, pretraining_tp=1),
        8_030_261_248,
    ),
    "SmolLM2 135M": (
        config("llama", 576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49152,
               rope_theta=100000, rope_interleaved=False, max_position_embeddings=8192,
               rms_norm_eps=1e-5, tie_word_embeddings=True, is_llama_config=True),
        134_515_008,
    ),
    "Mistral 7B": (
        config("mistral", 4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=32000,
               rope_theta=10000.0, max_position_embeddings=32768, sliding_window=4096,
               rms_norm_eps=1e-5),
        7_241_732_096,
    ),
    "Qwen 2.5 7B": (
        config("qwen2", 3584, 18944, 28, 28, num_key_value_heads=4, vocab_size=152064,
               rope_theta=1000000.0, max_position_embeddings=131072, sliding_window=131072,
               use_sliding_window=False, max_window_layers=28),
        7_615_616_512,
    ),
    "Qwen 3 8B": (
        config("qwen3", 4096, 12288, 36, 32, num_key_value_heads=8, vocab_size=151936,
               head_dim=128, rope_theta=1000000, rope_scaling=None, attention_bias=False,
               max_position_embeddings=40960, sliding_window=None, max_window_layers=36),
        8_190_735_360,
    ),
    "Gemma 2 9B": (
        config("gemma2", 3584, 14336, 42, 16, num_key_value_heads=8, vocab_size=256000,
               head_dim=256, rope_theta=10000.0, max_position_embeddings=8192,
               query_pre_attn_scalar=256, sliding_window=4096, hidden_act="gelu_pytorch_tanh"),
        9_241_705_984,
    ),
    "Gemma 3 1B": (
        config("gemma3_text", 1152, 6912, 26, 4, num_key_value_heads=1, vocab_size=262144,
               head_dim=256, rope_theta=1000000, rope_local_base_freq=10000, rope_scaling=None,
               sliding_window=512, sliding_window_pattern=6, max_position_embeddings=32768),
        999_885_952,
    ),
    "Phi-3 mini": (
        config("phi3", 3072, 8192, 32, 32, num_key_value_heads=32, vocab_size=32064,
               rope_theta=10000.0, rope_scaling=None, sliding_window=2047,
               max_position_embeddings=4096, original_max_position_embeddings=4096),
        3_821_079_552,
    ),
    "Pythia 160M": (
        config("gpt_neox", 768, 3072, 12, 12, vocab_size=50304, rotary_emb_base=10000,
               rotary_pct=0.25, max_position_embeddings=2048, use_parallel_residual=True),
        162_322_944,
    ),
    "BLOOM 560M": (
        {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16,
         "vocab_size": 250880, "seq_length": 2048, "offset_alibi": 100, "hidden_dropout": 0.0},
        559_214_592,
    ),
    "MPT 7B": (
        {"model_type": "mpt", "d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432,
         "max_seq_len": 2048, "expansion_ratio": 4, "no_bias": True, "learned_pos_emb": True,
         "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "qk_ln": False,
                         "attn_type": "multihead_attention", "clip_qkv": None,
                         "prefix_lm": False, "softmax_scale": None}},
        6_649_286_656,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_are_as_many_as_released(name):
    hf, published = RELEASED[name]
    family = family_of(hf)
    cfg = read_config(family, hf)
    assert models.parameter_count(cfg) == published
    shapes = tensor_shapes(layout(family, models.spec(cfg)))
    assert len(shapes) > 5 * cfg.model.depth


def test_what_releases_are_known_for():
    found = {n: read_config(family_of(hf), hf) for n, (hf, _) in RELEASED.items()}
    llama, gemma2, gemma3 = (found[n] for n in ("Llama 3.1 8B", "Gemma 2 9B", "Gemma 3 1B"))
    assert positions.make(llama.model.positions) == positions.Llama3(
        base=500_000.0, factor=8.0, original=8192
    )
    assert llama.data.length == 131072 and llama.model.norm_eps == 1e-5
    assert (gemma2.model.score_cap, gemma2.model.logit_cap) == (50.0, 30.0)
    assert gemma2.model.score_scale == 0 and gemma2.model.embed_scale == 3584**0.5
    assert gemma3.model.pattern.count("sliding_attention") == 5
    assert gemma3.model.kinds.sliding_attention.window == 512
    assert gemma3.model.kinds.sliding_attention.positions.base == 10_000
    assert gemma3.model.positions.base == 1_000_000 and gemma3.model.qk_norm
    assert found["Qwen 2.5 7B"].model.window == 0 and found["Phi-3 mini"].model.window == 2047
    assert found["Pythia 160M"].model.positions.fraction == 0.25


def test_a_sparse_config_of_the_text_part_is_filled_in():
    """Gemma 3 4B says six things of its text part; the rest are defaults of its class."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    hf = {"model_type": "gemma3", "text_config": text}
    cfg = read_config(family_of(hf), hf)
    model = cfg.model
    assert (model.heads, model.kv_heads, model.head_size, model.vocab) == (8, 4, 256, 262208)
    assert model.tied and model.mlp == "geglu" and cfg.data.length == 131072
    assert positions.make(model.positions) == positions.Linear(base=1e6, factor=8.0)
    assert model.kinds.sliding_attention.positions.base == 10_000
