"""The training loop: check, restore, step, log, save."""

import json
import logging
import pathlib
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lcm import config, models, parallel, positions
from lcm.data import pipeline, tokenizers
from lcm.errors import ConfigError, TrainingError
from lcm.parallel import hosts
from lcm.training import carry, checkpoints, stopping, watch, workdir
from lcm.training.metrics import Metrics, NoMetrics
from lcm.training.optimizers import optimizer, schedule
from lcm.training.step import TrainState, init_state, make_step

_log = logging.getLogger(__name__)
BALANCE = "imbalance", "largest_share"  # metrics of experts whose load is balanced


class Result(NamedTuple):
    """Where training ended: `step` is below `train.steps` if a signal stopped it."""

    params: Any
    step: int


def check(cfg: ConfigDict) -> None:
    """Raises everything that can be wrong with a config, before anything is compiled.

    Raises:
        ConfigError: for keys and combinations.
        DataError: for sources and tokenizers.
    """
    config.check_keys(cfg)
    models.check_backend(models.spec(cfg))
    parallel.make(cfg)
    optimizer(cfg.train)
    positions.make_placement(cfg.train.placement).check(cfg.data.length)
    if cfg.train.initial_state == "continued":
        raise ConfigError(
            "train.initial_state=continued needs rows that go on from batch to batch, and those of "
            "a corpus are shuffled: set it to passed, or give lcm.training.seeds such batches"
        )
    if cfg.train.init:
        _check_init(cfg)
    abstract_state(cfg)  # train.only names parameters
    for key in ("log_every", "position_bins", "batch"):
        if cfg.train[key] < 1:
            raise ConfigError(f"train.{key}={cfg.train[key]} must be at least 1")
    for key in ("every", "keep"):
        if cfg.checkpoint[key] < 1:
            raise ConfigError(f"checkpoint.{key}={cfg.checkpoint[key]} must be at least 1")
    if not 0 <= cfg.train.ema < 1:
        raise ConfigError(f"train.ema={cfg.train.ema} must lie in [0, 1); 0 keeps no average")
    pipeline.check(cfg.data)
    size = tokenizers.load(cfg.data.tokenizer).vocab_size
    if cfg.model.vocab < size:
        raise ConfigError(
            f"model.vocab={cfg.model.vocab} is smaller than the tokenizer's {size}: "
            f"set --config.model.vocab={-(-size // 64) * 64}"
        )


def train(cfg: ConfigDict, folder: str | pathlib.Path, *, title: str = "train") -> Result:
    """Trains the model of a config in a workdir, from its newest checkpoint if there is one.

    A resumed run takes the very steps that an uninterrupted one takes. SIGTERM and Ctrl-C save
    and return; a loss or gradient that is not finite stops the run with the last checkpoint kept.
    In several processes (`lcm.parallel.hosts`) all call it, on a workdir that all of them see.

    Raises:
        UserError: of the kinds of `check`; CheckpointError for the workdir; TrainingError for a
            loss that is not a number; HostError if another process is gone.
    """
    hosts.by_all(lambda: check(cfg))
    hosts.check_same("config", json.dumps(workdir.to_dict(cfg), sort_keys=True))
    folder = pathlib.Path(folder)
    with ExitStack() as stack:
        stop = stack.enter_context(stopping.watched())
        hosts.by_first(lambda: _own(cfg, folder, stack))
        hosts.by_all(lambda: workdir.check_shared(folder))
        with hosts.losses_said():
            return _train(cfg, folder, stack, stop, title)


def _own(cfg: ConfigDict, folder: pathlib.Path, stack: ExitStack) -> None:
    """Takes the workdir for this run and begins it."""
    stack.enter_context(workdir.owned(folder))
    for key in workdir.write_config(folder, cfg):
        _log.warning("config.%s differs from the start of this run", key)
    watch.forget(folder)


