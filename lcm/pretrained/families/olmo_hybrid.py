"""OLMo-Hybrid: Gated DeltaNet with a layer of attention in four, each with norms of its own.

Layers of attention are those of OLMo 2 (arXiv:2501.00656): what they add is normalised, not what
they read, and queries and keys are, over all heads together. The others normalise what they read.
"""

import re
from typing import Any

import numpy as np

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.pretrained.families import llama
from lcm.pretrained.families.base import (
    FULL,
    HALVES,
    LINEAR,
    SAME,
    Config,
    Family,
    Weight,
    by_mixer,
    key_of,
    layer_names,
    need,
    period,
    rotations,
    sizes,
    sizes_to_hf,
)
from lcm.pretrained.source import Source

DELTA = "gated_deltanet"
MIXERS = {"linear_attention": DELTA, FULL: "attention"}
EPS = 1e-5  # of the norms of what is remembered, whatever the config says of the others


def read(hf: Config) -> dict[str, Any]:
    need(hf, "hidden_act", "silu")
    need(hf, "attention_bias", False)
    own, names, eps = sizes(hf), _names(hf), need(hf, "rms_norm_eps")
    key_heads = hf.get("linear_num_key_heads") or own["heads"]
    heads = hf.get("linear_num_value_heads") or own["heads"]
    state = hf.get("linear_key_head_dim") or int(0.75 * own["width"] / key_heads)
    size = hf.get("linear_value_head_dim") or 2 * state
    negative = bool(need(hf, "linear_allow_neg_eigval"))
    delta = {
        "mixer": DELTA,
        "heads": heads,
        "kv_heads": key_heads,
        "head_size": size,
        "state": state,
        "expand": heads * size / own["width"],
        "conv": need(hf, "linear_conv_kernel_dim"),
        "options": f"negative={negative}" + ("" if eps == EPS else f",eps={EPS}"),
    }
    attention = {
        "mixer": "attention",
        "pre_norm": False,
        "post_norm": True,
        "qk_norm": True,
        "options": "across=True",
    }
    kinds = {"linear_attention": delta, FULL: attention}
    return {
        **own,
        "pattern": period(names),
        "kinds": {name: kinds[name] for name in dict.fromkeys(names)},
        "positions": positions.config(_positions(hf)),
        "mlp": "swiglu",
        "norm": "rms",
        "norm_eps": eps,
    }


def _names(hf: Config) -> list[str]:
    """The kinds of layers, one after the other: both of them, as transformers asks for."""
    depth = need(hf, "num_hidden_layers")
    names = hf.get("layer_types")
    if names is None:
        names = [FULL if n % 4 == 3 else "linear_attention" for n in range(depth)]
        names = names if FULL in names else [*names[:-1], FULL]
    names = layer_names(hf, names, MIXERS)
    if missing := MIXERS.keys() - set(names):
        raise ConfigError(
            f"layer_types has no {missing.pop()}, OLMo-Hybrid has both kinds of layer"
        )
    return names


def _positions(hf: Config) -> positions.PositionEncoding:
    """RoPE, and none where the config says a base of null, as for the longest contexts."""
    plain = {key: value for key, value in hf.items() if key != "layer_types"}
    rope = plain.get("rope_scaling") or plain.get("rope_parameters") or {}
    if rope.get("rope_theta", plain.get("rope_theta")) is None:
        return positions.NoPE()
    return rotations(plain)[FULL]


def write(spec: ModelSpec, length: int) -> Config:
    found = by_mixer(spec, list(MIXERS.values()))
    delta, attention = found[DELTA], found["attention"]
    bare = isinstance(attention.positions, positions.NoPE)
    return {
        "model_type": "olmo_hybrid",
        **sizes_to_hf(spec, length),
        **(
            {"rope_parameters": {"rope_type": "default", "rope_theta": None}}
            if bare
            else positions.to_hf(attention.positions, spec.depth)
        ),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_size,
        "linear_num_key_heads": delta.kv_heads,
        "linear_num_value_heads": delta.heads,
        "linear_key_head_dim": delta.state,
        "linear_value_head_dim": delta.head_size,
        "linear_conv_kernel_dim": delta.conv,
        "linear_allow_neg_eigval": delta.option("negative"),
        "layer_types": [key_of(MIXERS, layer.mixer) for layer in spec.in_order],
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": spec.norm_eps,
    }


