"""Draws against the exact distribution, and each test against faults that it must find."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm.decoding import (
    Sampling,
    begin,
    chain,
    draw,
    keys,
    observe,
    plan,
    process,
    sample,
    statistics,
)

from .rows import CAPACITY, logits

ALARM = 1e-4  # p-values below it fail, with fixed seeds

# Sequences of three tokens, each drawn from logits that depend on the one before

VOCAB, STEPS, DRAWS = 5, 3, 20_000
TABLE = logits(VOCAB, VOCAB, seed=5, scale=1.5)
REQUEST = Sampling(temperature=0.7, top_p=0.85, repetition_penalty=1.4, presence_penalty=0.3)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def conditional(so_far):
    """The same request written again: in float64, one sequence at a time, by sorting."""
    x = TABLE[so_far[-1]].astype(np.float64)
    for token in set(so_far):
        x[token] = x[token] / 1.4 if x[token] > 0 else x[token] * 1.4
    for token in set(so_far[1:]):
        x[token] -= 0.3
    p = softmax(x / 0.7)
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= 0.85]] = 0
    return p / p.sum()


def exact():
    """The probability of each sequence, `[V ** STEPS]`."""
    found = []
    for sequence in itertools.product(range(VOCAB), repeat=STEPS):
        so_far, p = [0], 1.0
        for token in sequence:
            p *= conditional(so_far)[token]
            so_far.append(token)
        found.append(p)
    return np.array(found)


def right(chain_, key_R, history, logits_RV):
    history, drawn = sample(chain_, key_R, history, logits_RV)
    return history, drawn.token_R


def twice(chain_, key_R, history, logits_RV):
    temperature = [p for p in chain_ if type(p).__name__ == "Temperature"]
    return right((*chain_, *temperature), key_R, history, logits_RV)


def truncated_first(chain_, key_R, history, logits_RV):
    return right(chain_[::-1], key_R, history, logits_RV)


def one_noise(chain_, key_R, history, logits_RV):
    history, processed_RV = process(chain_, history, logits_RV)
    return history, draw(key_R, processed_RV)[0]


def noise_of_the_batch(chain_, key_R, history, logits_RV):
    return right(chain_, jnp.broadcast_to(key_R[0], key_R.shape), history, logits_RV)


def unseen(chain_, key_R, history, logits_RV):
    blind = jax.tree.map(jnp.zeros_like, (history.seen_RV, history.written_RV))
    stale = type(history)(**{**vars(history), "seen_RV": blind[0], "written_RV": blind[1]})
    return history, right(chain_, key_R, stale, logits_RV)[1]


def frequencies(step):
    """How often each sequence was drawn by requests of seeds 0, 1, 2, ..."""
    shape = plan([REQUEST], VOCAB, CAPACITY)
    repeat = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, DRAWS, axis=0), tree)  # noqa: E731
    chain_, history = repeat((chain([REQUEST], shape), begin([REQUEST], [[0]], shape)))
    key_R = jax.vmap(jax.random.key)(jnp.arange(DRAWS, dtype=jnp.uint32))

    @jax.jit
    def run(history):
        def one(carry, _):
            history, last_R = carry
            history, token_R = step(chain_, key_R, history, jnp.asarray(TABLE)[last_R])
            history = observe(history, token_R, jnp.ones(DRAWS, bool))
            return (history, token_R), token_R

        return jax.lax.scan(one, (history, jnp.zeros(DRAWS, jnp.int32)), length=STEPS)[1]

    cells = np.ravel_multi_index(np.asarray(run(history)), (VOCAB,) * STEPS)
    return np.bincount(cells, minlength=VOCAB**STEPS)


def test_sequences_have_their_probabilities():
    assert statistics.chi_square(frequencies(right), exact()) > ALARM


@pytest.mark.parametrize("fault", [twice, truncated_first, one_noise, noise_of_the_batch, unseen])
def test_of_sequences_finds(fault):
    assert statistics.chi_square(frequencies(fault), exact()) < 1e-12


def test_chi_square_alarms_as_often_as_it_says():
    """p-values of right draws are uniform, with cells merged and without."""
    rng = np.random.default_rng(0)
    p = np.append(np.full(20, 0.002), np.full(8, 0.12))
    p_values = [statistics.chi_square(rng.multinomial(1000, p), p) for _ in range(1000)]
    assert 0.03 < np.mean(np.array(p_values) < 0.05) < 0.07
    assert statistics.chi_square([5, 5, 1], [0.5, 0.5, 0.0]) == 0


# Long sequences, whose conditionals are known but cannot be enumerated


def surprises(request, faults=(1.0,)):
    """z of 100 sequences of 200 tokens, for draws, only, from logits times each of the faults."""
    rows, length, vocab = 100, 200, 40
    shape = plan([request], vocab, CAPACITY)
    size = rows * length
    repeat = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), tree)  # noqa: E731
    chain_, history = repeat((chain([request], shape), begin([request], [[0]], shape)))
    raw_RV = jnp.asarray(logits(size, vocab, scale=2.0))

    @jax.jit
    def run(raw_RV, fault):
        said_RV = process(chain_, history, raw_RV)[1]
        token_R, _ = draw(jax.random.split(jax.random.key(0), size), said_RV * fault)
        picked_R = jnp.take_along_axis(jax.nn.log_softmax(said_RV), token_R[:, None], 1)[:, 0]
        return picked_R, *statistics.moments(said_RV)

    each = [[np.asarray(x).reshape(rows, length) for x in run(raw_RV, f)] for f in faults]
    return [statistics.entropy_z(*one) for one in each]


@pytest.mark.parametrize("request_", [Sampling(), Sampling(temperature=0.8, top_p=0.9)])
def test_surprise_is_the_entropy(request_):
    (z,) = surprises(request_)
    assert abs(z.mean()) < 4 / np.sqrt(len(z)) and 0.8 < z.std() < 1.2


def test_surprise_finds_a_temperature_and_its_direction():
    colder, hotter = surprises(Sampling(top_p=0.95), (1.1, 1 / 1.1))
    assert colder.mean() < -1 and hotter.mean() > 1


def test_moments_are_those_of_a_table():
    p = np.array([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    with np.errstate(divide="ignore"):
        entropy, variance = statistics.moments(np.log(p).astype(np.float32))
    np.testing.assert_allclose(entropy, [1.5 * np.log(2), 0], atol=1e-6)
    np.testing.assert_allclose(variance, [0.25 * np.log(2) ** 2, 0], atol=1e-6)


# Whose noise it is

WORDS = 120
FOLLOWS = logits(WORDS, WORDS, seed=1, scale=2.0)
MINE = Sampling(
    temperature=0.9, top_k=60, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=2**32 - 1
)
OTHERS = [
    Sampling(seed=number, temperature=0.5 * (number % 3), typical_p=0.5 + 0.05 * number)
    for number in range(7)
]


@jax.jit
def following(chain_, key_R, history, last_R):
    history, drawn = sample(chain_, key_R, history, jnp.asarray(FOLLOWS)[last_R])
    return observe(history, drawn.token_R, jnp.ones(len(last_R), bool)), drawn


def generated(settings, row, key_by_row=False):
    """Tokens and log-probabilities of one row of a batch over 12 steps."""
    shape = plan(settings, WORDS, CAPACITY)
    prompts = [[0, 5, 9] if number == row else [number] for number in range(len(settings))]
    history, chain_ = begin(settings, prompts, shape), chain(settings, shape)
    key_R = keys(settings, shape)
    if key_by_row:
        key_R = jax.random.split(jax.random.key(0), len(settings))
    last_R = jnp.asarray([prompt[-1] for prompt in prompts])
    found = []
    for _ in range(12):
        history, drawn = following(chain_, key_R, history, last_R)
        last_R = drawn.token_R
        found.append([np.asarray(x)[row] for x in drawn])
    return np.array(found, np.float64).T


def test_draws_of_a_request_do_not_depend_on_batch_and_row():
    """Bit for bit, log-probabilities too, in batches of 1, 3 and 8 with other neighbours."""
    alone = generated([MINE], 0)
    assert len(set(alone[0])) > 6
    for before, after in ((1, 1), (0, 2), (7, 0), (2, 5)):
        settings = [*OTHERS[:before], MINE, *OTHERS[::-1][:after]]
        np.testing.assert_array_equal(generated(settings, before), alone)
    by_row = generated([*OTHERS[:2], MINE], 2, key_by_row=True)
    assert (by_row[0] != generated([MINE], 0, key_by_row=True)[0]).any()


def test_seeds_differ_and_repeat():
    first, second = ([Sampling(seed=seed)] for seed in (1, 2))
    assert (generated(first, 0)[0] != generated(second, 0)[0]).any()
    np.testing.assert_array_equal(generated(first, 0), generated(first, 0))


# Greedy rows


def test_greedy_takes_the_first_of_equals_with_certainty():
    logits_RV = logits(2, 30)
    logits_RV[:, [21, 4, 9]] = 12.5
    raw = float(logits_RV[0, 4] - np.log(np.exp(logits_RV[0].astype(np.float64)).sum()))
    for settings in ([Sampling(temperature=0)] * 2, [Sampling(temperature=0), Sampling()]):
        shape = plan(settings, 30, CAPACITY)
        key_R = keys(settings, shape)
        assert (key_R is None) == shape.greedy == (settings[0] == settings[1])
        history = begin(settings, [[1], [1]], shape)
        _, drawn = jax.jit(sample)(chain(settings, shape), key_R, history, logits_RV)
        assert drawn.token_R[0] == 4 and drawn.logprob_R[0] == 0
        np.testing.assert_allclose(drawn.raw_logprob_R[0], raw, rtol=1e-5)


def test_log_probabilities_are_of_the_model_and_of_what_was_drawn_from():
    request = Sampling(temperature=0.5, top_k=2)
    shape = plan([request], 30, CAPACITY)
    logits_RV = logits(1, 30)
    history = begin([request], [[]], shape)
    arguments = chain([request], shape), keys([request], shape), history, logits_RV
    _, drawn = jax.jit(sample)(*arguments)
    token, best = int(drawn.token_R[0]), np.sort(logits_RV[0])[-2:].astype(np.float64)
    x = logits_RV[0].astype(np.float64)
    np.testing.assert_allclose(drawn.raw_logprob_R, np.log(softmax(x)[token]), rtol=1e-5)
    want = x[token] / 0.5 - np.log(np.exp(best / 0.5).sum())
    np.testing.assert_allclose(drawn.logprob_R, want, atol=1e-5)


def test_half_precision_logits_are_drawn_from_in_float32():
    request = Sampling(temperature=0.5)
    shape = plan([request], 30, CAPACITY)
    history = begin([request], [[]], shape)
    rest = chain([request], shape), keys([request], shape), history
    half_RV = jnp.asarray(logits(1, 30), jnp.bfloat16)
    _, drawn = jax.jit(sample)(*rest, half_RV)
    _, want = jax.jit(sample)(*rest, half_RV.astype(jnp.float32))
    for got, same in zip(drawn, want, strict=True):
        assert got.dtype == same.dtype and (got == same).all()
