"""Run on eight virtual devices: how far the mesh is from one device, case by case, as JSON.

python tests/parallel/context_cases.py [PART OF A NAME]
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcm import config, models, nn, parallel
from lcm.aot import hlo
from lcm.models import decoder
from lcm.nn.spec import ATTENTION
from lcm.ops import attention, recurrence
from lcm.ops.attention import blockwise
from lcm.training.step import TrainState, make_step
from lcm.types import Batch, Context

LENGTH, ROWS = 64, 4
# Loops over small tiles, as at lengths that are no test's.
blockwise.SHORT, blockwise.QUERIES, blockwise.KEYS = 16, 8, 8

BASE = [
    *("model.width=16", "model.heads=4", "model.kv_heads=2", "model.hidden=16", "model.depth=2"),
    *("model.vocab=32", "data.length=64", "train.batch=4", "train.position_bins=8"),
    *("mesh.data=1", "model.state=8", "model.recurrence_chunk=4", "model.backend=blockwise"),
    "train.z_loss=0.01",
    "model.unroll=1",
]
RING, GATHER, ULYSSES = (f"model.context_attention={how}" for how in ("ring", "gather", "ulysses"))
ZIGZAG, STRIPED = "mesh.order=zigzag", "mesh.order=striped"
LATENT = "model.pattern=('latent_attention',)", "model.kv_heads=4", "model.options=values=6"
HYBRID = "model.pattern=('rglru', 'attention')"


def on(**sizes):
    return [f"mesh.{axis}={size}" for axis, size in sizes.items()]


MODELS = {
    "rope ring": [RING, *on(context=8)],
    "rope ring zigzag": [RING, ZIGZAG, *on(context=4, fsdp=2)],
    "rope ring striped": [RING, STRIPED, *on(context=2, tensor=4)],
    "rope ring reference": [RING, "model.backend=reference", *on(context=4, data=2)],
    "rope gather zigzag": [GATHER, ZIGZAG, *on(data=2, context=4)],
    "rope ulysses striped": [ULYSSES, STRIPED, *on(fsdp=2, context=2, tensor=1, data=2)],
    "rope ulysses tensor": [ULYSSES, "model.kv_heads=4", *on(fsdp=2, context=2, tensor=2)],
    "alibi ulysses": [ULYSSES, "model.positions=alibi", *on(data=4, context=2)],
    "alibi ring zigzag": [RING, ZIGZAG, "model.positions=alibi", *on(context=4, tensor=2)],
    "t5 ring striped": [RING, STRIPED, "model.positions=t5", *on(context=4, tensor=2)],
    "t5 gather": [GATHER, "model.positions=t5", *on(fsdp=2, context=4)],
    "window neighbours": ["model.window=20", *on(context=8)],
    "window ring zigzag": [RING, ZIGZAG, "model.window=20", *on(context=4, fsdp=2)],
    "cope": ["model.positions=cope", *on(context=4, fsdp=2)],
    "mamba2": ["model.pattern=('mamba2',)", *on(context=4, fsdp=2)],
    "rglru": ["model.pattern=('rglru',)", *on(context=4, tensor=2)],
    "zamba2": [
        "model.pattern=('shared', 'mamba2')",
        "model.kinds.shared.mixer=shared_attention",
        "model.kinds.shared.options=rank=4,adapted=True",
        *on(fsdp=2, context=2, tensor=2),
    ],
    "experts": [
        "model.mlp=experts",
        "model.mlp_options=count=5,top=2,normed=True,shared=8,balance=0.1",
        *on(fsdp=2, context=2, tensor=2),
    ],
    "hybrid": [HYBRID, "model.window=9", *on(data=2, context=2, tensor=2)],
    **{
        f"mixer {name}": [
            f"model.mixer={name}",
            f"model.pattern=('{name}',)",
            *on(context=4, fsdp=2),
        ]
        for name in nn.MIXERS
        if name not in (*ATTENTION, "mamba2", "rglru")
    },
    "mixer latent_attention": [*LATENT, *on(context=4, fsdp=2)],
    # Where a head reads next to nothing its norm makes rounding large: as much between chunks of 4
    # and of 64 tokens on one device.
    "mixer gated_deltanet": [
        "model.pattern=('gated_deltanet',)",
        "model.mixer=gated_deltanet",
        "model.options=eps=0.01",
        *on(context=4, fsdp=2),
    ],
    "latent ring zigzag": [*LATENT, RING, ZIGZAG, *on(context=2, fsdp=2, tensor=2)],
    "windows of recurrences": [
        "model.pattern=('mamba1', 's4d', 'mamba3', 'gla')",
        "model.depth=4",
        "model.extension=window=20,retain=0.9",
        *on(context=4, fsdp=2),
    ],
    "window of rwkv4": [
        "model.pattern=('rwkv4',)",
        "model.extension=window=20,retain=0.9",
        *on(context=4, fsdp=2),
    ],
    "all but context": [HYBRID, *on(data=2, fsdp=2, tensor=2)],
}


# Each way of attention, each order and each kind of layer, once; the others take minutes.
QUICK = ["alibi ring zigzag", "hybrid"]


def context(rng):
    """Documents that cross borders of shards, one of a whole row, and padding on both sides."""
    segments = np.zeros((ROWS, LENGTH), np.int32)
    positions = np.zeros_like(segments)
    ends = [[LENGTH], [3, 30, 33, 61], [11, 12, LENGTH], [23, 50]]
    for row, cuts in enumerate(ends):
        for n, (start, stop) in enumerate(zip([0, *cuts], cuts, strict=False)):
            segments[row, start:stop] = n + 1
            positions[row, start:stop] = np.arange(stop - start)
    segments[3, :10] = 0
    return Context(positions, segments, np.full_like(positions, -1))


def batch(rng):
    where = context(rng)
    tokens, targets = rng.integers(0, 32, (2, ROWS, LENGTH)).astype(np.int32)
    weight = (rng.uniform(size=tokens.shape) < 0.8) * (where.segments_BL > 0)
    return Batch(tokens, targets, where, weight.astype(np.float32))


def of_model(assignments):
    """Differences of the step's metrics and gradients, by name."""
    plain = (a for a in assignments if not a.startswith(("mesh.", "model.context", "model.back")))
    return differences(stepped((*BASE, *assignments), 8), on_one_device(tuple(plain)))


