"""Zamba2 (arXiv:2411.15242): Mamba-2, and blocks of attention and MLP that layers use in turn.

A hybrid layer of theirs is two of ours: a use of a block, and the Mamba-2 that reads what it gives.
Where transformers decodes by single tokens it does not bound time steps from below, as it does in
whole texts; here they are bounded in both.
"""

import itertools
from typing import Any

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.pretrained.families.base import (
    FULL,
    FUSED,
    LINEAR,
    SAME,
    Config,
    Family,
    Weight,
    by_mixer,
    choose,
    key_of,
    layer_names,
    need,
    period,
    rotations,
)
from lcm.pretrained.families.mamba import inside_mamba2, plain_expand

MIXERS = {"mamba2", "shared_attention"}
ACTIVATIONS = {"gelu": "geglu_exact", "gelu_pytorch_tanh": "geglu", "silu": "swiglu"}
KINDS = {"mamba": "mamba2", "linear_attention": "mamba2", "hybrid": "hybrid"}
NORM_EPS = 1e-5  # of the norm within Mamba-2, whatever rms_norm_eps


def read(hf: Config) -> dict[str, Any]:
    need(hf, "add_bias_linear", False)
    need(hf, "use_conv_bias", True)
    need(hf, "use_long_context", False)
    width, heads = need(hf, "hidden_size"), need(hf, "num_attention_heads")
    names = _names(hf)
    blocks = need(hf, "num_mem_blocks")
    turns = (f"block_{n % blocks}" for n in itertools.count())
    ours: list[str] = []
    for name in names:
        ours += [next(turns), "mamba2"] if name == "hybrid" else [name]
    pattern = period(ours)
    if pattern[-1] != "mamba2":  # a use and what reads it stand in one round
        pattern = tuple(ours)
    size, adapted = 2 * width // heads, bool(need(hf, "use_shared_attention_adapter"))
    shared = {
        "mixer": "shared_attention",
        "mlp": choose(hf, "hidden_act", ACTIVATIONS),
        "hidden": hf.get("intermediate_size") or 4 * width,
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_size": size,
        "score_scale": (size / 2) ** -0.5,
    }
    options = f"rank={need(hf, 'adapter_rank')},adapted={adapted}"
    kinds = {
        name: {**shared, "options": f"block={name.removeprefix('block_')},{options}"}
        for name in dict.fromkeys(pattern)
        if name != "mamba2"
    }
    encoding = rotations(hf)[FULL] if need(hf, "use_mem_rope") else positions.NoPE()
    return {
        "mixer": "mamba2",
        "pattern": pattern,
        "kinds": kinds,
        "mlp": "none",
        "width": width,
        "depth": len(ours),
        "vocab": need(hf, "vocab_size"),
        # Where embeddings are not tied, transformers does not tie uses of a block either.
        "tied": need(hf, "tie_word_embeddings", True),
        "heads": need(hf, "n_mamba_heads"),
        "state": need(hf, "mamba_d_state"),
        "conv": need(hf, "mamba_d_conv"),
        "expand": need(hf, "mamba_expand"),
        "groups": need(hf, "mamba_ngroups"),
        "options": f"least_step={need(hf, 'time_step_min')}",
        "norm": "rms",
        "norm_eps": need(hf, "rms_norm_eps", NORM_EPS),
        "positions": positions.config(encoding),
    }


def _names(hf: Config) -> list[str]:
    """The kinds of layers, one after the other: `mamba2` or `hybrid`."""
    names = hf.get("layers_block_type") or hf.get("layer_types")
    if names is None:
        at = range(6, 43, 6), (47, 51)  # of 54 layers, which transformers takes
        names = ["hybrid" if n in itertools.chain(*at) else "mamba" for n in range(54)]
    names = layer_names(hf, names, KINDS, "layers_block_type")
    if "hybrid" not in names:
        raise ConfigError("layers_block_type has no hybrid layer: that is mamba2, not zamba2")
    return [KINDS[name] for name in names]


