"""An MLP of many, of which each token goes through a few: a mixture of experts."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.errors import ConfigError
from lcm.nn.bias import BIASES
from lcm.nn.dense import dense, matrix
from lcm.nn.mlp import SwiGLU
from lcm.nn.spec import LayerSpec
from lcm.types import Array, Hidden


class Experts(nnx.Module):
    """Top-k of softmax scores choose among E gated MLPs (arXiv:1701.06538; arXiv:2403.19887).

        p = softmax(x W_router)                                      float32, over all E
        y = sum_{e in top k} p_e (silu(x W_gate,e) * x W_up,e) W_down,e

    `model.hidden` is the width of one. Options: `count` is E, `top` is k; `normed` divides p by
    its sum over the chosen, `shared` is the width of one more that all tokens go through, times
    sigmoid(x W_shared_gate), 0 for none: both as in Qwen3-Next. No token is dropped: rows are
    sorted by expert and multiplied as they lie (`jax.lax.ragged_dot`). No loss balances experts.
    """

    matrices = 3
    OPTIONS: ClassVar[dict[str, Any]] = {"count": 8, "top": 2, "normed": False, "shared": 0}
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "count": (1, 2**16),
        "top": (1, 2**16),
        "shared": (0, 2**31),
    }

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, count, sizes = spec, spec.mlp_option("count"), (spec.width, spec.hidden)
        self.router = matrix(rngs, spec.width, count)
        self.expert_gate = matrix(rngs, count, *sizes)
        self.expert_up = matrix(rngs, count, *sizes)
        self.expert_down = matrix(rngs, count, *sizes[::-1], depth=spec.depth)
        if spec.mlp_option("shared"):
            self.shared = SwiGLU(dataclasses.replace(spec, hidden=spec.mlp_option("shared")), rngs)
            self.shared_gate = matrix(rngs, spec.width, 1)

    @staticmethod
    def check(spec: LayerSpec) -> None:
        """Refuses more choices than there are experts, and biases."""
        if "up" in BIASES[spec.biases]:
            raise ConfigError(
                f"model.biases={spec.biases} gives an MLP biases, of which experts have none: "
                "choose none, qkv or attention"
            )
        top, count = spec.mlp_option("top"), spec.mlp_option("count")
        if top > count:
            raise ConfigError(
                f"model.mlp_options=top={top} chooses among count={count} experts: take at most "
                f"top={count}"
            )

    def __call__(self, x_BLD: Hidden) -> Hidden:
        x_ND = x_BLD.reshape(-1, x_BLD.shape[-1])
        share_NT, expert_NT = self._chosen(x_ND)
        rows, top = share_NT.shape
        order_M = jnp.argsort(expert_NT.reshape(-1), stable=True)  # M = N T choices
        counts_E = jnp.bincount(expert_NT.reshape(-1), length=self.spec.mlp_option("count"))
        x_MD = x_ND[order_M // top]
        gate_MF = _by_expert(x_MD, self.expert_gate[...], counts_E)
        up_MF = _by_expert(x_MD, self.expert_up[...], counts_E)
        y_MD = _by_expert(jax.nn.silu(gate_MF) * up_MF, self.expert_down[...], counts_E)
        y_NTD = y_MD[jnp.argsort(order_M)].reshape(rows, top, -1)
        y_ND = (y_NTD * share_NT[..., None]).sum(1).astype(x_ND.dtype)
        if self.spec.mlp_option("shared"):
            y_ND += self.shared(x_ND) * jax.nn.sigmoid(dense(x_ND, self.shared_gate[...]))
        return y_ND.reshape(x_BLD.shape)

    def _chosen(self, x_ND: Array) -> tuple[Array, Array]:
        """Shares, float32, and numbers of the experts of each token, `[N, T]`."""
        scores_NE = dense(x_ND.astype(jnp.float32), self.router[...])
        share_NT, expert_NT = jax.lax.top_k(jax.nn.softmax(scores_NE), self.spec.mlp_option("top"))
        if self.spec.mlp_option("normed"):
            share_NT /= share_NT.sum(-1, keepdims=True)
        return share_NT, expert_NT

    @staticmethod
    def flops(spec: LayerSpec) -> float:
        """Matmul FLOPs of one token's forward pass: of the experts that it goes through."""
        columns = spec.mlp_option("top") * spec.hidden + spec.mlp_option("shared")
        gates = spec.mlp_option("count") + bool(spec.mlp_option("shared"))
        return 2 * spec.width * (3 * columns + gates)


def _by_expert(x_MD: Array, w_EDF: Array, counts_E: Array) -> Array:
    """Rows, sorted by expert, times the matrix of theirs."""
    return jax.lax.ragged_dot(x_MD, w_EDF.astype(x_MD.dtype), counts_E)
