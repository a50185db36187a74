"""What a prediction rests on: known for windows, bounded for all, and states by position."""

import jax
import numpy as np
import pytest

from lcm import models
from lcm.errors import UserError
from lcm.evaluation.remembrance import effective_remembrance, state_norms
from lcm.models import initial

LENGTH = 24


def case(tiny, *keys):
    cfg = tiny(*keys)
    params = models.init(cfg, jax.random.key(0))
    noisy = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    row = jax.random.randint(jax.random.key(1), (3, LENGTH), 0, 256)
    return cfg, jax.tree.map(noisy, params), row


def test_windows_remember_as_far_as_they_reach(tiny):
    cfg, params, row = case(tiny, "model.window=4", "model.depth=2")
    reach = 2 * (4 - 1)  # of two layers, beside the last token itself
    starts = list(range(LENGTH))
    found = effective_remembrance(cfg, params, row, starts)
    assert found[0] == 0
    inside = LENGTH - 1 - reach
    np.testing.assert_allclose(found[: inside + 1], 0, atol=1e-6)
    assert (found[inside + 1 :] > 1e-4).all() and (found <= 1).all()


def test_it_is_the_distance_of_two_passes(tiny):
    cfg, params, row = case(tiny, "model.mixer=mamba2", "model.pattern=mamba2")
    (got,) = effective_remembrance(cfg, params, row, [9])
    whole, _ = models.apply(cfg, params, row)
    cut, _ = models.apply(cfg, params, row[:, 9:])
    p, q = (jax.nn.softmax(x[:, -1]) for x in (whole, cut))
    assert got == pytest.approx(float(np.abs(p - q).sum(-1).mean() / 2), abs=1e-6)
    assert 0 < got < 1


@pytest.mark.slow
def test_norms_by_position_are_those_of_states_there(tiny):
    cfg, params, row = case(tiny, "model.pattern=mamba2,attention", "model.depth=2")
    (found,) = state_norms(cfg, params, row, every=8)
    assert found.shape == (3, 1, 3, cfg.model.heads)
    _, state = models.apply(cfg, params, row[:, :16], state=models.init_state(cfg, 3, 16))
    (want,) = jax.tree.leaves(initial.norms(state))
    np.testing.assert_allclose(found[1], want, rtol=1e-4)


def test_what_cannot_be_asked_is_refused(tiny):
    cfg, params, row = case(tiny)
    with pytest.raises(UserError, match=r"start 24 leaves nothing of 24 tokens.*0 to 23"):
        effective_remembrance(cfg, params, row, [24])
    with pytest.raises(UserError, match="every=7 does not divide 24"):
        state_norms(cfg, params, row, 7)
    for keys in (
        [],
        ["model.pattern=gated_conv"],
        ["model.pattern=mamba2", "model.extension=window=4"],
    ):
        with pytest.raises(UserError, match="no recurrent layer, or"):
            state_norms(tiny(*keys), {}, row, 8)
