"""Checkpoints by orbax: written asynchronously, verified when read, the newest whole one used.

A step holds four items: `params`, `train` (step, optimiser, average), `data` (position in the data)
and `meta` (schema version, config, shapes and checksums). The files carry checksums of their
index only, so a flipped bit in an array would pass unseen; `meta` therefore has one of each array.

Several processes write a step together, each the arrays of its devices, as orbax has it. They read
each for itself, what its own devices need, and then agree on whether all could: a process that
fails in the middle of a common reading would leave the others waiting.
"""

import contextlib
import logging
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lcm.errors import CheckpointError, UserError
from lcm.parallel import hosts, path
from lcm.training.step import TrainState

_log = logging.getLogger(__name__)

SCHEMA = 1
FOLDER = "checkpoints"


class Restored(NamedTuple):
    """A train state with the position in the data, the step it was saved at, and its `meta`."""

    state: TrainState
    data: dict[str, Any]
    step: int


class Writer:
    """Saves train states below a workdir, in the background, keeping the newest `keep`."""

    def __init__(self, workdir: pathlib.Path, keep: int):
        self.folder = workdir / FOLDER
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(self.folder.absolute(), options=options)

    def save(self, state: TrainState, data: dict[str, Any], config: dict[str, Any]) -> None:
        """Begins to write a state; returns as soon as the arrays may be overwritten.

        Raises:
            CheckpointError: if this or an earlier checkpoint cannot be written.
        """
        items = _items(state)
        meta = {
            "schema": SCHEMA,
            "config": config,
            "shapes": {name: list(leaf.shape) for name, leaf in _named(items).items()},
            "checksums": _checksums(items),
        }
        step = int(state.step)
        hosts.by_first(lambda: self._check_room(step, items))
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args |= {"data": ocp.args.JsonSave(data), "meta": ocp.args.JsonSave(meta)}
        with self._explained(step):
            self.manager.save(step, args=ocp.args.Composite(**args), force=True)

    def finish(self) -> None:
        """Waits until everything is on disk.

        Raises:
            CheckpointError: if something could not be written.
        """
        with self._explained(None):
            self.manager.wait_until_finished()

    def close(
        self, kind: Any = None, error: BaseException | None = None, trace: Any = None
    ) -> None:
        """Releases the manager; call `finish` first, which says what went wrong.

        After an error it waits for no other process, which may never come.
        """
        if error is not None and jax.process_count() > 1:
            return
        with contextlib.suppress(Exception):
            self.manager.close()

    def _check_room(self, step: int, items: dict[str, Any]) -> None:
        """Refuses what would not fit before half of it is written; older ones go afterwards."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items)) / 2**20
        free = shutil.disk_usage(self.folder).free / 2**20
        if needed > free:
            raise CheckpointError(
                f"checkpoint of step {step} needs {needed:.1f} MiB, {self.folder} has {free:.1f} "
                "free: make room, then run again: it resumes from the checkpoint before"
            )

    def _explained(self, step: int | None) -> "_Explained":
        return _Explained(self.folder, step)


class _Explained:
    """Turns whatever a write raises into one line: a full disk shows as any of several types."""

    def __init__(self, folder: pathlib.Path, step: int | None):
        self.folder, self.step = folder, step

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, CheckpointError):
            return
        free = shutil.disk_usage(self.folder).free / 2**20 if self.folder.exists() else 0
        what = f"step {self.step}" if self.step is not None else "the last step"
        raise CheckpointError(
            f"checkpoint of {what} could not be written to {self.folder} ({free:.0f} MiB free): "
            f"{first_line(error)}; make room, then run again: it resumes from the one before"
        ) from error


def steps(workdir: pathlib.Path) -> list[int]:
    """Steps with a finished checkpoint, oldest first."""
    folder = workdir / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def restore(workdir: pathlib.Path, like: TrainState) -> Restored | None:
    """The newest whole checkpoint, laid out as `like` (abstract, with shardings); None if none is.

    A checkpoint that cannot be read or fails its checksums is named on the log, moved to
    `corrupt/` in the workdir, and the one before is tried; by process 0 for all.

    Raises:
        CheckpointError: if there are checkpoints and none is whole, or if one is of another model
            or schema.
    """
    found = hosts.by_all(lambda: steps(workdir))
    for step in reversed(found):
        try:
            state, data = _read(workdir, step, like)
        except UserError:
            raise
        except Exception as error:
            _set_aside(workdir, step, error)
            continue
        return Restored(state, data, step)
    if found:
        raise CheckpointError(
            f"none of the checkpoints of steps {found} in {workdir} is whole; they are kept in "
            f"{workdir / 'corrupt'}: choose another --workdir or remove this one to start anew"
        )
    return None


def restore_params(workdir: pathlib.Path, like: TrainState) -> tuple[Any, int]:
    """Parameters of the newest whole checkpoint and its step; nothing in the workdir is changed.

    They are the moving average where the run keeps one, as that is what it keeps it for.

    Raises:
        CheckpointError: if there is no whole checkpoint, or it is of another model.
    """
    for step in reversed(steps(workdir)):
        try:
            state, _ = _read(workdir, step, like)
        except UserError:
            raise
        except Exception as error:
            _log.warning("checkpoint %s is damaged (%s)", _folder(workdir, step), first_line(error))
            continue
        return (state.params if state.average is None else state.average), step
    raise CheckpointError(f"{workdir} has no whole checkpoint: train there first with lcm train")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _read(workdir: pathlib.Path, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    meta, read = hosts.by_all(lambda: _read_files(_folder(workdir, step), _items(like)))
    items = {name: read[name] for name in _items(like)}
    for name, found in _checksums(items).items():
        if found != meta["checksums"][name]:
            raise OSError(f"checksum of {name} is {found}, written was {meta['checksums'][name]}")
    return TrainState(params=items["params"], **items["train"]), read.data


def _read_files(folder: pathlib.Path, items: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """`meta`, and all items laid out as those given; waits for no other process."""
    with _reader() as reader:
        meta = reader.restore(folder, ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        _check_fits(folder, meta, items)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        return meta, reader.restore(folder, ocp.args.Composite(data=ocp.args.JsonRestore(), **args))


def _reader() -> ocp.Checkpointer:
    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={here}, barrier_sync_key_prefix=f"read-{here}"
    )
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _check_fits(folder: pathlib.Path, meta: dict[str, Any], items: dict[str, Any]) -> None:
    if meta["schema"] != SCHEMA:
        raise CheckpointError(
            f"{folder} has schema {meta['schema']}, this lcm reads {SCHEMA}: "
            "use the lcm that wrote it"
        )
    there, here = meta["shapes"], {k: list(v.shape) for k, v in _named(items).items()}
    for name in sorted(there.keys() | here.keys(), key=lambda n: (not n.startswith("params"), n)):
        if there.get(name) != here.get(name):
            raise CheckpointError(
                f"{folder} is of another model or optimiser: {name} is {there.get(name, 'absent')} "
                f"there and {here.get(name, 'absent')} in this config: restore the config that is "
                "in its config.json, or choose another --workdir"
            )


def _items(state: TrainState) -> dict[str, Any]:
    train = {"step": state.step, "opt_state": state.opt_state, "average": state.average}
    if state.carried is not None:  # which earlier checkpoints have not
        train["carried"] = state.carried
    return {"params": state.params, "train": train}


def _named(items: dict[str, Any]) -> dict[str, Any]:
    return {path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(items)}


def _checksums(items: dict[str, Any]) -> dict[str, int]:
    return {name: int(value) for name, value in jax.device_get(_sums(_named(items))).items()}


@jax.jit
def _sums(leaves: dict[str, Any]) -> dict[str, jax.Array]:
    """Wrapping sum of each array's words: exact whatever the order or the number of devices."""
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}

    def total(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, words[leaf.dtype.itemsize])
        return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(total, leaves)


def _folder(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return (workdir / FOLDER / str(step)).absolute()


def _set_aside(workdir: pathlib.Path, step: int, error: Exception) -> None:
    folder, aside = _folder(workdir, step), workdir / "corrupt" / str(step)

    def move() -> None:
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)

    _log.warning(
        "checkpoint %s is damaged (%s): moved to %s, the one before it is used",
        folder,
        first_line(error),
        aside,
    )
    hosts.by_first(move)
