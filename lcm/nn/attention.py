"""Attention as a mixer: projections, positions, one call of `attend`."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.errors import ConfigError
from lcm.nn.bias import add_biases, biased
from lcm.nn.cache import KVCache, PagedKVCache, contiguous
from lcm.nn.dense import from_heads, matrix, to_heads, whole
from lcm.nn.norm import RMSNorm
from lcm.nn.spec import LayerSpec
from lcm.ops import attention
from lcm.ops.attention.decode import decode
from lcm.ops.platform import platform
from lcm.positions import PositionEncoding
from lcm.types import Array, Context, Hidden, Keys, Queries, Values

Cache = KVCache | PagedKVCache


class Attention(nnx.Module):
    """Multi-head attention with shared key heads (GQA, arXiv:2305.13245), behind the mixer seam.

    Option `gated` multiplies what is attended by `sigmoid(x W_gate)` (arXiv:2505.06708), as in
    Qwen3-Next. Option `across` has `qk_norm` take all heads of a token together, with a scale for
    each channel of each (OLMo 2, arXiv:2501.00656, section 3.2).
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"gated": False, "across": False}

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec = spec
        query, key = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
        self.q = matrix(rngs, spec.width, query)
        self.k = matrix(rngs, spec.width, key)
        self.v = matrix(rngs, spec.width, key)
        self.out = matrix(rngs, query, spec.width, depth=spec.depth)
        if spec.option("gated"):
            self.gate = matrix(rngs, spec.width, query)
        add_biases(self, spec.biases, q=query, k=key, v=key, out=spec.width)
        if spec.qk_norm:
            sizes = (query, key) if spec.option("across") else (spec.head_size, spec.head_size)
            self.q_norm, self.k_norm = (RMSNorm(size, spec.norm_eps) for size in sizes)
        add_positions(self, spec, rngs)

    @staticmethod
    def check(spec: LayerSpec) -> None:
        """Refuses an option that nothing would use."""
        if spec.option("across") and not spec.qk_norm:
            raise ConfigError(
                "model.options=across=True says how model.qk_norm=False normalises: set it to True"
            )

    def __call__(
        self, x_BLD: Hidden, context: Context, state: Cache | None, shared: dict[str, Any]
    ) -> tuple[Hidden, Cache | None]:
        spec = self.spec
        params = encoding_params(self, shared)
        q_BLHK, k_BLGK, v_BLGK = self._project(params, x_BLD, context)
        o_BLHK, state = attended(spec, params, q_BLHK, k_BLGK, v_BLGK, context, state)
        if spec.option("gated"):
            o_BLHK *= jax.nn.sigmoid(to_heads(x_BLD, self.gate[...], spec.head_size))
        out_ED = whole(self.out[...], x_BLD, "heads", "width")
        return biased(self, "out", from_heads(o_BLHK, out_ED)), state

    def parts(
        self, x_BLD: Hidden, context: Context, shared: dict[str, Any]
    ) -> tuple[attention.Part, ...]:
        """The parts of attention over the tokens themselves, for looking at scores."""
        params = encoding_params(self, shared)
        q_BLHK, k_BLGK, _ = self._project(params, x_BLD, context)
        parts = self.spec.positions.parts(params, q_BLHK, k_BLGK, context, context)
        return tuple(limited(part, self.spec) for part in parts)

    def _project(
        self, params: dict[str, Any], x_BLD: Hidden, context: Context
    ) -> tuple[Queries, Keys, Values]:
        """Queries, keys as a cache holds them, and values."""
        spec, encoding = self.spec, self.spec.positions
        placed_BLD = encoding.infuse(params, x_BLD, context)
        made_of = (("q", placed_BLD), ("k", placed_BLD), ("v", x_BLD))
        q_BLHK, k_BLGK, v_BLGK = (self._heads(x, name) for name, x in made_of)
        if spec.qk_norm:
            q_BLHK, k_BLGK = self._normed("q_norm", q_BLHK), self._normed("k_norm", k_BLGK)
        if spec.score_scale:  # attention divides by sqrt(K) whatever the encoding
            q_BLHK = q_BLHK * (spec.score_scale * spec.head_size**0.5)
        return q_BLHK, encoding.keys(params, k_BLGK, context), v_BLGK

    def _normed(self, norm: str, x_BLHK: Array) -> Array:
        own = x_BLHK.reshape(*x_BLHK.shape[:2], -1) if self.spec.option("across") else x_BLHK
        return getattr(self, norm)(own).reshape(x_BLHK.shape)

    def _heads(self, x_BLD: Hidden, name: str) -> Array:
        """Queries, keys or values `[B, L, H, K]`."""
        w_DE = whole(getattr(self, name)[...], x_BLD, "width", "heads")
        x_BLHK = to_heads(x_BLD, w_DE, self.spec.head_size)
        flat_BLE = x_BLHK.reshape(*x_BLD.shape[:2], -1)
        return biased(self, name, flat_BLE).reshape(x_BLHK.shape)

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int, dtype: jnp.dtype, chunk: int = 0
    ) -> KVCache:
        """An empty cache for `length` tokens a row.

        With `chunk`, the most tokens of one call, a layer that reaches back only so far keeps a
        ring: its first tokens and those that the queries of a call can see.
        """
        return cache(spec, batch, length, dtype, chunk, spec.kv_heads, spec.head_size)

    @staticmethod
    def whole(spec: LayerSpec) -> bool:
        """Whether a state has all tokens apart, so that some can be taken out of it."""
        return not reach(spec)[1]

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass, mean over a causal sequence of `length`."""
        columns = (2 + spec.option("gated")) * spec.heads + 2 * spec.kv_heads
        projections = 2 * spec.width * spec.head_size * columns
        return projections + 4 * spec.heads * spec.head_size * visible(spec, length)

    @staticmethod
    def state_bytes(spec: LayerSpec, itemsize: int) -> int:
        """Bytes of cache that one token needs, positions and segments included."""
        return 2 * spec.kv_heads * spec.head_size * itemsize + 8


def cache(
    spec: LayerSpec,
    batch: int,
    length: int,
    dtype: jnp.dtype,
    chunk: int,
    heads: int,
    size: int,
    v_size: int = 0,
) -> KVCache:
    """An empty cache of what a layer keeps of each token, whole or a ring: `init_state`."""
    sinks, window = reach(spec)
    slots = sinks + window - 1 + chunk
    if chunk and window and slots < length:
        return contiguous(batch, slots, heads, size, dtype, sinks, chunk, v_size)
    return contiguous(batch, length, heads, size, dtype, v_size=v_size)


def attended(
    spec: LayerSpec,
    params: dict[str, Any],
    q_BLHK: Queries,
    k_BLGK: Keys,
    v_BLGK: Values,
    context: Context,
    state: Cache | None,
) -> tuple[Queries, Cache | None]:
    """What each query finds among the tokens and those of the cache, and the cache with them.

    params: of the encoding, `encoding_params`; keys as the encoding lets them be cached.
    """
    if state is not None:
        state = state.append(k_BLGK, v_BLGK, context)
        k_BSGK, v_BSGK, k_context = state.view()
    else:
        k_BSGK, v_BSGK, k_context = k_BLGK, v_BLGK, context
    if isinstance(state, PagedKVCache) and platform() == "tpu":
        o_BLHK = _in_pages(spec, params, q_BLHK, k_BSGK, state, context, k_context)
        if o_BLHK is not None:
            return o_BLHK, state
    o_BLHK = spec.positions.attend(
        params,
        q_BLHK,
        k_BSGK,
        v_BSGK,
        context,
        k_context,
        limit=lambda part: limited(part, spec),
        backend=spec.backend,
        over=spec.over,
    )
    return o_BLHK, state


def _in_pages(
    spec: LayerSpec,
    params: dict[str, Any],
    q_BLHK: Queries,
    k_BSGK: Keys,
    state: PagedKVCache,
    context: Context,
    k_context: Context,
) -> Queries | None:
    """One step's attention by the kernel that reads pages where they lie.

    `None` where it does not serve: for several tokens, for parts that see other keys than the
    cached ones, such as keys rotated as they are read, and for attention that is no parts.
    """
    encoding = spec.positions
    plain = type(encoding.attending).attend is PositionEncoding.attend
    if q_BLHK.shape[1] > 1 or not plain:
        return None
    parts = encoding.parts(params, q_BLHK, k_BSGK, context, k_context)
    if any(part.k_BSGK is not k_BSGK or part.blocks is not None for part in parts):
        return None
    found = [
        decode(part.q_BLHK, state.cache, mask=part.mask, score_mod=part.score_mod)
        for part in (limited(part, spec) for part in parts)
    ]
    return attention.merge(*found).out_BLHK


def encoding_params(module: nnx.Module, shared: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the encoding: those that layers share, and the layer's own `positions`."""
    own = dict(getattr(module, "positions", {}))
    return _merged(shared, jax.tree.map(lambda p: p[...], own, is_leaf=_is_param))


