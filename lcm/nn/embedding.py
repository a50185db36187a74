"""Token embedding and output head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn.dense import matrix, product, product_with_rows
from lcm.ops.placed import placed
from lcm.types import Hidden, Logits, Tokens


class Embedding(nnx.Module):
    """A table of token vectors whose rows have norm 1 in expectation: std 1/sqrt(width).

    Rows may be read multiplied by a constant, as in Gemma, or normalised, as in BLOOM.
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        rngs: nnx.Rngs,
        *,
        scale: float = 1.0,
        norm: nnx.Module | None = None,
    ):
        init = jax.nn.initializers.normal(width**-0.5)
        self.table = nnx.Param(init(rngs.params(), (vocab, width), jnp.float32))
        self.scale = scale
        if norm is not None:
            self.norm = norm

    def __call__(self, tokens_BL: Tokens, dtype: jnp.dtype) -> Hidden:
        x_BLD = self.table[...][tokens_BL].astype(dtype)
        # Each device looks up its channels for the tokens of all. So what is sent is narrow, and of
        # the gradient, too, which is then summed where it lies, in float32.
        x_BLD = placed(placed(x_BLD, "copies", "all", "share"), "copies", "tokens", "part")
        x_BLD = x_BLD * self.scale if self.scale != 1 else x_BLD
        return self.norm(x_BLD) if hasattr(self, "norm") else x_BLD


class Head(nnx.Module):
    """An output matrix of its own, where the embedding table does not serve as one."""

    def __init__(self, width: int, vocab: int, rngs: nnx.Rngs):
        self.kernel = matrix(rngs, width, vocab)

    def __call__(self, x_BLD: Hidden) -> Logits:
        return logits(x_BLD, self.kernel[...])


def logits(x_BLD: Hidden, kernel_DV: Any) -> Logits:
    """Scores of the vocabulary, accumulated and returned in float32."""
    scores = product(x_BLD.reshape(-1, x_BLD.shape[-1]), kernel_DV, jnp.float32)
    return scores.reshape(*x_BLD.shape[:-1], -1)


def tied_logits(x_BLD: Hidden, table_VD: Any) -> Logits:
    """The same where the table of token vectors is the output matrix."""
    scores = product_with_rows(x_BLD.reshape(-1, x_BLD.shape[-1]), table_VD, jnp.float32)
    return scores.reshape(*x_BLD.shape[:-1], -1)
