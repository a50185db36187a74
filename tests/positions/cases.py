"""One case of every encoding, small enough for documents of 24 tokens to cross its switches."""

import jax
import jax.numpy as jnp

from lcm import positions
from lcm.positions import Dims, PositionEncoding
from lcm.types import Context

LENGTH = 24
DIMS = Dims(width=16, heads=2, kv_heads=1, head_size=8, length=8)

# Fields that make sense at this size, and a partner for what joins another encoding.
FIELDS = {
    "learned": {"length": LENGTH},
    "linear": {"factor": 2.0},
    "ntk": {"factor": 2.0},
    "dynamic_ntk": {"factor": 2.0},
    "by_parts": {"factor": 4.0, "alpha": 0.05},
    "yarn": {"factor": 4.0},
    "longrope": {"factor": 4.0, "short": (1.0, 1.0, 1.5, 2.0), "long": (1.0, 2.0, 3.0, 4.0)},
    "llama3": {"factor": 4.0, "alpha": 0.05, "beta": 1.0},
    "proportional": {"p": 0.5},
    "clex": {"factor": 4.0},
    "rerope": {"window": 5},
    "leaky_rerope": {"window": 5, "k": 3.0},
    "self_extend": {"group": 2, "window": 4},
    "dual_chunk": {"chunk": 5, "local": 3},
    "lm_infinite": {"window": 6, "sinks": 2, "cap": 7},
    "lm_infinite_alibi": {"window": 6, "sinks": 2, "cap": 7},
    "streaming_llm": {"kept": 7, "sinks": 2},
    "reattention": {"sinks": 2, "local": 3, "top": 1, "clip": 2, "span": 2, "chunk": 1},
    "hard_alibi": {"local": 1},
    "t5": {"buckets": 8, "farthest": 16},
    "sandwich": {"dims": 8},
    "fire": {"threshold": 8.0},
    "uniform_scale": {"factor": 1.3},
    "head_scale": {"factor": 1.3},
    "floor_scale": {"floor": 4},
    "aligned": {"temperature": 0.7},
    "chunked": {"size": 5},
}
NAMES = [name for name in positions.ENCODINGS if name != "chain"]
CHAINS = ["log_n+yarn", "head_scale+nope", "chunked+rope", "aligned+t5", "length_scale+dual_chunk"]


def make(name: str) -> PositionEncoding:
    """The encoding of this name, resolved for a model of `DIMS`."""
    first, plus, rest = name.partition("+")
    made = positions.make({"name": first, **FIELDS.get(first, {})})
    return positions.Chain(made, make(rest)).resolved(DIMS) if plus else made.resolved(DIMS)


def parameters(encoding: PositionEncoding, seed: int = 0) -> dict:
    """Of `init` and `init_layer` in one, moved off their initial values, within their limits."""
    keys = jax.random.split(jax.random.key(seed), 3)
    own = encoding.init_layer(keys[1], DIMS)
    both = merged(encoding.init(keys[0], DIMS), own)
    leaves, tree = jax.tree.flatten(both)
    moved = [
        leaf + 0.3 * jax.random.normal(jax.random.fold_in(keys[2], n), leaf.shape)
        for n, leaf in enumerate(leaves)
    ]
    return encoding.project(jax.tree.unflatten(tree, moved))


def merged(a: dict, b: dict) -> dict:
    both = {k: merged(a[k], b[k]) for k in a.keys() & b.keys()}
    return {**a, **b, **both}


def arrays(seed: int = 0, batch: int = 1, length: int = LENGTH):
    """Queries, keys and values."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = lambda heads: (batch, length, heads, DIMS.head_size)  # noqa: E731
    return tuple(
        jax.random.normal(key, shape(heads))
        for key, heads in zip(keys, (DIMS.heads, DIMS.kv_heads, DIMS.kv_heads), strict=True)
    )


def context(length: int = LENGTH, start: int = 0) -> Context:
    positions_BL = jnp.arange(start, start + length, dtype=jnp.int32)[None]
    return Context(positions_BL, jnp.ones_like(positions_BL), jnp.full_like(positions_BL, -1))


def attended(encoding, params, q, k, v, q_context, k_context=None, backend="blockwise"):
    """Attention as a layer runs it: keys through `keys`, then `attend` with a causal mask."""
    from lcm.ops import attention

    k_context = q_context if k_context is None else k_context
    k = encoding.keys(params, k, k_context)

    def causal(part):
        mask = part.mask & attention.causal()
        return attention.Part(part.q_BLHK, part.k_BSGK, mask, part.score_mod, part.blocks)

    return encoding.attend(params, q, k, v, q_context, k_context, limit=causal, backend=backend)
