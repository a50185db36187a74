"""Accuracy at many places of a stream, by how far into it they are."""

import jax
import numpy as np
import pytest

from lcm import models
from lcm.data.streams import OverwriteRecall
from lcm.errors import UserError
from lcm.evaluation import recall

TASK = OverwriteRecall(4)


def test_bands_double_and_cover():
    assert recall.bands(8, 64) == [(0, 8), (8, 16), (16, 32), (32, 64)]
    assert recall.bands(8, 8) == [(0, 8)]
    for wrong in (12, 24, 4):
        with pytest.raises(UserError, match="no power of two times 8"):
            recall.bands(8, wrong)


def test_shares_are_of_what_is_asked_in_each_band():
    right = np.array([[1, 0, 0, 1], [1, 0, 0, 0]], bool)
    asked = np.array([[1, 1, 0, 1], [1, 0, 0, 1]], bool)
    assert recall.by_band(right, asked, [(0, 2), (3, 4)]) == [2 / 3, 1 / 2]
    assert np.isnan(recall.by_band(right, asked, [(2, 3)])[0])


def test_what_is_kept_is_counted_for_every_mixer(tiny):
    keys = "model.mlp=none", "model.depth=2", "model.expand=2", "model.state=2", "model.conv=4"
    found = {}
    for mixer in ("mamba2", "gated_deltanet", "linear_attention"):
        cfg = tiny(*keys, f"model.pattern={mixer}", "model.width=16", "model.heads=4")
        found[mixer] = recall.kept(cfg)
    # Two layers of 32 channels times N; three tokens of x, b and c, or of q and k of 4 heads, v.
    assert found == {
        "mamba2": (2 * 32 * 2, 2 * 3 * (32 + 2 * 2)),
        "gated_deltanet": (2 * 32 * 2, 2 * 3 * (32 + 2 * 8)),
        "linear_attention": (2 * 32 * 2, 0),
    }


@pytest.mark.slow
def test_answers_with_bounded_states_are_plain_ones_until_bounds_bind(tiny):
    cfg = tiny("model.pattern=mamba2", "model.depth=1", "model.mlp=none", "model.vocab=12")
    params = models.init(cfg, jax.random.key(0))
    batch = TASK.batch(TASK.rows((0,), 6, 32))
    right, asked = recall.answered(cfg, params, batch, rows=4)
    assert right.shape == asked.shape == (6, 32)
    assert (asked == TASK.asks(batch.tokens_BL)).all() and not (right & ~asked).any()
    logits, _ = models.apply(cfg, params, batch.tokens_BL)
    np.testing.assert_array_equal(right, (logits.argmax(-1) == batch.targets_BL) & asked)
    most = jax.tree.map(lambda norm: 100 * norm, recall.usual_norms(cfg, params, batch))
    free, _ = recall.answered_within(cfg, params, batch, most, 8)
    np.testing.assert_array_equal(free, right)
    none = jax.tree.map(lambda norm: 0 * norm, most)
    bound, _ = recall.answered_within(cfg, params, batch, none, 8)
    # With nothing left of a state, only what stands in the piece, and convolutions, can matter.
    pieces = TASK.batch(batch.tokens_BL[:, :8])
    first, _ = recall.answered(cfg, params, pieces)
    np.testing.assert_array_equal(bound[:, :7], first[:, :7])
    with pytest.raises(UserError, match="every=5 does not divide 32"):
        recall.answered_within(cfg, params, batch, most, 5)
