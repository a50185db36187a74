"""What a probe sees of attention is what attention does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models
from lcm.ops import attention

VALUES = jnp.eye(24)  # so that attention's output is its weights


def weights(parts, context):
    v_BSGK = jnp.broadcast_to(VALUES[None, :, None, :], (1, 24, parts[0].k_BSGK.shape[2], 24))
    return attention.attend(parts, v_BSGK, context, context, backend="reference")


@pytest.mark.quick("countdown+rope", "self_extend")
@pytest.mark.parametrize("name", ["rope", "alibi", "countdown+rope", "self_extend"])
def test_weights_by_probe_are_those_of_a_pattern_of_layers(tiny, name):
    fields = ["model.positions.window=4"] if name == "self_extend" else []
    pattern = [
        "model.depth=3",
        "model.pattern=attention,local",
        "model.kinds.local.mixer=attention",
        "model.kinds.local.window=2",
    ]
    cfg = tiny(f"model.positions={name}", *fields, *pattern)
    params = models.init(cfg, jax.random.key(0))
    row = jnp.arange(24)[None]
    found = models.probe(cfg, params, row, weights)
    assert found.shape == (3, 1, 24, 2, 24)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert np.all(
        np.asarray(found)[:, 0, np.triu_indices(24, 1)[0], :, np.triu_indices(24, 1)[1]] == 0
    )
    seen = (np.asarray(found)[:, 0] > 0).sum(-1).max((1, 2))
    assert seen.tolist() == [24, 2, 24]


@pytest.mark.slow
def test_a_probe_does_not_change_what_later_layers_read(tiny):
    """The second layer's parts come from the residual stream that the model itself has there."""
    cfg = tiny("model.positions=rope", "model.depth=2")
    params = models.init(cfg, jax.random.key(0))
    row = jnp.arange(24)[None]
    found = models.probe(cfg, params, row, lambda parts, context: parts[0].k_BSGK)
    state = models.init_state(cfg, 1, 24)
    _, state = models.apply(cfg, params, row, state=state)
    np.testing.assert_allclose(found.swapaxes(2, 3), state.layers[0].k_BGSK, atol=1e-5)
