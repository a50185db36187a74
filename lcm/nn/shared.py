"""A transformer block that several layers use, each with a few parameters of its own: Zamba2's."""

import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from lcm.errors import ConfigError
from lcm.nn.attention import (
    Attention,
    Cache,
    add_positions,
    attended,
    encoding_params,
    visible,
)
from lcm.nn.bias import add_biases, biased
from lcm.nn.cache import KVCache
from lcm.nn.dense import dense, matrix
from lcm.nn.functional import Functional, functional
from lcm.nn.mlp import DENSE, Gated
from lcm.nn.norm import NORMS
from lcm.nn.spec import LayerSpec
from lcm.types import Array, Context, Hidden

# What a layer is given besides the parameters of encodings.
BLOCK, EMBEDDING, ASIDE = "block", "embedding", "aside"


class SharedBlock(nnx.Module):
    """Attention and MLP over `[x, e]`, the stream and the embeddings, of width 2 D.

        n = norm([x, e]),  q = n (W_q + A_q B_q),  k and v likewise
        m = norm(attend(q, k, v) W_out)
        y = (act(m (W_gate + A B_gate)) m (W_up + A B_up)) W_down

    It has no residuals: what comes of x is in y alone. A and B are of the layer that uses it.
    """

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec = spec
        query, key = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
        self.norm = NORMS[spec.norm](2 * spec.width, spec.norm_eps)
        self.q = matrix(rngs, 2 * spec.width, query)
        self.k = matrix(rngs, 2 * spec.width, key)
        self.v = matrix(rngs, 2 * spec.width, key)
        self.out = matrix(rngs, query, spec.width)
        add_biases(self, spec.biases, q=query, k=key, v=key, out=spec.width)
        self.mlp_norm = NORMS[spec.norm](spec.width, spec.norm_eps)
        self.mlp = DENSE[spec.mlp](spec, rngs)

    def __call__(
        self,
        x_BLD: Hidden,
        embedding_BLD: Hidden,
        context: Context,
        state: Cache | None,
        adapters: dict[str, Array],
        params: dict[str, Any],
    ) -> tuple[Hidden, Cache | None]:
        """y and the cache after it; `params` are those of the encoding."""
        spec, encoding = self.spec, self.spec.positions
        both = self.norm(jnp.concatenate([x_BLD, embedding_BLD], -1))  # [B, L, 2 D]
        placed = encoding.infuse(params, both, context)

        def by_head(name: str, x: Array) -> Array:
            y = biased(self, name, dense(x, getattr(self, name)[...]))
            y += _adapted(adapters, f"{name}_down", f"{name}_up", x)
            return y.reshape(*y.shape[:2], -1, spec.head_size)

        q_BLHK, k_BLGK, v_BLGK = by_head("q", placed), by_head("k", placed), by_head("v", both)
        if spec.score_scale:  # attention divides by sqrt(K) whatever the encoding
            q_BLHK = q_BLHK * (spec.score_scale * spec.head_size**0.5)
        k_BLGK = encoding.keys(params, k_BLGK, context)
        o_BLHK, state = attended(spec, params, q_BLHK, k_BLGK, v_BLGK, context, state)
        o_BLE = o_BLHK.reshape(*x_BLD.shape[:2], -1)
        m_BLD = self.mlp_norm(biased(self, "out", dense(o_BLE, self.out[...])))
        gate_BLF, up_BLF = self.mlp.halves(m_BLD)
        gate_BLF += _adapted(adapters, "mlp_down", "gate_up", m_BLD)
        up_BLF += _adapted(adapters, "mlp_down", "up_up", m_BLD)
        return self.mlp.joined(gate_BLF, up_BLF), state


def _adapted(adapters: dict[str, Array], down: str, up: str, x: Array) -> Array | float:
    """`x A B`, nothing where there is no such adapter."""
    return dense(dense(x, adapters[down]), adapters[up]) if up in adapters else 0.0


@functools.cache
def block(spec: LayerSpec) -> Functional:
    """The functions of the block that a layer uses."""
    return functional(lambda rngs: SharedBlock(spec, rngs))


