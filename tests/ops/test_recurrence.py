"""Recurrences in chunks against themselves one token at a time, and against float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm.ops.recurrence import boundaries, op_diag, op_matrix, op_max, short_conv
from lcm.ops.recurrence.inverse import inverse
from lcm.ops.recurrence.reference import diag_steps, matrix_steps

B, L, H, N, P = 2, 37, 4, 6, 5
KINDS = ["head", "head, erase", "channel", "channel, erase"]
run = jax.jit(op_matrix, static_argnames="chunk")


def arrays(seed, *shapes):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def resets(seed, share=0.1):
    return jnp.asarray(np.random.default_rng(seed).random((B, L)) < share)


def matrix_case(kind, seed=0, groups=2):
    """Arguments of `op_matrix` before the resets; writes and erasures have parameters of their own,
    as the delta rule's with keys of norm 1."""
    shapes = (B, L, groups, N), (B, L, groups, N), (B, L, H, P), (B, L, groups, N), (B, H, N, P)
    q, k, v, a, S0 = arrays(seed, *shapes)
    a /= jnp.linalg.norm(a, axis=-1, keepdims=True)
    of_decay = (B, L, H, N) if "channel" in kind else (B, L, H)
    log_decay = -jnp.abs(arrays(seed + 1, of_decay)[0])
    return q, k, v, log_decay, (a, -0.8 * a) if "erase" in kind else None, S0


def gradients(function, arguments):
    def loss(arguments):
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(function(*arguments)))

    return jax.jit(jax.grad(loss))(arguments)


