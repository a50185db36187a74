"""Processors against those of transformers, and what holds for each without a peer."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lcm.decoding import Sampling, begin, chain, plan
from lcm.decoding.processors import ORDER
from lcm.errors import UserError

from .rows import CAPACITY, kept, logits, processed, watch

VOCAB = 500
STOPS = (7, 11)
PROMPT = np.random.default_rng(3).integers(0, 12, 30)


def theirs(make, logits_RV, prompt=PROMPT):
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    processors = make(pytest.importorskip("transformers.generation.logits_process"))
    ids = torch.tensor(np.tile(prompt, (len(logits_RV), 1)))
    out = torch.tensor(logits_RV)
    for processor in processors if isinstance(processors, list) else [processors]:
        out = processor(ids, out)
    return out.numpy()


TRUNCATIONS = {
    "top_k": (lambda hf, v: hf.TopKLogitsWarper(v), (1, 5, 499, 500)),
    "top_p": (lambda hf, v: hf.TopPLogitsWarper(v), (1e-6, 0.3, 0.9, 0.999)),
    "min_p": (lambda hf, v: hf.MinPLogitsWarper(v), (1e-4, 0.05, 0.5, 1.0)),
    "typical_p": (lambda hf, v: hf.TypicalLogitsWarper(v), (0.01, 0.2, 0.9, 0.99)),
    "epsilon": (lambda hf, v: hf.EpsilonLogitsWarper(v), (1e-5, 3e-3, 0.9)),
    "eta": (lambda hf, v: hf.EtaLogitsWarper(v), (1e-5, 3e-3, 0.5)),
}


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_truncations_keep_what_transformers_keeps(name):
    """Rows of several values in one batch, flat and peaked logits."""
    make, values = TRUNCATIONS[name]
    for seed, scale in enumerate((0.3, 3.0, 10.0)):
        logits_RV = logits(len(values), VOCAB, seed, scale)
        got = processed([Sampling(**{name: value}) for value in values], logits_RV)
        for row, value in enumerate(values):
            want = theirs(lambda hf, v=value: make(hf, v), logits_RV[row : row + 1])[0]
            np.testing.assert_array_equal(got[row], want, err_msg=f"{name}={value}, row {row}")


PENALTIES = {
    "repetition_penalty": (1.3, lambda hf: hf.RepetitionPenaltyLogitsProcessor(1.3)),
    "no_repeat_ngram": (2, lambda hf: hf.NoRepeatNGramLogitsProcessor(2)),
    "temperature": (0.7, lambda hf: hf.TemperatureLogitsWarper(0.7)),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_those_of_transformers(name):
    value, make = PENALTIES[name]
    logits_RV = logits(2, VOCAB)
    got = processed([Sampling(**{name: value})] * 2, logits_RV, [PROMPT] * 2)
    np.testing.assert_allclose(got, theirs(make, logits_RV), rtol=2e-7)  # a division rounds


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ngrams_are_those_of_transformers(n):
    """Beside rows of another n, and where a sequence is shorter than n."""
    logits_RV = logits(2, VOCAB)
    settings = [Sampling(no_repeat_ngram=n), Sampling(no_repeat_ngram=3)]
    for prompt in (PROMPT, PROMPT[:2], [5, 5, 5, 5]):
        got = processed(settings, logits_RV, [prompt] * 2)
        want = theirs(lambda hf: hf.NoRepeatNGramLogitsProcessor(n), logits_RV, prompt)
        np.testing.assert_array_equal(got[0], want[0])


def after(settings, vocab, tokens, prompts=None):
    """The processed logits after each of the tokens was generated in every row."""
    prompts = prompts or [PROMPT] * len(settings)
    return processed(settings, logits(len(settings), vocab), prompts, tokens)


@pytest.mark.parametrize("new", [0, 2, 3, 8])
def test_ends_are_those_of_transformers(new):
    tokens, start = [20 + i for i in range(new)], len(PROMPT)
    ids = [*PROMPT, *tokens]
    minimum = Sampling(min_new_tokens=3, stop_ids=STOPS)
    got = after([minimum], VOCAB, tokens)
    make = lambda hf: hf.MinNewTokensLengthLogitsProcessor(start, 3, list(STOPS))  # noqa: E731
    np.testing.assert_array_equal(got, theirs(make, logits(1, VOCAB), ids))
    decay = Sampling(length_decay=1.2, length_decay_start=2, stop_ids=STOPS)
    got = after([decay], VOCAB, tokens)
    make = lambda hf: hf.ExponentialDecayLengthPenalty((2, 1.2), list(STOPS), start)  # noqa: E731
    np.testing.assert_allclose(got, theirs(make, logits(1, VOCAB), ids), rtol=1e-6)


def test_a_full_chain_is_that_of_transformers():
    """In one order on both sides, each renormalising over what the one before it left."""
    settings = Sampling(
        repetition_penalty=1.2, no_repeat_ngram=3, temperature=0.8, top_k=50, top_p=0.95
    )
    settings = dataclasses.replace(settings, min_p=0.02, typical_p=0.9, epsilon=5e-3, eta=2e-2)

    def make(hf):
        return [
            hf.RepetitionPenaltyLogitsProcessor(1.2),
            hf.NoRepeatNGramLogitsProcessor(3),
            hf.TemperatureLogitsWarper(0.8),
            hf.TopKLogitsWarper(50),
            hf.TopPLogitsWarper(0.95),
            hf.MinPLogitsWarper(0.02),
            hf.TypicalLogitsWarper(0.9),
            hf.EpsilonLogitsWarper(5e-3),
            hf.EtaLogitsWarper(2e-2),
        ]

    for seed in range(5):
        logits_RV = logits(1, VOCAB, seed)
        got = processed([settings], logits_RV, [PROMPT])
        want = theirs(make, logits_RV)
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
        np.testing.assert_allclose(got, want, rtol=4e-7)
        assert 1 < np.isfinite(got).sum() < 50


# What needs no peer

EVERYTHING = Sampling(
    banned=(1,),
    stop_ids=STOPS,
    min_new_tokens=5,
    length_decay=1.1,
    repetition_penalty=1.3,
    repetition_window=8,
    frequency_penalty=0.2,
    presence_penalty=0.1,
    eos_penalty=2.0,
    eos_penalty_length=9,
    no_repeat_ngram=2,
    temperature=0.7,
    top_k=40,
    top_p=0.9,
    min_p=0.02,
    typical_p=0.9,
    epsilon=1e-3,
    eta=1e-3,
)


@pytest.mark.parametrize("cls", ORDER, ids=lambda cls: cls.__name__)
def test_defaults_are_identities(cls):
    """Bit for bit, beside a row that uses everything, zeros of both signs and infinities too."""
    settings = [Sampling(stop_ids=STOPS), EVERYTHING]
    shape = plan(settings, VOCAB, CAPACITY)
    history = begin(settings, [PROMPT, PROMPT], shape)
    for token in (30, 7, 9):
        history = watch(history, np.array([token, token]), np.array([True, True]))
    logits_RV = logits(2, VOCAB)
    logits_RV[0, :4] = 0.0, -0.0, -np.inf, -1e30
    _, got = cls.of(settings, shape)(history, jnp.asarray(logits_RV))
    np.testing.assert_array_equal(np.asarray(got)[0].view(np.int32), logits_RV[0].view(np.int32))
    assert (np.asarray(got)[1] != logits_RV[1]).any()


def test_rows_do_not_see_each_other():
    each = [
        Sampling(),
        EVERYTHING,
        Sampling(temperature=0.5, top_p=0.5, repetition_penalty=1.5),
        Sampling(top_k=3, no_repeat_ngram=4),
        Sampling(top_p=0.3, repetition_penalty=1.1, repetition_window=0),
    ]
    prompts = [PROMPT[: 5 * n] for n in range(5)]
    logits_RV = logits(5, VOCAB)
    together = processed(each, logits_RV, prompts)
    for row, settings in enumerate(each):
        alone = processed([settings], logits_RV[row : row + 1], prompts[row : row + 1])
        np.testing.assert_array_equal(together[row], alone[0])


def test_a_greedy_batch_has_no_processors():
    greedy = Sampling(temperature=0, top_k=5, top_p=0.9, typical_p=0.5)
    assert chain([greedy], plan([greedy], VOCAB, CAPACITY)) == ()
    logits_RV = logits(2, VOCAB)
    logits_RV[:, [9, 3, 400]] = 50.0
    mixed = kept([greedy, Sampling(typical_p=0.5, top_k=2)], logits_RV)
    assert np.flatnonzero(mixed[0]).tolist() == [3]  # the first of equals
    assert mixed[1, [3, 9, 400]].all()


TIGHTER = {
    "top_k": (0, 400, 50, 5, 1),
    "top_p": (1.0, 0.99, 0.9, 0.7, 1e-9),
    "min_p": (0.0, 1e-4, 0.01, 0.1, 1.0),
    "typical_p": (1.0, 0.95, 0.5, 0.1, 1e-9),
    "epsilon": (0.0, 1e-5, 1e-3, 0.02, 1.0),
    "eta": (0.0, 1e-5, 1e-3, 0.1, 1.0),
}


@pytest.mark.parametrize("name", TIGHTER)
def test_kept_sets_are_nested_and_never_empty(name):
    values = TIGHTER[name]
    logits_RV = np.tile(logits(1, VOCAB), (len(values), 1))
    sets = kept([Sampling(**{name: value}) for value in values], logits_RV)
    assert sets[0].all()
    assert sets[-1].sum() == 1 or name == "eta"  # whose floor is exp(-H) at the most
    for wider, narrower in itertools.pairwise(sets):
        assert (narrower <= wider).all() and narrower.sum() < wider.sum()


@pytest.mark.parametrize("name", TIGHTER)
def test_equals_stay_together(name):
    values = TIGHTER[name][1:]
    logits_RV = np.tile(np.repeat(logits(1, 50), 4, axis=1), (len(values), 1))
    sets = kept([Sampling(**{name: value}) for value in values], logits_RV)
    assert (sets.reshape(len(values), 50, 4).sum(-1) % 4 == 0).all()


def test_top_p_of_a_nearly_uniform_distribution_keeps_the_ceiling():
    logits_RV = (np.random.default_rng(0).permutation(1000) * 1e-7).astype(np.float32)[None]
    for p in (0.0005, 0.2995, 0.9001, 0.9995):
        assert kept([Sampling(top_p=p)], logits_RV).sum() == np.ceil(p * 1000)


def test_banned_tokens_and_stops_of_each_row():
    settings = [Sampling(banned=(0, 499)), Sampling(banned=range(499)), Sampling()]
    got = kept(settings, logits(3, VOCAB))
    assert np.flatnonzero(~got[0]).tolist() == [0, 499]
    assert np.flatnonzero(got[1]).tolist() == [499]
    assert got[2].all()


def test_frequency_and_presence_see_generated_tokens_alone():
    settings = Sampling(frequency_penalty=0.25, presence_penalty=0.5)
    got, plain = after([settings], VOCAB, [40, 40, 40, 41]), logits(1, VOCAB)
    np.testing.assert_allclose(got[0, 40], plain[0, 40] - 0.75 - 0.5, rtol=1e-6)
    np.testing.assert_allclose(got[0, 41], plain[0, 41] - 0.25 - 0.5, rtol=1e-6)
    others = np.setdiff1d(np.arange(VOCAB), [40, 41])  # the prompt's among them
    np.testing.assert_array_equal(got[0, others], plain[0, others])


def test_a_token_that_left_the_window_has_its_logit_back():
    """And one that ends the text always has it (2310.14971)."""
    settings = [Sampling(repetition_penalty=1.5, repetition_window=3, stop_ids=STOPS)]
    tokens = [30, 31, 32, 7, 33]
    got, plain = after(settings, VOCAB, tokens, [[30, 34]]), logits(1, VOCAB)
    changed = np.flatnonzero(got[0].view(np.int32) != plain[0].view(np.int32))
    assert changed.tolist() == [32, 33]


def test_windows_of_none_and_of_all():
    plain = logits(3, VOCAB)
    none = Sampling(repetition_penalty=1.5, repetition_window=0)
    all_ = Sampling(repetition_penalty=1.5, repetition_window=CAPACITY - 1)
    ever = Sampling(repetition_penalty=1.5)
    got = after([none, all_, ever], VOCAB, [40, 41])
    np.testing.assert_array_equal(got[0], plain[0])
    for row in (1, 2):
        changed = np.flatnonzero(got[row] != plain[row])
        assert changed.tolist() == sorted({*PROMPT.tolist(), 40, 41})


def test_penalties_do_not_depend_on_the_order_of_the_history():
    settings = [Sampling(repetition_penalty=1.4, frequency_penalty=0.3)] * 2
    got = processed(settings, np.tile(logits(1, VOCAB), (2, 1)), [PROMPT, PROMPT[::-1]])
    np.testing.assert_array_equal(got[0], got[1])


def test_end_penalty():
    """Linear up to the wanted length; an infinite one forbids the end before it, not after."""
    finite = Sampling(eos_penalty=4.0, eos_penalty_length=4, stop_ids=(7,))
    never = dataclasses.replace(finite, eos_penalty=float("inf"))
    plain = logits(2, VOCAB)
    for new in range(6):
        got = after([finite, never], VOCAB, range(50, 50 + new))
        np.testing.assert_allclose(got[0, 7], plain[0, 7] - max(0, 4 - new), rtol=1e-6)
        assert np.isneginf(got[1, 7]) if new < 4 else got[1, 7] == plain[1, 7]
        np.testing.assert_array_equal(np.delete(got, 7, 1), np.delete(plain, 7, 1))


def test_decay_that_overflows_stays_finite():
    settings = [Sampling(length_decay=1e9, stop_ids=(7,))]
    assert np.isfinite(after(settings, VOCAB, range(20))).all()


def test_ngrams_never_leave_nothing():
    got = processed([Sampling(no_repeat_ngram=1)] * 2, logits(2, 3), [[0, 1, 2], [0, 2]])
    assert np.isfinite(got).tolist() == [[True] * 3, [False, True, False]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature=-1 must be at least 0; 0 takes the largest logit"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"top_p": 0}, "top_p=0 must be above 0 and at most 1; top_k=1 keeps the likeliest"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"min_p": 2.0}, "min_p=2.0 must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"repetition_window": -1}, "repetition_window=-1"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty=inf must be finite"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 is more than"),
        ({"eos_penalty": 1.0}, "no effect without eos_penalty_length"),
        ({"banned": (-1,)}, r"banned=\(-1,\) must be ids from 0"),
        ({"seed": 1 << 32}, "seed=4294967296"),
    ],
)
def test_settings_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Sampling(banned=(5,)), "banned=5 must be below the 5 entries"),
        (Sampling(stop_ids=(7,)), "stop_ids=7 must be below the 5 entries"),
        (Sampling(banned=range(5)), "leave none of 5 tokens"),
        (Sampling(banned=range(4), stop_ids=(4,), min_new_tokens=1), "leave none of 5 tokens"),
    ],
)
def test_settings_that_do_not_fit_a_vocabulary_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        plan([settings], 5, CAPACITY)
