"""An MLP of many, of which each token goes through a few: a mixture of experts."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.errors import ConfigError
from lcm.nn.bias import BIASES
from lcm.nn.dense import dense, matrix
from lcm.nn.mlp import SwiGLU
from lcm.nn.spec import LayerSpec
from lcm.types import Array, Hidden, PerToken

SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
LEAST = 1e-20  # beside sums that are divided by: sigmoids may all be 0


class Load(NamedTuple):
    """What the router of a layer did, summed over tokens; R such layers are stacked, `[R, ...]`.

    chosen_E: how often an expert was chosen, float32; p_E: its probabilities; tokens: how many.
    """

    chosen_E: Array
    p_E: Array
    tokens: Array


class Told(NamedTuple):
    """The state of a layer of experts that is to tell its load, and that load behind it."""

    state: Any
    load: Load | None = None


def imbalance(load_R: Load) -> Array:
    """`E sum_e f_e P_e`, float32: k where the load is even, E where one expert takes it all.

    f_e is how often a token chooses an expert, P_e the mean of its probability, both over the
    tokens of all layers together: equations 4 to 6 of Switch (arXiv:2101.03961), which are of one
    layer and k = 1, as `transformers` has them. The gradient goes through P alone.
    """
    chosen_E, p_E, tokens = jax.tree.map(lambda x: x.sum(0), load_R)
    tokens = jnp.maximum(tokens, 1.0)
    return chosen_E.shape[0] * (chosen_E / tokens * (p_E / tokens)).sum()


def largest_share(chosen_RE: Array) -> Array:
    """The largest part of a layer's choices that one expert has, of all layers: 1 / E if even."""
    total_R1 = jnp.maximum(chosen_RE.sum(-1, keepdims=True), 1.0)
    return (chosen_RE / total_R1).max()


def check_balance(layers: Sequence[LayerSpec]) -> None:
    """Refuses kinds of layers whose loads cannot be pooled, if they are to be.

    Raises:
        ConfigError: naming the option and both values.
    """
    kinds = [layer for layer in layers if layer.mlp == "experts"]
    if not any(layer.mlp_option("balance") for layer in kinds):
        return
    for name in ("balance", "count"):
        first, *others = [layer.mlp_option(name) for layer in kinds]
        for other in others:
            if other != first:
                raise ConfigError(
                    f"model.mlp_options has {name}={first} in one kind of layer and {other} in "
                    "another, whose experts are balanced together: make them equal, or set "
                    "balance=0 in all"
                )