class SharedAttention(nnx.Module):
    """A use of a block that other layers use, too (Zamba2, arXiv:2411.15242, section 2).

    Its output, through a matrix of its own, is no part of the residual stream: the next layer adds
    it to what its norm reads, `x + mixer(norm(x + y))`. Option `block` is the number of the block,
    so that `model.pattern` says in which order several are used; `rank` is that of the adapters
    of the MLP, 0 for none, and `adapted` gives q, k and v some as well. They begin with B = 0.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"block": 0, "rank": 0, "adapted": False}
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {"block": (0, 999), "rank": (0, 2**20)}
    READS = 2  # times the width

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec = spec
        self.linear = matrix(rngs, spec.width, spec.width, depth=spec.depth)
        for name, (fan_in, fan_out) in _adapters(spec).items():
            down = name.endswith("_down")
            own = matrix(rngs, fan_in, fan_out) if down else nnx.Param(jnp.zeros((fan_in, fan_out)))
            setattr(self, name, own)
        add_positions(self, spec, rngs)

    @staticmethod
    def check(spec: LayerSpec) -> None:
        """Refuses what the block does not have."""
        gated = [name for name, mlp in DENSE.items() if issubclass(mlp, Gated)]
        if spec.mlp not in gated:
            raise ConfigError(
                f"model.mlp={spec.mlp} in a layer of shared_attention, whose block has a gated "
                f"one: choose from {', '.join(gated)}"
            )
        for key in ("post_norm", "qk_norm", "parallel"):
            if getattr(spec, key):
                raise ConfigError(
                    f"model.{key}=True in a layer of shared_attention, whose block has no such "
                    "thing: set it to False in its kind"
                )
        if spec.residual_scale != 1:
            raise ConfigError(
                f"model.residual_scale={spec.residual_scale} in a layer of shared_attention, which "
                "adds nothing to the stream: set it to 1 in its kind"
            )
        if spec.option("adapted") and not spec.option("rank"):
            raise ConfigError(
                "model.options=adapted=True with rank=0 adapts nothing: give the rank of the "
                "adapters, as in rank=128"
            )

    def __call__(
        self, x_BLD: Hidden, context: Context, state: Cache | None, shared: dict[str, Any]
    ) -> tuple[Hidden, Cache | None]:
        if BLOCK not in shared:
            raise ConfigError(
                "a layer of shared_attention has no block here: use it in a decoder that reads "
                "forwards and in one piece, without layers in other orders, decimation or "
                "compression"
            )
        encoding = {name: own for name, own in shared.items() if name not in (BLOCK, EMBEDDING)}
        y_BLD, state = block(self.spec).apply(
            shared[BLOCK],
            x_BLD,
            shared[EMBEDDING],
            context,
            state,
            {name: getattr(self, name)[...] for name in _adapters(self.spec)},
            encoding_params(self, encoding),
        )
        return dense(y_BLD, self.linear[...]), state

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int, dtype: jnp.dtype, chunk: int = 0
    ) -> KVCache:
        """An empty cache, as of attention: each use has keys and values of its own."""
        return Attention.init_state(spec, batch, length, dtype, chunk)

    @staticmethod
    def whole(spec: LayerSpec) -> bool:
        """Whether a state has all tokens apart, as of attention."""
        return Attention.whole(spec)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass, without those of the MLP's three matrices."""
        size, more = spec.head_size, sum(a * b for a, b in _adapters(spec).values())
        columns = 2 * (spec.heads + 2 * spec.kv_heads) + spec.heads  # those of q, k, v read 2 D
        own = 2 * (spec.width * (size * columns + spec.width) + more)
        return own + 4 * spec.heads * size * visible(spec, length)

    @staticmethod
    def state_bytes(spec: LayerSpec, itemsize: int) -> int:
        """Bytes of cache that one token needs."""
        return Attention.state_bytes(spec, itemsize)


def _adapters(spec: LayerSpec) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the matrices A (`_down`) and B (`_up`) by name."""
    rank, sizes = spec.option("rank"), {}
    if rank:
        up = (rank, spec.hidden)
        sizes = {"mlp_down": (spec.width, rank), "gate_up": up, "up_up": up}
    if spec.option("adapted"):
        heads = {"q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}
        for name, count in heads.items():
            sizes[f"{name}_down"] = 2 * spec.width, rank
            sizes[f"{name}_up"] = rank, count * spec.head_size
    return sizes
