"""The transducer of lcm's layers, and the searches, against the lattice's own probabilities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models
from lcm.data import stutter
from lcm.decoding import transducer as decoding
from lcm.errors import ConfigError
from lcm.evaluation.edits import edit_distance, error_rate
from lcm.models import transducer
from lcm.ops.transducer import transducer_loss

SIZES = ("model.width=8", "model.heads=2", "model.state=4", "model.mlp=none", "model.expand=1")
CONTEXT = models.default_context((1, 7))
hidden_of = jax.jit(models.decoder.hidden, static_argnums=0)
loss_of = jax.jit(transducer.loss, static_argnums=0)
FRAMES = jnp.array([[1, 1, 2, 3, 0], [3, 2, 2, 1, 1]])


def made(tiny, joint="tanh", mixer="rglru", both=True, vocab=4):
    """A tiny transducer whose weights are large enough to say something."""
    network = lambda depth: models.spec(  # noqa: E731
        tiny(*SIZES, f"model.pattern={mixer}", f"model.depth={depth}", f"model.vocab={vocab}")
    )
    spec = transducer.TransducerSpec(network(2), network(1), joint, both)
    params = transducer.init(spec, jax.random.key(0))
    params["joint"] = jax.tree.map(lambda x: 3 * x + 0.1, params["joint"])
    return spec, params


@pytest.mark.quick("sum")
@pytest.mark.parametrize("joint", ["sum", "tanh"])
def test_loss_is_that_of_the_joint_at_every_pair_and_padding_is_not_read(tiny, joint):
    spec, params = made(tiny, joint)
    labels = jnp.array([[2, 3], [1, 0]])
    frames_B, labels_B = jnp.array([4, 5]), jnp.array([2, 1])
    got = loss_of(spec, params, transducer.Pairs(FRAMES, frames_B, labels, labels_B))
    for row, (t, u) in enumerate([(4, 2), (5, 1)]):
        symbols = decoding.symbols_of(spec, params, FRAMES[row, :t].tolist(), padded=5)
        prefixes = [tuple(labels[row, :n].tolist()) for n in range(u + 1)]
        log_p = np.array([[symbols(i, prefix) for prefix in prefixes] for i in range(t)])
        want = transducer_loss(
            jnp.asarray(log_p)[None], labels[row : row + 1, :u], jnp.array([t]), jnp.array([u])
        )
        assert float(got[row]) == pytest.approx(float(want[0]), rel=1e-4)


def test_joints_are_their_formulas(tiny):
    f, g = jnp.arange(8.0)[None] / 8, jnp.ones((1, 8)) / 3
    spec, params = made(tiny, "sum")
    own = params["joint"]
    want = f @ own["f"] + g @ own["g"] + own["bias"]
    np.testing.assert_allclose(transducer.join(spec, params, f, g), want, rtol=1e-5)
    spec, params = made(tiny, "tanh")
    own = params["joint"]
    want = jnp.tanh(f @ own["f"] + g @ own["g"] + own["bias"]) @ own["out"]
    np.testing.assert_allclose(transducer.join(spec, params, f, g), want, rtol=1e-5)


@pytest.mark.parametrize("mixer", ["rglru", "attention"])
def test_greedy_of_many_rows_is_greedy_of_each(tiny, mixer):
    spec, params = made(tiny, mixer=mixer)
    got = decoding.greedy(spec, params, FRAMES, jnp.array([4, 5]), most=6, per_frame=2)
    assert any(got)  # or it would say nothing
    f_BTD = decoding._transcribed(spec, params, FRAMES, jnp.array([4, 5]))
    for row, count in enumerate([4, 5]):
        f = f_BTD[row : row + 1]
        labels = []
        for t in range(count):
            for _ in range(2):
                read = jnp.array([[0, *labels, *[0] * (6 - len(labels))]])
                g, _ = hidden_of(spec.prediction, params["prediction"], read, CONTEXT, None)
                g = g[:, len(labels)]
                best = int(transducer.join(spec, params, f[:, t], g).argmax())
                if best == 0 or len(labels) == 6:
                    break
                labels.append(best)
        assert got[row] == labels


def table(frames, vocab, seed=0):
    """Symbols of a model that is a table of log-probabilities by frame and last label."""
    rng = np.random.default_rng(seed)
    log_p = np.asarray(jax.nn.log_softmax(rng.normal(size=(frames, vocab, vocab)) * 2))
    return lambda t, labels: log_p[t, labels[-1] if labels else 0]


lattice_loss = jax.jit(transducer_loss)


def likelihood(symbols, frames, labels, room=4):
    """Of labels, padded to `room` for one compilation."""
    log_p = np.zeros((frames, room + 1, len(symbols(0, ()))))
    for t, n in itertools.product(range(frames), range(len(labels) + 1)):
        log_p[t, n] = symbols(t, labels[:n])
    wanted = jnp.array([[*labels, *[0] * (room - len(labels))]])
    sizes = jnp.array([frames]), jnp.array([len(labels)])
    return -float(lattice_loss(jnp.asarray(log_p)[None], wanted, *sizes)[0])


def test_a_beam_of_everything_has_the_lattice_s_likelihoods():
    """With the sums over prefixes and no pruning each sequence has all of its alignments."""
    symbols = table(3, 3)
    found = decoding.beam_search(symbols, 3, width=100, most=3)
    every = [y for n in range(4) for y in itertools.product((1, 2), repeat=n)]
    assert sorted(one.labels for one in found) == sorted(every)
    for one in found:
        want = likelihood(symbols, 3, one.labels)
        assert one.log_probability == pytest.approx(want, abs=1e-4)
    rates = [one.log_probability / max(1, len(one.labels)) for one in found]
    assert rates == sorted(rates, reverse=True)


def test_a_narrow_beam_keeps_no_more_than_it_may_and_never_says_too_much():
    symbols = table(4, 4, seed=1)
    found = decoding.beam_search(symbols, 4, width=3, most=4)
    assert 1 <= len(found) <= 3
    for one in found:
        assert one.log_probability <= likelihood(symbols, 4, one.labels) + 1e-5
    best = max(found, key=lambda one: one.log_probability)
    whole = decoding.beam_search(symbols, 4, width=500, most=4)
    assert best.labels == max(whole, key=lambda one: one.log_probability).labels


def test_what_cannot_be_decoded_or_built_is_refused(tiny):
    spec, params = made(tiny)
    with pytest.raises(ConfigError, match="most=0"):
        decoding.greedy(spec, params, FRAMES, jnp.array([4, 5]), most=0)
    with pytest.raises(ConfigError, match=r"rows of \[0, 5\] frames"):
        decoding.greedy(spec, params, FRAMES, jnp.array([0, 5]), most=3)
    with pytest.raises(ConfigError, match="width=0"):
        decoding.beam_search(table(2, 2), 2, width=0, most=3)
    with pytest.raises(ConfigError, match=r"joint 'product'.*sum, tanh"):
        transducer.TransducerSpec(spec.transcription, spec.prediction, "product")
    with pytest.raises(ConfigError, match="depth 1 reads in one direction"):
        transducer.TransducerSpec(spec.prediction, spec.prediction)
    labels = jnp.ones((2, 3), jnp.int32), jnp.array([3, 2])
    with pytest.raises(ValueError, match="row 0 has 0 of"):
        transducer.loss(spec, params, transducer.Pairs(FRAMES, jnp.array([0, 5]), *labels))
    with pytest.raises(ValueError, match="row 1 has 4 of 3 tokens"):
        many = labels[0], jnp.array([3, 4])
        transducer.loss(spec, params, transducer.Pairs(FRAMES, jnp.array([4, 5]), *many))
    with pytest.raises(ValueError, match="2 rows of frames for 1 of labels"):
        pairs = FRAMES, jnp.array([4, 5]), *(each[:1] for each in labels)
        transducer.loss(spec, params, transducer.Pairs(*pairs))
    attends, weights = made(tiny, mixer="attention")
    with pytest.raises(ConfigError, match="decode greedily"):
        decoding.symbols_of(attends, weights, [1, 2])


def test_stutters_are_what_they_say():
    pairs = stutter.pairs(5, (2, 4), 50, seed=1, room=6)
    assert pairs.frames_BT.shape == (50, 18) and pairs.labels_BU.shape == (50, 6)
    assert set(pairs.labels_B.tolist()) == {2, 3, 4}
    for row, answer in enumerate(stutter.sequences(pairs)):
        said = pairs.frames_BT[row, : pairs.frames_B[row]].tolist()
        assert [symbol for symbol, _ in itertools.groupby(said)] == answer
        assert all(len(list(run)) <= 3 for _, run in itertools.groupby(said))
        assert min(answer) >= 1 and max(answer) <= 5
    with pytest.raises(ConfigError, match="symbols=1"):
        stutter.pairs(1, (1, 2), 3, 0)
    with pytest.raises(ConfigError, match="lengths 3-2"):
        stutter.pairs(3, (3, 2), 3, 0)


def test_edits():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3 and edit_distance("abc", "") == 3
    assert edit_distance("flaw", "lawn") == 2 and edit_distance([1, 2], [1, 2]) == 0
    assert error_rate([[1, 2], []], [[1, 3], [4, 4]]) == 3 / 4
    with pytest.raises(ValueError, match="1 answers for 2"):
        error_rate([[1]], [[1], [2]])
