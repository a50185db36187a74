"""A learned table of positions for more of them than it was trained on."""

import jax.numpy as jnp

from lcm.types import Array


def stretch(table_LD: Array, rows: int, keep: int = 0) -> Array:
    """A table of `rows` positions: the first `keep` as they are, the others spread out evenly.

    Row keep + m of the result lies m / r behind row keep of the table, interpolated linearly, with
    the factor r = (rows - keep) / (L - keep). keep = 0 is the linear stretching of segmented
    sequences (arXiv:2310.14633), which repeats the last row where none follows; with keep > 0 the
    last rows continue the line through the last two, as Long-CLIP does (arXiv:2403.15378, keep 20,
    77 to 248 rows).

    Raises:
        ValueError: if there are fewer rows than before, or fewer than two to spread.
    """
    length = table_LD.shape[0]
    if rows < length or length - keep < 2 or keep < 0:
        raise ValueError(
            f"a table of {length} rows with the first {keep} kept cannot be stretched to {rows}: "
            f"give {length} rows or more and keep at most {length - 2}"
        )
    at = keep + jnp.arange(rows - keep) * (length - keep) / (rows - keep)
    below = jnp.minimum(at.astype(jnp.int32), length - 2)
    share = (at - below)[:, None].astype(table_LD.dtype)
    share = share if keep else jnp.minimum(share, 1)
    spread = (1 - share) * table_LD[below] + share * table_LD[below + 1]
    return jnp.concatenate([table_LD[:keep], spread])
