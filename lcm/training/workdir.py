"""A run's folder: one owner at a time, and its config."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from lcm import config
from lcm.errors import CheckpointError, ConfigError

CONFIG = "config.json"


@contextlib.contextmanager
def owned(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the folder and holds its lock; the system releases it however the process ends.

    Raises:
        CheckpointError: if the folder cannot be written, or another run owns it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a+")  # noqa: SIM115  closed below, after the lock is gone
    except OSError as error:
        raise CheckpointError(
            f"workdir {workdir} cannot be written ({error.strerror}): choose another --workdir"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise CheckpointError(
                f"workdir {workdir} is in use by process {lock.read().strip() or 'unknown'}: "
                "wait for it, stop it, or choose another --workdir"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def to_dict(cfg: ConfigDict) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(cfg.to_json())


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config that a run was started with.

    Raises:
        CheckpointError: if the folder holds none, or one that is not a config of this lcm.
    """
    try:
        cfg = config.with_defaults(ConfigDict(_tuples(json.loads((workdir / CONFIG).read_text()))))
    except (OSError, ValueError, AttributeError) as error:  # the last: JSON, but not an object
        raise CheckpointError(
            f"{workdir} holds no readable {CONFIG}: give the --workdir of an lcm train run"
        ) from error
    try:
        config.check_keys(cfg)
    except ConfigError as error:
        raise CheckpointError(f"{workdir / CONFIG}: {error}") from error
    return cfg


def write_config(workdir: pathlib.Path, cfg: ConfigDict) -> list[str]:
    """Writes the config; returns the keys whose values differ from those of an earlier start.

    Raises:
        CheckpointError: if a key differs that decides the parameters or the order of the data.
    """
    new, old = _flat(to_dict(cfg)), {}
    if (workdir / CONFIG).exists():
        old = _flat(to_dict(read_config(workdir)))
    changed = sorted(k for k in old.keys() | new.keys() if old and old.get(k) != new.get(k))
    fixed = [
        k for k in changed if k.startswith(("model.", "data.")) or k in ("seed", "train.batch")
    ]
    harmless = ("model.backend", "model.remat", "model.unroll", "model.context_attention")
    fixed = [key for key in fixed if key not in harmless]
    if fixed:
        key = fixed[0]
        raise CheckpointError(
            f"workdir {workdir} holds a run with config.{key}={old.get(key)!r}, this one has "
            f"{new.get(key)!r}: choose another --workdir, or set it back"
        )
    write_text(workdir / CONFIG, json.dumps(to_dict(cfg), indent=1) + "\n")
    return changed


def check_shared(workdir: pathlib.Path) -> None:
    """Refuses a folder that is not the one in which process 0 has just written the config.

    Raises:
        CheckpointError: in the process that does not see it.
    """
    if not (workdir / CONFIG).exists():
        raise CheckpointError(
            f"workdir {workdir} is not the same folder for all processes: {CONFIG} of process 0 is "
            f"not seen on {socket.gethostname()}; choose a --workdir on storage that all share"
        )


def write_text(file: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    scratch = file.with_suffix(file.suffix + ".tmp")
    try:
        scratch.write_text(text)
        scratch.replace(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written ({error.strerror}): make room") from error


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _tuples(tree: Any) -> Any:
    """JSON has lists where a config has tuples."""
    if isinstance(tree, dict):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(_tuples(item) for item in tree) if isinstance(tree, list) else tree
