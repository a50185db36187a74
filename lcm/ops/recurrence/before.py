"""The decayed recurrence of a matrix, read before it is written to."""

import jax
import jax.numpy as jnp

from lcm.ops.recurrence.reference import Erase, matrix_step
from lcm.ops.recurrence.spread import op_matrix
from lcm.types import Array


def op_matrix_before(
    q_BLGN: Array,
    k_BLGN: Array,
    v_BLHP: Array,
    log_decay: Array,
    erase: Erase | None,
    S0_BHNP: Array,
    reset_BL: Array,
    *,
    chunk: int = 0,
) -> tuple[Array, Array]:
    """`y_t = S_{t-1}^T q_t` of the S_t of `op_matrix`, as in RWKV-6.

    What a token sees is the same recurrence of the tokens before it, so it is `op_matrix` of keys,
    values and decays moved on by one, whose last is then taken in. Shapes, dtypes and errors are
    those of `op_matrix`; `y` is 0 where a document begins.
    """
    k_moved = jnp.where(reset_BL[..., None, None], 0, _moved(k_BLGN))
    moved = k_moved, _moved(v_BLHP), _moved(log_decay), jax.tree.map(_moved, erase)
    y_BLHP, S_BHNP = op_matrix(q_BLGN, *moved, S0_BHNP, reset_BL, chunk=chunk)
    own = k_BLGN, v_BLHP, log_decay, erase
    k, v, l, erase = jax.tree.map(lambda x: x[:, -1].astype(jnp.float32), own)
    S_BHNP, _ = matrix_step(S_BHNP, k, k, v, l, erase)
    return y_BLHP, S_BHNP


def _moved(x_BL: Array) -> Array:
    """Each token's in the place of the next, zeros in the first."""
    return jnp.concatenate([jnp.zeros_like(x_BL[:, :1]), x_BL[:, :-1]], 1)