def _train(
    cfg: ConfigDict, folder: pathlib.Path, stack: ExitStack, stop: stopping.Stop, title: str
) -> Result:
    mesh = parallel.make(cfg)
    stack.enter_context(jax.set_mesh(mesh))  # kernels ask it where rows and heads lie
    spec, rule = models.spec(cfg), optimizer(cfg.train)
    batches = _batches(cfg)
    watched = stack.enter_context(watch.beside(folder, cfg.train.hang_seconds))

    like = abstract_state(cfg, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, like)
    restored = checkpoints.restore(folder, like)
    if restored is None:
        carried = carry.init(spec, cfg.train)
        begin = lambda key: init_state(spec, rule, key, cfg.train.ema, carried)  # noqa: E731
        state = jax.jit(begin, out_shardings=layout)(jax.random.key(cfg.seed))
        if cfg.train.init:
            state = _begun(cfg, state, layout)
    else:
        state = restored.state
        batches.set_state(restored.data)
        _log.info("resumed %s at step %d", folder, restored.step)
    at = 0 if restored is None else restored.step
    watched.restored(at)
    stop.restored(at)
    if at >= cfg.train.steps:  # nothing to do, and but a heartbeat nothing to write
        return _result(state, at)
    whole = NamedSharding(mesh, PartitionSpec())  # metrics, of which every process has its copy
    step = jax.jit(make_step(spec, rule, cfg), donate_argnums=0, out_shardings=(layout, whole))

    writer = checkpoints.Writer(folder, cfg.checkpoint.keep)
    stack.push(writer.close)
    log = stack.enter_context(_Log.open(cfg, folder, at, title))
    saved = at
    while at < cfg.train.steps and stop.more():
        with watched.data():
            batch = next(batches)
        state, metrics = step(state, parallel.put(batch, mesh))
        at += 1
        log.add(at, metrics)
        watched.ended(at)
        if at % cfg.checkpoint.every == 0:
            log.catch_up()  # a step that is not a number is not saved
            writer.save(state, batches.get_state(), workdir.to_dict(cfg))
            saved = at
            watched.ended(at)
    if saved < at:  # the last step, or the one at which a signal came
        log.catch_up()
        writer.save(state, batches.get_state(), workdir.to_dict(cfg))
    writer.finish()
    if at < cfg.train.steps:
        kept = ", saved" if at else ""
        _log.warning("stopped at step %d%s: the same command goes on from there", at, kept)
    return _result(state, at)


def _begun(cfg: ConfigDict, state: TrainState, layout: TrainState) -> TrainState:
    """A first state with the parameters of the run that this one goes on from."""
    folder = pathlib.Path(cfg.train.init)
    mesh = layout.step.mesh  # each process reads what its devices hold, no more
    like = abstract_state(workdir.read_config(folder), mesh)
    params, _ = checkpoints.restore_params(folder, like)

    def adopted(params: Any) -> Any:
        return models.only_used(cfg, models.adopt(cfg, params, jax.random.key(cfg.seed)))

    params = jax.jit(adopted, out_shardings=layout.params)(params)
    average = None if state.average is None else jax.tree.map(jax.numpy.copy, params)
    return state._replace(params=params, average=average)


def _check_init(cfg: ConfigDict) -> None:
    """Refuses a run to begin from whose model has another shape, before anything is compiled."""
    folder = pathlib.Path(cfg.train.init)
    if not checkpoints.steps(folder):
        raise ConfigError(
            f"train.init={cfg.train.init} holds no checkpoint: name the workdir of a trained run"
        )
    shapes = abstract_state(workdir.read_config(folder)).params
    adopted = jax.eval_shape(lambda p: models.adopt(cfg, p, jax.random.key(0)), shapes)
    models.check_params(cfg, adopted)


def _result(state: TrainState, step: int) -> Result:
    return Result(state.params if state.average is None else state.average, step)


def abstract_state(cfg: ConfigDict, mesh: Mesh | None = None) -> TrainState:
    """The train state of a config as shapes with shardings; on one device without a mesh."""
    spec, rule = models.spec(cfg), optimizer(cfg.train)
    shapes = jax.eval_shape(
        lambda key: init_state(spec, rule, key, cfg.train.ema, carry.init(spec, cfg.train)),
        jax.random.key(0),
    )
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        layout = jax.tree.map(lambda _: here, shapes)
    else:
        layout = parallel.shardings(shapes, mesh)
    return jax.tree.map(
        lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, layout
    )