def add_positions(module: nnx.Module, spec: LayerSpec, rngs: nnx.Rngs) -> None:
    """Gives a module what the encoding learns for each layer, as `positions`, if it does."""
    params = spec.positions.init_layer(rngs.params(), spec.dims)
    if params:
        module.positions = nnx.data(jax.tree.map(nnx.Param, params))


def visible(spec: LayerSpec, length: int) -> float:
    """Keys that a query sees, mean over a causal sequence of `length`."""
    window = min(spec.window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def _merged(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Both in one, nested as a chain of encodings nests them; they share no names."""
    both = {name: _merged(shared[name], own[name]) for name in shared.keys() & own.keys()}
    return {**shared, **own, **both}


def _is_param(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Param)


def limited(part: attention.Part, spec: LayerSpec) -> attention.Part:
    """The part with what the layer, not the encoding, says about attention: window and cap."""
    mask = part.mask & attention.causal()
    mask = mask & attention.window(spec.window) if spec.window else mask
    cap = attention.SoftCap(spec.score_cap) if spec.score_cap else None
    mod = attention.compose(cap, part.score_mod)
    return dataclasses.replace(part, mask=mask, score_mod=mod)


def reach(spec: LayerSpec) -> tuple[int, int]:
    """The first and the latest keys that a layer can see: counts, the latter 0 for all of them."""
    sinks, window = spec.positions.reach
    windows = [size for size in (window, spec.window) if size]
    return sinks, min(windows, default=0)
