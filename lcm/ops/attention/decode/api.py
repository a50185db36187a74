"""`decode`: check arguments, choose a backend."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from lcm.ops.attention.decode import kernel, reference
from lcm.ops.attention.decode.cache import Cache
from lcm.ops.attention.decode.rotation import Rotation
from lcm.ops.attention.decode.sharded import over_mesh
from lcm.ops.attention.mask import Mask, causal
from lcm.ops.attention.part import Partial
from lcm.ops.attention.score import ScoreMod
from lcm.ops.platform import platform
from lcm.types import Queries

QUERIES = 16  # tokens of a row at most


class Backend(NamedTuple):
    """`(q_BLHK, cache, mask, score_mod, rotation, scale) -> Partial`, and where it can run."""

    decode: Callable[..., Partial]
    platforms: tuple[str, ...]


BACKENDS = {
    "reference": Backend(reference.decode, ("cpu", "gpu", "tpu")),
    "pallas": Backend(over_mesh(kernel.decode), ("tpu",)),
}


def decode(
    q_BLHK: Queries,
    cache: Cache,
    *,
    mask: Mask = causal(),  # noqa: B008
    score_mod: ScoreMod | None = None,
    rotation: Rotation | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Partial:
    """Attention of the last L tokens of each row, whose keys are in the cache already.

    Query i of a row stands at position `lengths_B - L + i`; it sees what the mask shows of the
    positions that the row still holds. Queries at positions below 0, in rows shorter than L, see
    nothing. A sink beside a window is two masks, so two calls and a `merge`:

        merge(decode(q, cache, mask=causal() & window(w)),
              decode(q, cache, mask=causal() & sinks(n) & ~window(w)))

    Under a mesh each device has its own rows and heads, see `decode.sharded` for where pages lie.

    Args:
        q_BLHK: 1 to 16 queries a row, rotated already if the encoding rotates.
        cache: `lengths_B` counts the queries' own tokens.
        mask: pages that it hides from all queries of a row are not read.
        score_mod: acts on scores, as in `attend`.
        rotation: for keys cached raw: they are rotated to their positions as they are read.
        scale: factor on the scores before `score_mod`; 1/sqrt(K) by default.
        backend: one of `BACKENDS`, or "auto": the kernel on a TPU, elsewhere the reference.

    Returns:
        Out in the dtype of the values (of the queries, if values are int8), and log-sums: 0 and
        -inf for a query that sees nothing. Sums are float32.

    Raises:
        ValueError: if shapes do not fit, or the backend is unknown or not for this platform.
    """
    _check(q_BLHK, cache, rotation)
    scale = q_BLHK.shape[-1] ** -0.5 if scale is None else scale
    return _backend(backend)(q_BLHK, cache, mask, score_mod, rotation, scale)


def _backend(name: str) -> Callable[..., Partial]:
    here = platform()
    if name == "auto":
        name = "pallas" if here == "tpu" else "reference"
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"decode backend {name!r} is unknown: use one of {known}")
    backend = BACKENDS[name]
    if here not in backend.platforms:
        raise ValueError(
            f"decode backend {name!r} runs on {', '.join(backend.platforms)}, not on "
            f"{here!r}: use 'reference', or compile under jax.set_mesh(...) of another platform"
        )
    return backend.decode


def _check(q_BLHK: Queries, cache: Cache, rotation: Rotation | None) -> None:
    cache.check()
    if q_BLHK.ndim != 4 or not jnp.issubdtype(q_BLHK.dtype, jnp.floating):
        raise ValueError(
            f"queries are {q_BLHK.dtype} {q_BLHK.shape}: 4 axes of floats [B, L, H, K]"
        )
    batch, length, heads, size = q_BLHK.shape
    if not 1 <= length <= QUERIES:
        raise ValueError(
            f"decode takes 1 to {QUERIES} queries a row, here are {length}: use attend for more"
        )
    if batch != len(cache.lengths_B):
        raise ValueError(f"queries of {batch} rows do not fit a cache of {len(cache.lengths_B)}")
    if heads % cache.kv_heads:
        raise ValueError(
            f"{heads} query heads cannot share {cache.kv_heads} key heads: take a divisor of "
            f"{heads}"
        )
    if size * cache.kv_heads != cache.k_PTM.shape[2]:
        raise ValueError(
            f"queries of size {size} do not fit keys of {cache.k_PTM.shape[2] // cache.kv_heads}"
        )
    if rotation is not None and not 2 <= 2 * rotation.inv_freq_R.shape[0] <= size:
        raise ValueError(
            f"a rotation of {rotation.inv_freq_R.shape[0]} pairs is not for heads of {size}: "
            f"give it 1 to {size // 2}"
        )
