"""Multi-head latent attention: keys and values of all heads from a few numbers a token."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx

from lcm.errors import ConfigError
from lcm.nn.attention import Attention, add_positions, cache, encoding_params, limited, visible
from lcm.nn.bias import BIASES
from lcm.nn.cache import KVCache
from lcm.nn.dense import Int8, dense, from_heads, matrix, to_heads, whole
from lcm.nn.norm import RMSNorm
from lcm.nn.spec import LayerSpec
from lcm.ops import attention
from lcm.positions import PositionEncoding
from lcm.positions.base import Limit
from lcm.types import Array, Context, Hidden, Keys, Queries, Values


class Sizes(NamedTuple):
    """Of a head: what of queries and keys is its own, what of keys all share, values; and R."""

    own: int
    shared: int
    values: int
    rank: int


class LatentAttention(nnx.Module):
    """Multi-head latent attention (MLA, DeepSeek-V2, arXiv:2405.04434, section 2.1).

        c = norm(x W_latent)                   R numbers, of all heads
        s = positions(x W_shared)              a part of the key that heads share
        k_h = [s, c W_k,h],  v_h = c W_v,h
        q_h = [positions(r_h), u_h],  [u_h, r_h] = x W_q,h, or norm(x W_down) W_up,h
        out = sum_h attend(q_h, k_h, v_h) W_out,h       scores over sqrt of the size of k_h

    `head_size` is K, of u_h. Options: `rank` is R, 0 for 4 K; `shared` the size of s, 0 for K / 2,
    both as in section 2.1.4; `values` that of v_h, 0 for K; `query_rank` that of W_down, 0 for
    none; `eps` that of the norms, 0 for the model's. What positions add to scores, and how they
    scale queries, goes for the whole; what they rotate is s and r_h, nothing with `nope`, as in
    Kimi Linear.

    A cache holds s, as its keys, and c, as its values. A step multiplies W_k into queries and W_v
    into what they find, so that scores and sums are over c itself (end of section 2.1.2); calls of
    more tokens than that is cheaper for make keys and values of all that is cached.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {
        "rank": 0,
        "shared": 0,
        "values": 0,
        "query_rank": 0,
        "eps": 0.0,
    }
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "rank": (0, 2**20),
        "shared": (0, 2**20),
        "values": (0, 2**20),
        "query_rank": (0, 2**20),
        "eps": (0.0, 1.0),
    }

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, size = spec, sizes(spec)
        eps, query = spec.option("eps") or spec.norm_eps, spec.heads * (size.own + size.shared)
        low = spec.option("query_rank")
        if low:
            self.q_down = matrix(rngs, spec.width, low)
            self.q_norm = RMSNorm(low, eps)
            self.q_up = matrix(rngs, low, query)
        else:
            self.q = matrix(rngs, spec.width, query)
        self.latent = matrix(rngs, spec.width, size.rank)
        self.latent_norm = RMSNorm(size.rank, eps)
        self.shared = matrix(rngs, spec.width, size.shared)
        self.k_up = matrix(rngs, size.rank, spec.heads * size.own)
        self.v_up = matrix(rngs, size.rank, spec.heads * size.values)
        self.out = matrix(rngs, spec.heads * size.values, spec.width, depth=spec.depth)
        add_positions(self, spec, rngs)

    @staticmethod
    def check(spec: LayerSpec) -> None:
        """Refuses what a layer has none of, and positions that need keys as one piece."""
        if spec.kv_heads != spec.heads:
            raise ConfigError(
                f"model.kv_heads={spec.kv_heads} in a layer of latent_attention, which has keys "
                f"for each of heads={spec.heads}: set it to 0 in its kind"
            )
        if "q" in BIASES[spec.biases]:
            raise ConfigError(
                f"model.biases={spec.biases} gives attention biases, of which latent_attention has "
                "none: choose none or mlp"
            )
        if spec.qk_norm:
            raise ConfigError(
                "model.qk_norm=True in a layer of latent_attention, which normalises what keys are "
                "made of: set it to False in its kind"
            )
        kind, shared = type(spec.positions.attending), spec.dims.head_size
        if kind.attend is not PositionEncoding.attend:
            raise ConfigError(
                f"{kind.__name__} reads scores or chooses keys as it attends, latent_attention has "
                "keys in two parts: take another encoding"
            )
        if shared < 1:
            raise ConfigError(
                f"model.head_size={spec.head_size} leaves latent_attention {shared} numbers that "
                "heads share: give model.options=shared=2 or more"
            )
        if kind.keys is not PositionEncoding.keys and shared % 2:
            raise ConfigError(
                f"model.options=shared={shared} is the part of latent_attention that "
                f"{kind.__name__} rotates in pairs: make it even"
            )

    def __call__(
        self, x_BLD: Hidden, context: Context, state: KVCache | None, shared: dict[str, Any]
    ) -> tuple[Hidden, KVCache | None]:
        spec, size = self.spec, sizes(self.spec)
        params = encoding_params(self, shared)
        turned_BLHK, own_BLHK = self._queries(params, x_BLD, context)
        s_BS1K, c_BS1K = self._kept(params, x_BLD, context)
        k_context, absorbed = context, False
        if state is not None:
            state = state.append(s_BS1K, c_BS1K, context)
            s_BS1K, c_BS1K, k_context = state.view()
            absorbed = _cheaper_absorbed(size, x_BLD.shape[1])
        if absorbed:
            w_RHK, w_RHP = self._by_head("k_up", size.own), self._by_head("v_up", size.values)
            own_BLHK = _product("blhk,rhk->blhr", own_BLHK, w_RHK)
            k_BSGK = v_BSGP = c_BS1K
        else:
            k_BSGK, v_BSGP = self._expanded(x_BLD, c_BS1K)
        o_BLHP = spec.positions.attend(
            params,
            turned_BLHK,
            _for_heads(s_BS1K, k_BSGK),
            v_BSGP,
            context,
            k_context,
            limit=self._joining(params, own_BLHK, k_BSGK, context, k_context),
            scale=(size.own + size.shared) ** -0.5,
            backend=spec.backend,
            over=spec.over,
        )
        if absorbed:
            o_BLHP = _product("blhr,rhp->blhp", o_BLHP, w_RHP)
        return from_heads(o_BLHP, whole(self.out[...], x_BLD, "heads", "width")), state

    def parts(
        self, x_BLD: Hidden, context: Context, shared: dict[str, Any]
    ) -> tuple[attention.Part, ...]:
        """The parts of attention over the tokens themselves, for looking at scores."""
        params = encoding_params(self, shared)
        turned_BLHK, own_BLHK = self._queries(params, x_BLD, context)
        s_BL1K, c_BL1K = self._kept(params, x_BLD, context)
        k_BLHK, _ = self._expanded(x_BLD, c_BL1K)
        joined = self._joining(params, own_BLHK, k_BLHK, context, context)
        s_BLHK = _for_heads(s_BL1K, k_BLHK)
        parts = self.spec.positions.parts(params, turned_BLHK, s_BLHK, context, context)
        return tuple(map(joined, parts))

    def _queries(
        self, params: dict[str, Any], x_BLD: Hidden, context: Context
    ) -> tuple[Queries, Queries]:
        """What meets the shared part of keys, before positions, and what meets a head's own."""
        spec, size = self.spec, sizes(self.spec)
        both = size.own + size.shared
        x_BLD = spec.positions.infuse(params, x_BLD, context)
        if spec.option("query_rank"):
            low_BLR = self.q_norm(dense(x_BLD, self.q_down[...]))
            q_BLHK = to_heads(low_BLR, whole(self.q_up[...], x_BLD, "width", "heads"), both)
        else:
            q_BLHK = to_heads(x_BLD, whole(self.q[...], x_BLD, "width", "heads"), both)
        if spec.score_scale:
            q_BLHK = q_BLHK * (spec.score_scale * both**0.5)
        return q_BLHK[..., size.own :], q_BLHK[..., : size.own]

    def _kept(self, params: dict[str, Any], x_BLD: Hidden, context: Context) -> tuple[Keys, Values]:
        """What a cache holds: the shared part as the encoding lets it be cached, and the latent."""
        encoding = self.spec.positions
        s_BLK = dense(encoding.infuse(params, x_BLD, context), self.shared[...])
        c_BLR = self.latent_norm(dense(x_BLD, self.latent[...]))
        return encoding.keys(params, s_BLK[:, :, None], context), c_BLR[:, :, None]

    def _expanded(self, x_BLD: Hidden, c_BS1R: Values) -> tuple[Keys, Values]:
        """Keys and values of all heads, `[B, S, H, K]` and `[B, S, H, P]`."""
        size, c_BSR = sizes(self.spec), c_BS1R[:, :, 0]
        k_RE, v_RE = (whole(w[...], x_BLD, "width", "heads") for w in (self.k_up, self.v_up))
        return to_heads(c_BSR, k_RE, size.own), to_heads(c_BSR, v_RE, size.values)

    def _joining(
        self,
        params: dict[str, Any],
        own_BLHK: Queries,
        k_BSGK: Keys,
        context: Context,
        k_context: Context,
    ) -> Limit:
        """A function from a part over what heads share to one over all, within a layer's limits.

        Of a chain's temperature, which scales queries, `adapt` is what own ones are scaled by.
        """
        own = self.spec.positions.adapt(
            params, attention.Part(own_BLHK, k_BSGK), context, k_context
        )

        def join(part: attention.Part) -> attention.Part:
            q_BLHK = jnp.concatenate([part.q_BLHK, own.q_BLHK], -1)
            k_BSGK = jnp.concatenate([part.k_BSGK, own.k_BSGK], -1)
            return limited(dataclasses.replace(part, q_BLHK=q_BLHK, k_BSGK=k_BSGK), self.spec)

        return join

    def _by_head(self, name: str, size: int) -> Array:
        """A matrix `[R, H, K]`."""
        w = getattr(self, name)[...]
        w_RE = w.wide if isinstance(w, Int8) else w
        return w_RE.reshape(w_RE.shape[0], -1, size)

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int, dtype: jnp.dtype, chunk: int = 0
    ) -> KVCache:
        """An empty cache for `length` tokens a row; with `chunk` a ring, as of `Attention`."""
        size = sizes(spec)
        return cache(spec, batch, length, dtype, chunk, 1, size.shared, size.rank)

    @staticmethod
    def whole(spec: LayerSpec) -> bool:
        """Whether a state has all tokens apart, as of `Attention`."""
        return Attention.whole(spec)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass, as it trains: keys and values of all heads."""
        size, low = sizes(spec), spec.option("query_rank")
        query = spec.heads * (size.own + size.shared)
        queries = low * (spec.width + query) if low else spec.width * query
        kept = spec.width * (size.rank + size.shared)
        made = spec.heads * size.rank * (size.own + size.values)
        out = spec.heads * size.values * spec.width
        seen = spec.heads * (size.own + size.shared + size.values) * visible(spec, length)
        return 2 * (queries + kept + made + out + seen)

    @staticmethod
    def state_bytes(spec: LayerSpec, itemsize: int) -> int:
        """Bytes of cache that one token needs, positions and segments included."""
        return (sizes(spec).shared + sizes(spec).rank) * itemsize + 8


def sizes(spec: LayerSpec) -> Sizes:
    """Those of a layer, with what is left to it derived from its heads."""
    own = spec.head_size
    return Sizes(
        own, spec.dims.head_size, spec.option("values") or own, spec.option("rank") or 4 * own
    )


def _cheaper_absorbed(size: Sizes, length: int) -> bool:
    """Whether queries that meet latents cost less than keys and values made of these.

    A head's multiplications for each cached token: R (K + P) to make them and 2 K + P for scores
    and sums, against 2 R; what is done once for each query is little beside many tokens.
    """
    made = size.own + size.values
    return length * (2 * size.rank - made) < size.rank * made


def _for_heads(s_BS1K: Keys, k_BSGK: Keys) -> Keys:
    """The shared part for as many heads as keys have."""
    return jnp.broadcast_to(s_BS1K, (*k_BSGK.shape[:3], s_BS1K.shape[-1]))


def _product(over: str, x: Array, w: Array) -> Array:
    """The product of two arrays in the dtype of the first."""
    return jnp.einsum(over, x, w.astype(x.dtype), preferred_element_type=x.dtype)