@functools.cache
def on_one_device(assignments):
    return stepped((*BASE, *assignments, "model.backend=reference"), 1)


def stepped(assignments, devices):
    """The metrics of a step and its gradients."""
    cfg, rule = (
        config.override(config.base(), assignments),
        optax.trace(0.0),
    )  # keeps gradients as they are
    mesh, spec = parallel.make(cfg, jax.devices()[:devices]), models.spec(cfg)
    with jax.set_mesh(mesh):
        params = decoder.init(spec, jax.random.key(1))
        # Away from initial values, at which gradients of some parameters are zero.
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        normal = jax.random.normal
        noisy = [x + 0.1 * normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        params = jax.tree.unflatten(tree, noisy)
        params = jax.device_put(params, parallel.shardings(params, mesh))
        state = TrainState(jnp.zeros((), jnp.int32), params, rule.init(params), None)
        rows = parallel.put(batch(np.random.default_rng(0)), mesh)
        after, metrics = jax.jit(make_step(spec, rule, cfg))(state, rows)
        return jax.device_get((metrics, after.opt_state.trace))


def differences(got, want):
    found = {}
    for keys, w in jax.tree.leaves_with_path(want):
        g = dict(jax.tree.leaves_with_path(got))[keys]
        scale = max(np.abs(np.nan_to_num(w)).max(), 1e-3)
        error = np.abs(np.asarray(g, np.float64) - np.asarray(w, np.float64))
        assert (np.isnan(g) == np.isnan(w)).all(), keys
        found[jax.tree_util.keystr(keys)] = float(np.nan_to_num(error).max() / scale)
    return found


def of_op(name):
    """Differences of outputs, last states and gradients of an operator."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    segments = jnp.asarray(context(rng).segments_BL)
    reset, _ = recurrence.boundaries(segments, jnp.asarray([1, 2, 1, 0]))
    there = segments > 0
    tokens = ROWS, LENGTH
    decay = -jnp.abs(draw(*tokens, 4, 8)) / 4
    q, k, v, S0 = draw(*tokens, 2, 8), draw(*tokens, 2, 8), draw(*tokens, 4, 6), draw(ROWS, 4, 8, 6)
    unit = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    beta = jax.nn.sigmoid(draw(*tokens, 2, 1))

    def matrix(q, k, v, decay, S0, erase=None):
        return recurrence.op_matrix(q, k, v, decay, erase, S0, reset, chunk=4)

    cases = {
        "op_diag": (lambda a, b, h: recurrence.op_diag(a, b, h, reset),
                    (jnp.exp(decay[..., 0]), draw(*tokens, 4), draw(ROWS, 4))),
        "op_max": (lambda i, f, m: recurrence.op_max(i, f, m, reset),
                   (draw(*tokens, 4), decay[..., 0], draw(ROWS, 4))),
        "short_conv": (lambda x, w, b, t: recurrence.short_conv(x, w, b, t, reset, there),
                       (draw(*tokens, 5), draw(12, 5), draw(5), draw(ROWS, 11, 5))),
        "op_matrix by head": (matrix, (q, k, v, decay[..., 0], S0)),
        "op_matrix by channel": (matrix, (q, k, v, decay, S0)),
        "op_matrix erase by head": (
            matrix, (q, unit, v, decay[..., 0], S0, (unit, unit, -beta[..., 0].repeat(2, 2)))),
        "op_matrix erase by channel": (
            matrix, (q, beta * unit, v, decay, S0, (unit, -beta * unit))),
    }  # fmt: skip
    fn, args = cases[name]

    def run(*args):
        out = fn(*args)
        weights = [jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in out]
        return sum((x * w).sum() for x, w in zip(out, weights, strict=True)), out

    run = jax.value_and_grad(run, tuple(range(len(args))), has_aux=True)
    want = jax.device_get(jax.jit(run)(*args))
    grid = np.asarray(jax.devices()).reshape(1, 2, 4, 1)
    over = jax.sharding.Mesh(grid, parallel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    with jax.set_mesh(over):
        traced = jax.jit(run).trace(*args)
        assert "all_gather" in str(traced.jaxpr), "nothing was exchanged"
        got = jax.device_get(jax.jit(run)(*args))
    return differences(got, want)


def kept(how):
    """Bytes that the backward pass of attention keeps, as a share of its arguments and result."""
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(3, 1, LENGTH, 4, 8)))
    mesh = parallel.make(config.override(config.base(), [*BASE, *on(context=8)]))
    with jax.set_mesh(mesh):
        tokens = jax.NamedSharding(mesh, jax.P(None, "context"))
        q, k, v = jax.device_put((q, k, v), tokens)
        over = attention.Spread(how)
        out, pull = jax.vjp(lambda q, k, v: attention.attend(
            [attention.Part(q, k)], v, backend="blockwise", over=over), q, k, v)  # fmt: skip
        held = {id(x): x for x in jax.tree.leaves(pull) if isinstance(x, jax.Array)}
        held = sum(s.data.nbytes for x in held.values() for s in x.addressable_shards)
    return {"share": held / sum(x.nbytes for x in (q, k, v, out))}


def exchanges(mixer):
    """Collectives of the loss and its gradients, by the number of tokens of a chunk."""
    found = {}
    for chunk in (2, 8):  # of 8 tokens a device
        own = [f"model.pattern=('{mixer}',)", f"model.recurrence_chunk={chunk}"]
        cfg = config.override(config.base(), [*BASE, "model.depth=1", *on(context=8), *own])
        mesh, spec = parallel.make(cfg), models.spec(cfg)
        with jax.set_mesh(mesh):
            params = decoder.init(spec, jax.random.key(1))
            rows = parallel.put(batch(np.random.default_rng(0)), mesh)

            def loss(params, spec=spec, rows=rows):
                return decoder.apply(spec, params, rows.tokens_BL, rows.context, None)[0].sum()

            text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
        collectives = hlo.Module(text).totals().collectives
        found[chunk] = sum(each.count for each in collectives.values())
    return found


def given():
    """Bytes of states that an exchange gives each device, as a share of those of its own rows."""
    draw = lambda *shape: jax.ShapeDtypeStruct((ROWS, LENGTH, *shape), jnp.float32)  # noqa: E731
    mesh = parallel.make(config.override(config.base(), [*BASE, *on(fsdp=2, context=4)]))
    with jax.set_mesh(mesh):
        run = jax.jit(recurrence.op_matrix)
        text = run.lower(draw(2, 8), draw(2, 8), draw(4, 6), draw(4)).compile().as_text()
    states = 4 * (ROWS // 2) * (4 * 8 * 6 + 4) * 4  # and a decay of each head
    return {"share": hlo.Module(text).totals().collectives["all-gather"].bytes / states}


GIVEN = "given of states"
KEPT = {"kept by ring": "ring", "kept by gather": "gather"}
EXCHANGES = {f"exchanges of {mixer}": mixer for mixer in ("mamba1", "s4d")}
OPS = ["op_diag", "op_max", "short_conv", *(f"op_matrix {how}" for how in (
    "by head", "by channel", "erase by head", "erase by channel"))]  # fmt: skip

if __name__ == "__main__":
    assert jax.device_count() == 8, jax.device_count()
    every = [*OPS, *MODELS, *KEPT, GIVEN, *EXCHANGES]
    chosen = sys.argv[1].split(",") if len(sys.argv) > 1 else every
    found = {}
    for name in chosen:
        if name in EXCHANGES:
            found[name] = exchanges(EXCHANGES[name])
        elif name in KEPT:
            found[name] = kept(KEPT[name])
        elif name == GIVEN:
            found[name] = given()
        else:
            found[name] = of_op(name) if name in OPS else of_model(MODELS[name])
        worst = max(found[name], key=found[name].get)
        print(name, worst, found[name][worst], file=sys.stderr, flush=True)
    print("RESULT", json.dumps(found))
