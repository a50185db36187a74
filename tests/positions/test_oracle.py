"""Remaps against attention computed pair by pair from a position matrix, on all backends.

The oracle is NumPy in float64: a score is Re(sum_c q_c k_c* exp(i rho theta_c)), where rho(i, j) is
from the formulas of the papers in `rho.py`; one softmax runs over the keys that are allowed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attended
from rho import of_paper

from lcm import aot, positions
from lcm.ops.attention import Part, api, causal, pallas
from lcm.ops.attention.pallas import plan
from lcm.positions import DualChunk, LeakyReRoPE, LMInfinite, ReRoPE, SelfExtend, StreamingLLM
from lcm.types import Context

BACKENDS = "reference", "blockwise", "pallas"
HEADS, KV_HEADS = 4, 2
DOCUMENTS = ((85, 1, 60), (150,))  # rows of 150: packed with 4 of padding, and one document


@pytest.fixture(autouse=True, scope="module")
def _kernels_on_a_cpu():
    """Kernels run as plain JAX, with tiles of 128, so that 150 tokens have two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "interpret", True)
        patch.setattr(plan, "LARGEST", (128, 128))
        on_cpu = api.BACKENDS["pallas"]._replace(platforms=("cpu",))
        patch.setitem(api.BACKENDS, "pallas", on_cpu)
        yield