def write(spec: ModelSpec, length: int) -> Config:
    found = by_mixer(spec, sorted(MIXERS))
    layers, places = spec.in_order, places_of(spec)
    mamba, shared = found["mamba2"], found["shared_attention"]
    names = ["hybrid" if p["stem"] else "linear_attention" for p in places if "use" not in p]
    rotated = not isinstance(shared.positions, positions.NoPE)
    return {
        "model_type": "zamba2",
        "hidden_size": spec.width,
        "num_hidden_layers": len(names),
        "layers_block_type": names,
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied,
        "max_position_embeddings": length,
        "rms_norm_eps": spec.norm_eps,
        "mamba_d_state": mamba.state,
        "mamba_d_conv": mamba.conv,
        "mamba_expand": plain_expand(mamba),
        "mamba_ngroups": mamba.groups,
        "n_mamba_heads": mamba.heads,
        "time_step_min": mamba.option("least_step"),
        "num_mem_blocks": len({layer.option("block") for layer in layers if layer.shares}),
        "num_attention_heads": shared.heads,
        "num_key_value_heads": shared.kv_heads,
        "intermediate_size": shared.hidden,
        "hidden_act": key_of(ACTIVATIONS, shared.mlp),
        "adapter_rank": shared.option("rank"),
        "use_shared_attention_adapter": shared.option("adapted"),
        "use_mem_rope": rotated,
        **(positions.to_hf(shared.positions, spec.depth) if rotated else {}),
    }


def places_of(spec: ModelSpec) -> list[dict[str, Any]]:
    """What names of tensors have for each layer of ours.

    n: the number of their layer.
    stem: where its Mamba-2 lies within it.
    home, use: of a use, their layer that has its block's tensors, and its number among the uses.
    """
    places, n, use, homes = [], 0, 0, {}
    for layer, before in zip(spec.in_order, [None, *spec.in_order], strict=False):
        if layer.shares:
            home = homes.setdefault(layer.option("block"), n)
            places.append({"n": n, "stem": "", "home": home, "use": use})
            use += 1
        else:
            stem = "mamba_decoder." if before is not None and before.shares else ""
            places.append({"n": n, "stem": stem})
            n += 1
    return places


LAYER, MAMBA = "model.layers.{n}", "model.layers.{n}.{stem}mamba"
BLOCK, HOME = "model.layers.{n}.shared_transformer", "model.layers.{home}.shared_transformer"
MLP = f"{HOME}.feed_forward.gate_up_proj_adapter_list.{{use}}"


def _block(name: str, form: Any, *paths: str) -> Weight:
    return Weight(f"{BLOCK}.{name}.weight", paths, form, "blocks")


def _adapters(name: str) -> tuple[Weight, Weight]:
    theirs = f"{HOME}.self_attn.linear_{name}_adapter_list.{{use}}"
    return (
        Weight(f"{theirs}.0.weight", (f"mixer/{name}_down",), LINEAR),
        Weight(f"{theirs}.1.weight", (f"mixer/{name}_up",), LINEAR),
    )


ZAMBA2 = Family(
    types={"zamba2": "Zamba2ForCausalLM"},
    read=read,
    write=write,
    defaults={
        "mamba_d_state": 64,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "time_step_min": 0.001,
        "use_conv_bias": True,
        "add_bias_linear": False,
        "hidden_act": "gelu",
        "num_mem_blocks": 1,
        "use_shared_attention_adapter": False,
        "adapter_rank": 128,
        "use_mem_rope": False,
        "use_long_context": False,
        "rms_norm_eps": NORM_EPS,
        "max_position_embeddings": 4096,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
    },
    weights=(
        Weight("model.embed_tokens.weight", ("embedding/table",), SAME),
        Weight("model.final_layernorm.weight", ("final_norm/scale",), SAME),
        Weight("lm_head.weight", ("head/kernel",), LINEAR),
        Weight(f"{LAYER}.{{stem}}input_layernorm.weight", ("mixer_norm/scale",), SAME),
        *inside_mamba2(MAMBA),
        Weight(f"{LAYER}.linear.weight", ("mixer/linear",), LINEAR),
        _block("input_layernorm", SAME, "norm/scale"),
        *(_block(f"self_attn.{name}_proj", LINEAR, name) for name in "qkv"),
        _block("self_attn.o_proj", LINEAR, "out"),
        _block("pre_ff_layernorm", SAME, "mlp_norm/scale"),
        _block("feed_forward.gate_up_proj", FUSED, "mlp/gate", "mlp/up"),
        _block("feed_forward.down_proj", LINEAR, "mlp/down"),
        Weight(f"{MLP}.0.weight", ("mixer/mlp_down",), LINEAR),
        Weight(f"{MLP}.1.weight", ("mixer/gate_up", "mixer/up_up"), FUSED),
        *(weight for name in "qkv" for weight in _adapters(name)),
    ),
    # A block again at another of its uses.
    harmless=(
        r"\.shared_transformer\.(self_attn\.[qkvo]_proj|\w+_layernorm)\.weight$",
        r"\.shared_transformer\.feed_forward\.(gate_up|down)_proj\.weight$",
    ),
    places=places_of,
)
