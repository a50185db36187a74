"""Training of minutes by any loss, for models that `lcm train` does not know; nothing is saved."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

EVERY = 50  # steps between losses that are kept


def fit(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
    steps: int,
    lr: float,
    title: str,
) -> tuple[Any, list[float]]:
    """Parameters after so many steps of Adam, and losses of every fiftieth step and of the last.

    loss: of parameters and a batch, a scalar; it is compiled once if all batches have one shape.
    lr: the highest rate, reached in 50 steps, of a cosine to 0; gradients are clipped to a norm of
        1.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(EVERY, steps), steps + 1)
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = rule.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = rule.init(params), []
    for n, batch in zip(range(steps), batches, strict=False):
        params, state, value = step(params, state, batch)
        if n % EVERY == 0 or n == steps - 1:
            losses.append(float(value))
            print(f"{title} step {n} loss {losses[-1]:.3f}", flush=True)
    return params, losses