def rows(*documents, total=150):
    places, segments = np.zeros((2, len(documents), total), np.int32)
    for row, lengths in enumerate(documents):
        starts = np.cumsum([0, *lengths])
        for number, (start, length) in enumerate(zip(starts, lengths, strict=False), 1):
            places[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = number
    return Context(places, segments, np.full_like(places, -1))


def arrays(size, batch=2, length=150, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = HEADS, KV_HEADS, KV_HEADS
    shapes = [(batch, length, h, size) for h in heads]
    return tuple(2 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


def complex_pairs(x):
    half = x.shape[-1] // 2
    return x[..., :half].astype(np.float64) + 1j * x[..., half:]


def softmax_over(score, v):
    """`[n, m]` scores, -inf where a key is not seen, on `[m, K]` values."""
    weight = np.exp(score - score.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True) @ v


def scores(q, k, rho, rope):
    """`[n, m]`; NaN in rho is a key that is not seen."""
    theta, amplitude = rope.frequencies(q.shape[-1])
    products = complex_pairs(q)[:, None] * complex_pairs(k).conj()
    turn = np.exp(1j * np.nan_to_num(rho)[..., None] * np.asarray(theta, np.float64))
    score = float(amplitude) ** 2 * (products * turn).real.sum(-1) / q.shape[-1] ** 0.5
    return np.where(np.isnan(rho), -np.inf, score)


def oracle(encoding, q, k, v, documents):
    out = np.zeros(q.shape)
    for row, lengths in enumerate(documents):
        for start, n in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            rho = of_paper(encoding, n)
            for h in range(HEADS):
                own = slice(start, start + n)
                qs, ks, vs = q[row, own, h], *(x[row, own, h // 2] for x in (k, v))
                out[row, own, h] = softmax_over(scores(qs, ks, rho, encoding.rope), vs)
    return out


YARN = positions.YaRN(factor=4.0, original=64)
REMAPS = {
    "rerope": (ReRoPE(window=37), 16),
    "rerope of yarn": (ReRoPE(rope=YARN, window=37), 8),
    "leaky": (LeakyReRoPE(window=37, k=3.0), 8),
    "self_extend": (SelfExtend(group=4, window=24), 16),
    "self_extend, ragged": (SelfExtend(group=3, window=25), 8),
    "dual_chunk": (DualChunk(chunk=40, local=24, original=64), 8),
    "dual_chunk, small": (DualChunk(chunk=13, local=5, original=64), 16),
    "lm_infinite": (LMInfinite(window=33, sinks=3, cap=33, original=64), 16),
    "lm_infinite, cap beyond": (LMInfinite(window=33, sinks=3, cap=61, original=64), 8),
    "streaming": (StreamingLLM(kept=35, sinks=4, original=64), 16),
}


@pytest.mark.quick("self_extend*", "dual_chunk")
@pytest.mark.parametrize("name", REMAPS)
def test_remaps_are_attention_by_their_position_matrix(name):
    encoding, size = REMAPS[name]
    q, k, v = arrays(size)
    where = rows(*DOCUMENTS)

    @jax.jit
    def run(q, k, v):
        return [attended(encoding, {}, q, k, v, where, backend=b) for b in BACKENDS]

    want = oracle(encoding, *map(np.asarray, (q, k, v)), DOCUMENTS)
    for backend, found in zip(BACKENDS, run(q, k, v), strict=True):
        np.testing.assert_allclose(found, want, atol=5e-5, err_msg=backend)


# ReAttention

CHOICE = positions.ReAttention(sinks=2, local=5, top=2, clip=3, span=3, chunk=1, original=64)


def chosen(q_HK, k_nGK, e):
    """Indices that the last of n tokens keeps, by brute force; at ties the first is named."""
    n = len(k_nGK)
    middle = range(e.sinks, n - e.local)
    named = {}
    for h in range(HEADS):
        score = {j: float(q_HK[h] @ k_nGK[j, h // 2]) for j in middle}
        for j in sorted(score, key=lambda j: -score[j])[: e.top]:
            named[j] = named.get(j, 0) + 1
    centres = sorted(named, key=lambda j: (-named[j], j))[: e.clip]
    spans = {c + d for c in centres for d in range(-(e.span // 2), (e.span + 1) // 2)}
    return [j for j in range(n) if j not in middle or j in spans]


def test_reattention_by_brute_force():
    documents = ((31, 8), (40,))
    q, k, v = arrays(8, length=41)
    where = rows(*documents, total=41)

    @jax.jit
    def run(q, k, v):
        return [attended(CHOICE, {}, q, k, v, where, backend=b) for b in BACKENDS]

    want, most, left_out = np.zeros(q.shape), 0, 0
    qn, kn, vn = (np.asarray(x, np.float64) for x in (q, k, v))
    for row, lengths in enumerate(documents):
        for start, n in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            for i in range(start, start + n):
                kept = start + np.array(chosen(qn[row, i], kn[row, start : i + 1], CHOICE))
                rho = np.arange(len(kept))[::-1][None]
                most, left_out = max(most, len(kept)), max(left_out, i - start + 1 - len(kept))
                for h in range(HEADS):
                    ks, vs = kn[row, kept, h // 2], vn[row, kept, h // 2]
                    score = scores(qn[row, i, h][None], ks, rho, CHOICE.rope)
                    want[row, i, h] = softmax_over(score, vs)[0]
    assert most <= 2 + 3 * 3 + 5 and left_out > 20  # the choice mattered
    for backend, found in zip(BACKENDS, run(q, k, v), strict=True):
        np.testing.assert_allclose(found, want, atol=5e-5, err_msg=backend)


def test_reattention_that_chooses_nothing_is_streaming():
    """Sinks and latest keys, numbered as in a cache; all of them where all are chosen."""
    q, k, v = arrays(8, length=41)
    where = rows((31, 8), (40,), total=41)
    none = positions.ReAttention(sinks=2, local=9, top=0, chunk=1, original=64)
    every = positions.ReAttention(sinks=2, local=9, top=41, clip=41, span=2, chunk=1, original=64)
    stream = StreamingLLM(kept=11, sinks=2, original=64)

    @jax.jit
    def run(q, k, v):
        encodings = none, stream, every, positions.RoPE()
        return [attended(e, {}, q, k, v, where) for e in encodings]

    nothing, cache, all_, rope = run(q, k, v)
    np.testing.assert_allclose(nothing, cache, atol=2e-5)
    np.testing.assert_allclose(all_, rope, atol=2e-5)


# Biases in kernels

DIMS = positions.Dims(width=32, heads=HEADS, kv_heads=KV_HEADS, head_size=8, length=64)
BIASES = {
    "alibi": positions.ALiBi(),
    "hard_alibi": positions.HardALiBi(local=2),
    "t5": positions.T5(farthest=100, std=1.0),
    "lm_infinite_alibi": positions.LMInfiniteALiBi(window=33, sinks=3, cap=61, original=64),
    "kerple": positions.Kerple(),
    "kerple_power": positions.KerplePower(),
    "sandwich": positions.Sandwich(dims=16),
    "type_one": positions.TypeOne(),
    "type_two": positions.TypeTwo(),
    "fire": positions.Fire(hidden=6, threshold=20.0),
    "aligned+alibi": positions.Chain(positions.Aligned(0.7), positions.ALiBi()),
}


@pytest.mark.quick("alibi", "t5", "kerple")
@pytest.mark.parametrize("name", BIASES)
def test_biases_in_kernels(name):
    """Outputs and gradients of all inputs as the reference has them."""
    encoding, where = BIASES[name], rows(*DOCUMENTS)
    own, shared = (
        encoding.init_layer(jax.random.key(5), DIMS),
        encoding.init(jax.random.key(6), DIMS),
    )
    params = {**shared, **own}
    slope = jnp.cos(jnp.arange(2 * 150 * HEADS * 8.0)).reshape(2, 150, HEADS, 8)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.value_and_grad, argnums=(1, 2, 3, 4), has_aux=True)
    def run(backend, params, q, k, v):
        out = attended(encoding, params, q, k, v, where, backend=backend)
        return (out * slope).sum(), out

    given = params, *arrays(8)
    (_, out), gradients = run("pallas", *given)
    (_, want), expected = run("reference", *given)
    np.testing.assert_allclose(out, want, atol=2e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, atol=5e-5 * max(1, np.abs(b).max()))


# Compilation for a TPU


def compiled(encoding, length, differentiate):
    """Kernels in a program for a v5e, and its bytes of temporaries."""

    def out(q, k, v, where):
        parts = encoding.parts({}, q, encoding.keys({}, k, where), where, where)
        parts = [Part(p.q_BLHK, p.k_BSGK, p.mask & causal(), p.score_mod) for p in parts]
        return pallas.attend(tuple(parts), v, where, where, 0.1)[0].astype(jnp.float32).sum()

    shape = lambda heads: jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16)  # noqa: E731
    where = Context(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 3)
    run = jax.grad(out, (0, 1, 2)) if differentiate else out
    program = aot.compile(run, shape(4), shape(2), shape(2), where)
    text = program.compiled.as_text()
    return text.count('custom_call_target="tpu_custom_call"'), program.temporaries


@pytest.fixture
def _for_a_tpu(monkeypatch):
    pytest.importorskip("libtpu", reason="libtpu is missing: pip install 'jax[tpu]'")
    monkeypatch.setattr(plan, "interpret", False)
    monkeypatch.setattr(plan, "LARGEST", (1024, 1024))


@pytest.mark.slow
@pytest.mark.usefixtures("_for_a_tpu")
def test_a_remap_of_three_parts_is_one_kernel_on_a_tpu():
    assert compiled(DualChunk(chunk=160, local=32, original=256), 512, False)[0] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_for_a_tpu")
@pytest.mark.parametrize(
    "encoding",
    [SelfExtend(group=8, window=1024), DualChunk(chunk=1280, local=256, original=2048)],
    ids=["two parts", "three parts"],
)
def test_gradients_of_remaps_compile_for_a_tpu(encoding):
    kernels, temporaries = compiled(encoding, 4096, True)
    assert kernels == 3  # forward, queries' gradient, keys' gradient; parts share them
    assert temporaries < 128 << 20  # a dense matrix of scores has 256 MiB a part
