"""S4D as a mixer: a state-space system of each channel."""

from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcm.errors import ConfigError
from lcm.nn import interventions
from lcm.nn.lti import Output, held
from lcm.nn.recurrent import RecurrentState, empty, entered
from lcm.nn.spec import LayerSpec
from lcm.ops.recurrence import op_diag
from lcm.ops.recurrence.pieces import in_chunks
from lcm.ops.recurrence.spread import passed_on
from lcm.types import Array, Context, Hidden

CHUNK = 64  # tokens whose [D, M] numbers are there at once, where none are given


class S4D(Output):
    """S4D-Lin (Gu et al., arXiv:2206.11893), with N = state numbers of each of D channels kept as
    M = N / 2 conjugate pairs; `model.expand` has no part in it.

        rate = -exp(A_log) + i A_im         dt = step exp(dt_log), one a channel
        h_t = exp(rate dt) h_{t-1} + (exp(rate dt) - 1) / rate x_t           [D, M]
        y_t = 2 Re(sum_m C_m h_{t,m}) + D x_t

    Then a GLU. Rates begin as -1/2 + i pi m. Option `step` rescales the time that a token takes:
    0.5 reads rows of twice the rate.
    """

    EXTENDS = interventions.ALL - {"exact"}  # of a step its integral is written, which is exact
    OPTIONS: ClassVar[dict[str, Any]] = {"step": 1.0}
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {"step": (1e-6, 1e6)}

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, width, pairs = spec, spec.width, spec.state // 2
        self.A_log = nnx.Param(jnp.full((width, pairs), np.log(0.5)))
        self.A_im = nnx.Param(jnp.tile(np.pi * jnp.arange(pairs, dtype=jnp.float32), (width, 1)))
        low, high = np.log(1e-3), np.log(1e-1)
        self.dt_log = nnx.Param(
            jax.random.uniform(rngs.params(), (width,), minval=low, maxval=high)
        )
        # Complex numbers of variance 1.
        self.C = nnx.Param(jax.random.normal(rngs.params(), (width, pairs, 2)) * 0.5**0.5)
        self.D = nnx.Param(jax.random.normal(rngs.params(), (width,)))
        self.add_output(spec, rngs)

    @staticmethod
    def check(spec: LayerSpec) -> None:
        """Refuses what is no number of pairs."""
        if spec.state % 2:
            raise ConfigError(
                f"model.state={spec.state} is odd, and S4D keeps pairs of numbers: take "
                f"{spec.state + 1}"
            )

    def __call__(
        self, x_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        spec, length = self.spec, x_BLD.shape[1]
        before, reset_BL, there_BL = entered(state, self.init_state(spec, len(x_BLD)), context)
        # Masks of [C, D, M] from the context alone would be taken out of the loops, of all tokens:
        # what they are made of goes in with x.
        seen = [mask[..., None] for mask in (reset_BL, there_BL)]
        wide_BLD = x_BLD.astype(jnp.float32)
        old_BLD = None
        if spec.extension.cuts(length):
            same_BL = interventions.same_document(reset_BL, spec.extension.window)
            old_BLD = interventions.delayed(wide_BLD, spec.extension.window) * same_BL[..., None]
        given = jnp.concatenate([wide_BLD, *seen], -1), old_BLD
        run = partial(in_chunks, _chunk, spec.recurrence_chunk or CHUNK)
        h0_BDM = before.memory["re"] + 1j * before.memory["im"]
        y_BLD, h_BDM = passed_on(run, _left, given, self.system(length), h0_BDM)
        y_BLD += self.D[...] * x_BLD
        after = RecurrentState({"re": h_BDM.real, "im": h_BDM.imag}, (), before.segment_B)
        return self.finish(y_BLD.astype(x_BLD.dtype)), None if state is None else after

    def system(self, length: int) -> "System":
        """What one of so many tokens does to the states of all channels."""
        own = self.spec.extension
        rate = jax.lax.complex(-interventions.rate(own, self.A_log[...]), self.A_im[...])
        dt_D = jnp.exp(self.dt_log[...]) * (self.spec.option("step") * own.step)
        exponent = rate * dt_D[:, None]
        a_DM, less_DM = held(exponent)
        C_DM = jax.lax.complex(self.C[..., 0], self.C[..., 1])
        log_DM = exponent + np.log(own.retain)
        left_DM = jnp.exp(own.window * log_DM) if own.cuts(length) else None
        return System(log_DM, own.retain * a_DM, own.insert * less_DM / rate, C_DM, left_DM)

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int = 0, dtype: jnp.dtype | None = None, chunk: int = 0
    ) -> RecurrentState:
        """The empty state, float32 whatever the dtype of caches, for any length."""
        shape = spec.width, spec.state // 2
        return empty(batch, {"re": shape, "im": shape}, (), 1)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass: the output, and the state written and read."""
        return 4 * spec.width * (spec.width + spec.state)


class System(NamedTuple):
    """What a state keeps of itself, as a logarithm and as it is, what is written of a token, what
    is read, and what is left of a token behind the window, if any is: complex64 `[D, M]`."""

    log: Array
    a: Array
    b: Array
    c: Array
    left: Array | None


def _left(given: tuple[Array, Array | None], system: System) -> Array:
    """What all of the tokens leave of a state, `[B, D, M]`."""
    reset_BL, there_BL = given[0][..., -2] > 0, given[0][..., -1]
    kept_BDM = jnp.exp(there_BL.sum(1)[:, None, None] * system.log)
    return jnp.where(reset_BL.any(1)[:, None, None], 0, kept_BDM)


def _chunk(h_BDM: Array, own: System, moving: tuple) -> tuple[Array, Array]:
    """The states of one chunk, of which the last stays, and what is read of them, without D."""
    (x_BCF, old_BCD), (_, a_DM, b_DM, c_DM, left_DM) = moving, own
    x_BCD, reset_BC, there_BC = x_BCF[..., :-2], x_BCF[..., -2] > 0, x_BCF[..., -1] > 0
    there = there_BC[..., None, None]
    a_BCDM = jnp.where(there, a_DM, 1)  # padding keeps h and writes nothing
    written_BCDM = jnp.where(there, x_BCD[..., None] * b_DM, 0)
    if old_BCD is not None:
        written_BCDM -= old_BCD[..., None] * (left_DM * b_DM)
    h_BCDM, last_BDM = op_diag(a_BCDM, written_BCDM, h_BDM, reset_BC)
    return last_BDM, 2 * jnp.einsum("bcdm,dm->bcd", h_BCDM, c_DM).real