def close(got, want, rtol=2e-5):
    """Within a share of the largest."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=rtol * float(jnp.abs(b).max())),
        got,
        want,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_in_chunks_is_token_by_token(kind):
    case, reset = matrix_case(kind), resets(3)
    want = matrix_steps(*case, reset)
    for chunk in (5, 64):  # by channel, parts of 16
        close(run(*case, reset, chunk=chunk), want)


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_gradients(kind):
    case, reset = matrix_case(kind), resets(3)
    got = gradients(lambda *case: op_matrix(*case, reset, chunk=16), case)
    close(got, gradients(lambda *case: matrix_steps(*case, reset), case))


@pytest.mark.parametrize("kind", ["head, erase", "channel, erase"])
def test_matrix_in_pieces_and_by_documents(kind):
    """A state passed on is the sequence in one, and after a reset nothing else is known."""
    *case, S0 = matrix_case(kind)
    want, last = run(*case, S0, chunk=16)
    first, rest = (jax.tree.map(lambda x, at=at: x[:, at], case) for at in np.s_[:20, 20:])
    y, S = run(*first, S0, chunk=16)
    close(run(*rest, S, chunk=16), (want[:, 20:], last))
    reset = jnp.zeros((B, L), bool).at[:, 20].set(True)
    y, S = run(*case, S0, reset, chunk=16)
    close((y[:, :20], (y[:, 20:], S)), (want[:, :20], run(*rest, chunk=16)))


def test_a_rate_of_erasure_is_of_heads():
    """It multiplies b, of which heads share one."""
    (q, k, v, l, (a, b), S0), reset = matrix_case("head, erase"), resets(3)
    rate = arrays(7, (B, L, H))[0]
    b_BLHN = rate[..., None] * b.repeat(2, 2)
    want = run(q, k, v, l, (a, b_BLHN), S0, reset, chunk=16)
    close(run(q, k, v, l, (a, b, rate), S0, reset, chunk=16), want)
    close(matrix_steps(q, k, v, l, (a, b, rate), S0, reset), want)
    with pytest.raises(ValueError, match=r"rate .* is not by head: give"):
        op_matrix(q, k, v, l, (a, b, rate[..., :2]))


def test_matrix_of_long_decays_against_float64():
    """A chunk whose decays sum up to thousands overflows nothing and keeps its digits."""
    for kind in ("head, erase", "channel, erase"):
        q, k, v, log_decay, erase, S0 = matrix_case(kind, seed=5, groups=H)
        log_decay *= jnp.exp(jax.random.uniform(jax.random.key(0), log_decay.shape, maxval=5.0))
        assert log_decay.sum(1).min() < -500
        y, S = run(q, k, v, log_decay, erase, S0, chunk=64)
        want_y, want_S = in_float64(q, k, v, log_decay, erase, S0)
        close((y, S), (want_y, want_S), rtol=1e-4)


def in_float64(q, k, v, log_decay, erase, S0):
    q, k, v, log_decay, S = (np.asarray(x, np.float64) for x in (q, k, v, log_decay, S0))
    a, b = (np.asarray(x, np.float64) for x in erase or (0 * k, 0 * k))
    w = np.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])
    out = []
    for t in range(L):
        seen = np.einsum("bhn,bhnp->bhp", a[:, t], S)
        S = w[:, t, :, :, None] * S
        for x, y in ((b[:, t], seen), (k[:, t], v[:, t])):
            S = S + np.einsum("bhn,bhp->bhnp", x, y)
        out.append(np.einsum("bhn,bhnp->bhp", q[:, t], S))
    return np.stack(out, 1), S


def test_matrix_of_bfloat16_has_states_in_float32():
    q, k, v, log_decay, _, S0 = matrix_case("head")
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    y, S = run(*narrow, log_decay, None, S0, chunk=16)
    assert y.dtype == jnp.bfloat16 and S.dtype == jnp.float32
    want, last = run(*(x.astype(jnp.float32) for x in narrow), log_decay, None, S0, chunk=16)
    close((y.astype(jnp.float32), S), (want, last), rtol=1e-2)


def test_attention_without_softmax():
    """With no decay it is linear attention: `tril(q k^T) v`."""
    q, k, v, log_decay, *_ = matrix_case("head", groups=H)
    y, _ = run(q, k, v, 0 * log_decay, chunk=16)
    scores = jnp.tril(jnp.einsum("blhn,bmhn->bhlm", q, k))
    close(y, jnp.einsum("bhlm,bmhp->blhp", scores, v))


def test_delta_rule_replaces_what_a_key_had():
    """Of keys at right angles each gives its last value back."""
    keys = jnp.eye(N)[np.array([0, 1, 2, 1, 0, 3])][None, :, None]
    (v,) = arrays(0, (1, 6, 1, P))
    asked = jnp.broadcast_to(jnp.eye(N)[1], keys.shape)
    y, S = run(asked, keys, v, jnp.zeros((1, 6, 1)), (keys, -keys), chunk=4)
    for t, last in enumerate((None, 1, 1, 3, 3, 3)):
        np.testing.assert_allclose(y[0, t], 0 * v[0, 0] if last is None else v[0, last], atol=1e-6)
    np.testing.assert_allclose(S[0, 0, :4], v[0, np.array([4, 3, 2, 5]), 0], atol=1e-6)


def test_inverse_where_squares_would_overflow():
    """Of a matrix of ones it is known; entries of its powers come to 10^37."""
    strict = -jnp.tril(jnp.ones((128, 128)), -1)
    want = np.eye(128) - np.eye(128, k=-1)
    run = jax.jit(inverse)
    np.testing.assert_allclose(run(strict), want, atol=1e-6)
    (some,) = arrays(0, (3, 21, 21))
    some = jnp.tril(some, -1) * 0.3
    found = np.linalg.inv(np.eye(21) - some)
    np.testing.assert_allclose(run(some), found, rtol=1e-4, atol=1e-4)
    (gradient,) = jax.jit(lambda x, d: jax.vjp(inverse, x)[1](d))(some, some + 1)
    want = found.swapaxes(1, 2) @ np.asarray(some + 1) @ found.swapaxes(1, 2)  # of X' = X dA X
    np.testing.assert_allclose(gradient, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


def diag_case(seed=0):
    a, b, h0 = arrays(seed, (B, L, 3), (B, L, 3), (B, 3))
    return jax.nn.sigmoid(a), b, h0


@settings(deadline=None, max_examples=8)
@given(st.sampled_from([1, 2, 7, 36, 37, 64]), st.sampled_from([0.0, 0.1, 1.0]))
def test_diag_in_chunks_is_token_by_token(chunk, share):
    case, reset = diag_case(), resets(3, share)
    close(op_diag(*case, reset, chunk=chunk), diag_steps(*case, reset), rtol=2e-6)


def test_diag_gradients():
    case, reset = diag_case(), resets(3)
    got = gradients(lambda *case: op_diag(*case, reset, chunk=8), case)
    close(got, gradients(lambda *case: diag_steps(*case, reset), case), rtol=5e-6)


def test_diag_of_what_is_known():
    a, b, h0 = diag_case()
    close(op_diag(jnp.ones_like(a), b)[0], jnp.cumsum(b, 1))
    close(op_diag(0 * a, b, h0)[0], b)
    h, last = op_diag(a[:, :20], b[:, :20], h0)
    close(op_diag(a[:, 20:], b[:, 20:], last)[0], op_diag(a, b, h0)[0][:, 20:])
    wanted, h = np.asarray(h0, np.float64), op_diag(a, b, h0, chunk=8)[0]
    for t in range(L):
        wanted = np.float64(a[:, t]) * wanted + b[:, t]
        np.testing.assert_allclose(h[:, t], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_maxima_are_those_token_by_token(share):
    """With tokens that write nothing, of logarithm -inf, and in two calls."""
    (i, f, m0), reset = arrays(0, (B, L, 3), (B, L, 3), (B, 3)), resets(3, share)
    i, f = jnp.where(i > 1, -jnp.inf, i), -jnp.abs(f)
    m, want = np.float64(m0), []
    for t in range(L):
        m = np.maximum(np.where(reset[:, t, None], -np.inf, np.float64(f[:, t]) + m), i[:, t])
        want.append(m)
    run = jax.jit(op_max)
    got, last = run(i, f, m0, reset)
    np.testing.assert_allclose(got, np.stack(want, 1), atol=1e-5)
    np.testing.assert_array_equal(last, got[:, -1])
    _, last = run(i[:, :20], f[:, :20], m0, reset[:, :20])
    again, _ = run(i[:, 20:], f[:, 20:], last, reset[:, 20:])
    np.testing.assert_allclose(again, got[:, 20:], atol=1e-5)


def test_gradients_keep_one_state_a_chunk():
    """All states would be 64 times the arguments; what is kept for them is less than these."""
    shape = (1, 1024, 1, 64)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def loss(q, k, v):
        return op_matrix(q, k, v, jnp.zeros(shape[:3]), chunk=128)[0].sum()

    _, pull = jax.eval_shape(lambda *x: jax.vjp(loss, *x), x, x, x)
    kept = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(pull))
    assert kept < 5 * np.prod(shape)


def naive_conv(x, w, bias, tail):
    """Of one document."""
    whole, width = np.concatenate([tail, x]), len(w)
    out = [bias + sum(w[j] * whole[t + j] for j in range(width)) for t in range(len(x))]
    return np.stack(out), whole[len(whole) - (width - 1) :]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_short_conv_of_documents_and_padding(data):
    """Each document alone, whichever pieces and padding its row comes in."""
    seed = data.draw(st.integers(0, 100))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    width = data.draw(st.sampled_from([1, 2, 4]))
    total = sum(sizes)
    x, w, bias = (np.asarray(x) for x in arrays(seed, (total, 2), (width, 2), (2,)))
    segments = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    zeros = np.zeros((width - 1, 2), np.float32)
    starts = np.cumsum([0, *sizes])
    parts = [naive_conv(x[s:e], w, bias, zeros) for s, e in itertools.pairwise(starts)]
    want = np.concatenate([y for y, _ in parts])

    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=3)))
    tail, last, got = jnp.asarray(zeros)[None], jnp.zeros(1, jnp.int32), []
    for start, end in zip([0, *cuts], [*cuts, total], strict=True):
        before = data.draw(st.integers(0, 2))
        behind = 18 - before - (end - start)
        pad = lambda z, n=before, m=behind: np.pad(z, [(n, m)] + [(0, 0)] * (z.ndim - 1))  # noqa: E731
        here = jnp.asarray(pad(segments[start:end]), jnp.int32)[None]
        reset, last = jax.jit(boundaries)(here, last)
        noise = 7 * (1 - np.asarray(here[0] > 0)[:, None])  # what stands in padding is not seen
        given_x = jnp.asarray(pad(x[start:end]) + noise)[None]
        y, tail = jax.jit(short_conv)(given_x, w, bias, tail, reset, here > 0)
        got.append(y[0, before : before + end - start])
    np.testing.assert_allclose(np.concatenate(got), want, atol=1e-5)
    np.testing.assert_allclose(tail[0], parts[-1][1], atol=1e-6)
    assert last.tolist() == [len(sizes)]


def test_boundaries_see_through_padding():
    segments = jnp.array([[0, 1, 1, 0, 1, 2, 0, 3], [4, 4, 0, 0, 4, 5, 5, 0]])
    reset, last = boundaries(segments, jnp.array([0, 4]))
    assert np.flatnonzero(reset[0]).tolist() == [1, 5, 7]
    assert np.flatnonzero(reset[1]).tolist() == [5]
    assert last.tolist() == [3, 5]


def test_refused():
    q, k, v, log_decay, _, S0 = matrix_case("head")
    with pytest.raises(ValueError, match="a G that divides H=4"):
        op_matrix(q[:, :, :1].repeat(3, 2), k, v, log_decay)
    with pytest.raises(ValueError, match=r"log_decay \(2, 37, 3\) is neither by head"):
        op_matrix(q, k, v, log_decay[..., :3])
    with pytest.raises(ValueError, match=r"S0 .* is a state of another layer"):
        op_matrix(q, k, v, log_decay, S0_BHNP=S0[:, :2])
    with pytest.raises(ValueError, match="chunk=-1 is negative"):
        op_matrix(q, k, v, log_decay, chunk=-1)
    with pytest.raises(ValueError, match="chunk=-1 is negative"):
        op_diag(*diag_case(), chunk=-1)


def test_short_conv_gradients():
    """Beside those that JAX derives of taps as matrices `[L, W - 1 + L]` of documents."""
    size, width = 3, 4
    x, w, bias, tail = arrays(5, (2, 11, size), (width, size), (size,), (2, width - 1, size))
    document = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1, 3, 3, 3]])
    there = document < 3  # padding behind the second row
    reset = np.diff(document, axis=1, prepend=0) * there > 0
    whole = np.concatenate([np.zeros((2, width - 1), int), document], 1)
    same = document[:, :, None] == whole[:, None]
    taps = np.stack([same * np.eye(11, 14, k=j) for j in range(width)])

    def plain(x, w, bias, tail):
        both = jnp.concatenate([tail, x], 1)
        return bias + jnp.einsum("jblp,bpc,jc->blc", taps, both, w)

    def ours(x, w, bias, tail):
        return short_conv(x, w, bias, tail, jnp.asarray(reset), jnp.asarray(there))[0]

    weight = there[..., None] * np.random.default_rng(6).normal(size=x.shape)
    gradient = lambda f: jax.jit(jax.grad(lambda *a: (f(*a) * weight).sum(), (0, 1, 2, 3)))  # noqa: E731
    for got, want in zip(*(gradient(f)(x, w, bias, tail) for f in (ours, plain)), strict=True):
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, atol=1e-5)
