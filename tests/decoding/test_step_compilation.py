"""The engine's step compiled for a TPU: paged caches are read where they lie."""

import jax
import jax.numpy as jnp
import pytest

from lcm import aot, config, models
from lcm.decoding import programs
from lcm.decoding.history import begin
from lcm.decoding.processors import chain
from lcm.decoding.programs import Rows
from lcm.decoding.sampling import keys
from lcm.decoding.settings import Sampling, plan
from lcm.decoding.weights import laid_out
from lcm.models import State, decoder
from lcm.nn import PagedKVCache
from lcm.ops.attention.decode import paged

ROWS, PAGES, DEPTH = 4, 32, 2


def compiled(positions, cache_dtype):
    """The step of a model of two layers of eight heads, four of them with keys."""
    sizes = ["width=512", "heads=8", "kv_heads=4", f"depth={DEPTH}", "vocab=1024", "dtype=bfloat16"]
    cfg = config.override(
        config.base(),
        ["data.length=1024", f"model.positions={positions}", *(f"model.{size}" for size in sizes)],
    )
    spec = models.spec(cfg)

    def make():
        settings = [Sampling(top_p=0.9)] * ROWS
        design = plan(settings, spec.vocab, 64)
        layer = spec.layers[0]
        table = jnp.zeros((ROWS, PAGES // ROWS), jnp.int32)

        def cache():
            shape = layer.kv_heads, layer.head_size, jnp.dtype(cache_dtype)
            return PagedKVCache(paged(table, PAGES, *shape))

        state = State(jnp.zeros(ROWS, jnp.int32), ([cache() for _ in range(DEPTH)],))
        rows = Rows(
            jnp.zeros(ROWS, jnp.int32),
            jnp.ones(ROWS, bool),
            chain(settings, design),
            keys(settings, design),
            begin(settings, [[1]] * ROWS, design),
        )
        return laid_out(decoder.init(spec, jax.random.key(0)), "bfloat16"), state, rows

    return aot.compile(
        lambda *args: programs.step(spec, *args), *jax.eval_shape(make), topology="v5e:2x2"
    )


@pytest.mark.quick("rope")
@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_a_step_reads_pages_in_the_kernel(positions):
    assert len(compiled(positions, "bfloat16").kernels) == DEPTH


def test_int8_pages_are_read_as_they_are():
    assert len(compiled("rope", "int8").kernels) == DEPTH


@pytest.mark.slow
def test_keys_that_are_rotated_as_they_are_read_are_gathered():
    assert len(compiled("self_extend", "bfloat16").kernels) == 0