def _batches(cfg: ConfigDict) -> Any:
    """The whole batches of a run, the same in every process, of which each keeps its own rows.

    So the place in the data does not depend on how many processes there are, and a checkpoint goes
    on with any number of them, no document lost or read twice. Each reads and packs the data of
    all for that: records that are tokenised beforehand keep it cheap.
    """
    return pipeline.batches(
        cfg.data,
        length=cfg.data.length * positions.make_placement(cfg.train.placement).span,
        batch_size=cfg.train.batch,
        seed=cfg.seed,
    )


class _Log:
    """Metrics, read one step late so that the device never waits for the host."""

    def __init__(self, cfg: ConfigDict, metrics: Metrics, report: Any, start: int):
        self.cfg, self.metrics, self.report = cfg, metrics, report
        self.rate = schedule(cfg.train)
        self.flops = models.flops_per_token(cfg, cfg.data.length)
        self.pending: tuple[int, Any] | None = None
        self.tokens, self.ends = 0.0, [time.monotonic()]  # of the steps since the last line
        self.start = start

    @classmethod
    @contextmanager
    def open(
        cls, cfg: ConfigDict, folder: pathlib.Path, start: int, title: str
    ) -> Iterator["_Log"]:
        metrics = hosts.by_first(lambda: Metrics(folder, start)) or NoMetrics()
        try:
            with hosts.shown(title) as report:
                log = cls(cfg, metrics, report, start)
                yield log
                log.catch_up()
        finally:
            metrics.close()

    def add(self, step: int, metrics: Any) -> None:
        """Takes the metrics of a step just dispatched, and reads those of the step before."""
        before, self.pending = self.pending, (step, metrics)
        if before is not None:
            self._read(*before)

    def catch_up(self) -> None:
        """Reads the metrics that are still pending."""
        if self.pending is not None:
            self._read(*self.pending)
            self.pending = None

    def _read(self, step: int, metrics: Any) -> None:
        values = jax.device_get(metrics)
        loss, norm = float(values["loss"]), float(values["grad_norm"])
        if not np.isfinite(loss + norm):
            self.pending = None
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {norm} is not finite; the last "
                "checkpoint is kept: lower train.lr, lengthen train.warmup or set train.clip, "
                "and run again"
            )
        self.tokens += float(values["tokens"])
        self.ends.append(time.monotonic())
        if step == self.start + 1:  # compilation is not speed
            self.tokens, self.ends = 0.0, self.ends[-1:]
        if step % self.cfg.train.log_every == 0 or step in (1, self.cfg.train.steps):
            self._write(step, loss, norm, values)
        tokens = self.cfg.train.batch * self.cfg.data.length
        text = f"step {step}/{self.cfg.train.steps} loss {loss:.3f}"
        self.report(step * tokens, self.cfg.train.steps * tokens, text)

    def _write(self, step: int, loss: float, norm: float, values: Any) -> None:
        seconds = np.diff(self.ends)
        by_position = [float(v) if np.isfinite(v) else None for v in values["loss_by_position"]]
        line = {
            "loss": loss,
            "grad_norm": norm,
            "lr": float(self.rate(step - 1)),
            "loss_by_position": by_position,
        }
        line |= {key: float(values[key]) for key in BALANCE if key in values}
        if len(seconds):
            per_second = self.tokens / max(seconds.sum(), 1e-9)
            line |= {
                "tokens_per_second": round(per_second, 1),
                "flops_per_second": round(per_second * self.flops),
                "step_seconds": round(float(np.median(seconds)), 6),
                "slowest_step_seconds": round(float(seconds.max()), 6),
            }
        self.tokens, self.ends = 0.0, self.ends[-1:]
        self.metrics.write(step, line)