TAPS = re.compile(r"\.([qkv])_conv1d\.weight$")


class Recut:
    """A source whose taps of q, k and v have the channels of their projections.

    transformers (5.24) keeps the three in one tensor, and writes that in three parts of one size,
    whatever the channels are; it reads parts of any.
    """

    def __init__(self, source: Source):
        self.source, self.config, self.names = source, source.config, source.names
        self.held = frozenset(source.names())

    def shape(self, name: str) -> tuple[int, ...]:
        cut = self._cut(name)
        own = self.source.shape(name)
        return (cut.stop - cut.start, *own[1:]) if cut else own

    def read(self, name: str) -> np.ndarray:
        cut = self._cut(name)
        if cut is None:
            return self.source.read(name)
        return np.concatenate([self.source.read(each) for each in _three(name, "conv1d")])[cut]

    def _cut(self, name: str) -> slice | None:
        """The rows of the three together that are those of a name, unless it has them."""
        found = TAPS.search(name)
        if not found or not self.held.issuperset([*_three(name, "conv1d"), *_three(name, "proj")]):
            return None
        rows, wanted = (
            [self.source.shape(each)[0] for each in _three(name, kind)]
            for kind in ("conv1d", "proj")
        )
        if rows == wanted or sum(rows) != sum(wanted):
            return None
        at = "qkv".index(found[1])
        return slice(sum(wanted[:at]), sum(wanted[: at + 1]))


def _three(name: str, kind: str) -> list[str]:
    return [TAPS.sub(f".{each}_{kind}.weight", name) for each in "qkv"]


LAYER = "model.layers.{n}"
LINEAR_ATTENTION, ATTENTION = f"{LAYER}.linear_attn", f"{LAYER}.self_attn"
OURS = {"q": "q", "k": "k", "v": "v", "a": "a", "b": "beta", "g": "z", "o": "out"}


def _norm(name: str, path: str, mixer: str) -> Weight:
    return Weight(f"{LAYER}.{name}_layernorm.weight", (f"{path}/scale",), SAME, mixer)


OLMO_HYBRID = Family(
    types={"olmo_hybrid": "OlmoHybridForCausalLM"},
    read=read,
    write=write,
    defaults={
        **llama.LLAMA.defaults,
        "vocab_size": 100_352,
        "hidden_size": 3840,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 30,
        "max_position_embeddings": 65_536,
        "attention_bias": False,
        "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": True,
    },
    weights=(
        Weight("model.embed_tokens.weight", ("embedding/table",), SAME),
        Weight("model.norm.weight", ("final_norm/scale",), SAME),
        Weight("lm_head.weight", ("head/kernel",), LINEAR),
        *(Weight(f"{LAYER}.mlp.{half}_proj.weight", (f"mlp/{half}",), LINEAR) for half in HALVES),
        _norm("input", "mixer_norm", DELTA),
        _norm("post_attention", "mlp_norm", DELTA),
        _norm("post_attention", "mixer_post_norm", "attention"),
        _norm("post_feedforward", "mlp_post_norm", "attention"),
        *(
            Weight(f"{LINEAR_ATTENTION}.{name}_proj.weight", (f"mixer/{at}",), LINEAR, DELTA)
            for name, at in OURS.items()
        ),
        *(
            Weight(f"{LINEAR_ATTENTION}.{name}_conv1d.weight", (f"mixer/conv_{name}",), LINEAR)
            for name in "qkv"
        ),
        Weight(f"{LINEAR_ATTENTION}.A_log", ("mixer/A_log",), SAME),
        Weight(f"{LINEAR_ATTENTION}.dt_bias", ("mixer/dt_bias",), SAME),
        Weight(f"{LINEAR_ATTENTION}.o_norm.weight", ("mixer/norm/scale",), SAME),
        *(
            Weight(f"{ATTENTION}.{name}_proj.weight", (f"mixer/{OURS[name]}",), LINEAR, "attention")
            for name in "qkvo"
        ),
        *(Weight(f"{ATTENTION}.{n}_norm.weight", (f"mixer/{n}_norm/scale",), SAME) for n in "qk"),
    ),
    # As OLMo-core names them, and transformers with it where it writes.
    renamed=(
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ),
    harmless=(llama.ROTATIONS,),
    view=Recut,
)