class Experts(nnx.Module):
    """Top-k of scores choose among E gated MLPs (arXiv:1701.06538; arXiv:2403.19887).

        p = softmax(x W_router)                                      float32, over all E
        y = sum_{e in top k} p_e (silu(x W_gate,e) * x W_up,e) W_down,e

    `model.hidden` is the width of one. Options: `count` is E, `top` is k; `normed` divides p by
    its sum over the chosen, `shared` is the width of one more that all tokens go through, times
    sigmoid(x W_shared_gate), 0 for none: both as in Qwen3-Next. No token is dropped: rows are
    sorted by expert and multiplied as they lie (`jax.lax.ragged_dot`). `balance` is the coefficient
    of `imbalance` in the loss of training, 0 for none.

    As in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) and Kimi Linear, `scores=sigmoid` has
    p = sigmoid(x W_router), `corrected` adds a bias of each expert to what the top k are chosen by,
    though not to p, `scale` multiplies p at last, and `shared_gate=False` adds the shared one as it
    is. Choices have no gradient, so that training leaves such a bias as it was loaded. `least` is
    added to what `normed` divides by, as LFM2 has it.
    """

    matrices = 3
    OPTIONS: ClassVar[dict[str, Any]] = {
        "count": 8,
        "top": 2,
        "normed": False,
        "shared": 0,
        "balance": 0.0,
        "scores": "softmax",
        "corrected": False,
        "scale": 1.0,
        "shared_gate": True,
        "least": LEAST,
    }
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "count": (1, 2**16),
        "top": (1, 2**16),
        "shared": (0, 2**31),
        "balance": (0.0, 1e3),
        "scale": (1e-6, 1e6),
        "least": (1e-30, 1.0),
    }

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, count, sizes = spec, spec.mlp_option("count"), (spec.width, spec.hidden)
        self.router = matrix(rngs, spec.width, count)
        self.expert_gate = matrix(rngs, count, *sizes)
        self.expert_up = matrix(rngs, count, *sizes)
        self.expert_down = matrix(rngs, count, *sizes[::-1], depth=spec.depth)
        if spec.mlp_option("shared"):
            self.shared = SwiGLU(dataclasses.replace(spec, hidden=spec.mlp_option("shared")), rngs)
            if spec.mlp_option("shared_gate"):
                self.shared_gate = matrix(rngs, spec.width, 1)
        if spec.mlp_option("corrected"):
            self.choice_bias = nnx.Param(jnp.zeros(count))

    @staticmethod
    def check(spec: LayerSpec) -> None:
        """Refuses more choices than there are experts, biases, and scores that are unknown."""
        if "up" in BIASES[spec.biases]:
            raise ConfigError(
                f"model.biases={spec.biases} gives an MLP biases, of which experts have none: "
                "choose none, qkv, attention or mixer"
            )
        top, count = spec.mlp_option("top"), spec.mlp_option("count")
        if top > count:
            raise ConfigError(
                f"model.mlp_options=top={top} chooses among count={count} experts: take at most "
                f"top={count}"
            )
        scores = spec.mlp_option("scores")
        if scores not in SCORES:
            raise ConfigError(
                f"model.mlp_options=scores={scores} is unknown: choose from {', '.join(SCORES)}"
            )
        if not spec.mlp_option("shared_gate") and not spec.mlp_option("shared"):
            raise ConfigError(
                "model.mlp_options=shared_gate=False with shared=0, where there is nothing to "
                "gate: give the width of the shared expert, as in shared=1024"
            )

    def __call__(self, x_BLD: Hidden) -> Hidden:
        return self._mixed(x_BLD, *self._chosen(x_BLD)[1:])

    def told(self, x_BLD: Hidden, segments_BL: PerToken) -> tuple[Hidden, Load]:
        """The same and the load, of which tokens without a segment are no part."""
        p_NE, share_NT, expert_NT = self._chosen(x_BLD)
        there_N1 = (segments_BL > 0).reshape(-1, 1).astype(jnp.float32)
        # Compared and not counted by index: a sum, which stays on the devices that tokens lie on.
        chosen_NE = (expert_NT[..., None] == jnp.arange(p_NE.shape[1])).sum(1)
        load = Load((chosen_NE * there_N1).sum(0), (p_NE * there_N1).sum(0), there_N1.sum())
        return self._mixed(x_BLD, share_NT, expert_NT), load

    def _mixed(self, x_BLD: Hidden, share_NT: Array, expert_NT: Array) -> Hidden:
        x_ND = x_BLD.reshape(-1, x_BLD.shape[-1])
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
            shared_ND = self.shared(x_ND)
            if self.spec.mlp_option("shared_gate"):
                shared_ND *= jax.nn.sigmoid(dense(x_ND, self.shared_gate[...]))
            y_ND += shared_ND
        return y_ND.reshape(x_BLD.shape)

    def _chosen(self, x_BLD: Hidden) -> tuple[Array, Array, Array]:
        """Probabilities, float32, and shares and numbers of the experts of each token, `[N, T]`.

        Of sigmoids, which sum to no 1, probabilities are their shares in the sum over all E
        (DeepSeek-V3, equation 19).
        """
        option, x_ND = self.spec.mlp_option, x_BLD.reshape(-1, x_BLD.shape[-1])
        p_NE = SCORES[option("scores")](dense(x_ND.astype(jnp.float32), self.router[...]))
        if option("corrected"):
            _, expert_NT = jax.lax.top_k(p_NE + self.choice_bias[...], option("top"))
            share_NT = jnp.take_along_axis(p_NE, expert_NT, -1)
        else:
            share_NT, expert_NT = jax.lax.top_k(p_NE, option("top"))
        if option("normed"):
            share_NT /= share_NT.sum(-1, keepdims=True) + option("least")
        if option("scale") != 1:
            share_NT *= option("scale")
        if option("scores") == "sigmoid":
            p_NE /= p_NE.sum(-1, keepdims=True) + LEAST
        return p_NE, share_NT, expert_NT

    @staticmethod
    def flops(spec: LayerSpec) -> float:
        """Matmul FLOPs of one token's forward pass: of the experts that it goes through."""
        columns = spec.mlp_option("top") * spec.hidden + spec.mlp_option("shared")
        gated = bool(spec.mlp_option("shared")) and spec.mlp_option("shared_gate")
        gates = spec.mlp_option("count") + gated
        return 2 * spec.width * (3 * columns + gates)


def _by_expert(x_MD: Array, w_EDF: Array, counts_E: Array) -> Array:
    """Rows, sorted by expert, times the matrix of theirs."""
    return jax.lax.ragged_dot(x_MD, w_EDF.astype(x_MD.dtype), counts_E)
