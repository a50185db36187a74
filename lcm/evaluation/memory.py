"""Losses of tokens on disk, so that an evaluation goes on where it was stopped."""

import hashlib
import os
import pathlib
import zipfile

import jax
import numpy as np
from jax.experimental import multihost_utils

from lcm.evaluation.documents import EvaluationError
from lcm.evaluation.perplexity import Job
from lcm.parallel import hosts
from lcm.pretrained import Model
from lcm.types import Array

SAMPLE = 512  # numbers of each parameter that an identity looks at


class Losses:
    """A `perplexity.Memory` in a folder: a file for each protocol and length of one model.

    A file is found again for the same model, the same tokens and the same windows alone, whose
    hash is in its name. Of several processes the first writes, and losses are found by all or none.
    """

    def __init__(self, folder: pathlib.Path, model: str) -> None:
        self._folder, self._model = folder, model

    def find(self, name: str, length: int, job: Job) -> list[np.ndarray] | None:
        """The loss of each token of each document, float64 `[N]` each, if they are there."""
        found = self._read(name, length, job)
        return found if all(hosts.gather("" if found is None else "there")) else None

    def _read(self, name: str, length: int, job: Job) -> list[np.ndarray] | None:
        file = self._file(name, length, job)
        try:
            with np.load(file) as found:
                flat = found["losses"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # damaged: made anew
        sizes = [len(document.tokens_N) for document in job.documents]
        return [part.astype(np.float64) for part in np.split(flat, np.cumsum(sizes)[:-1])]

    def keep(self, name: str, length: int, job: Job, losses: list[np.ndarray]) -> None:
        """Writes them, whole or not at all.

        Raises:
            EvaluationError: if there is no room.
        """
        hosts.by_first(lambda: self._write(name, length, job, losses))

    def _write(self, name: str, length: int, job: Job, losses: list[np.ndarray]) -> None:
        file = self._file(name, length, job)
        partial = file.with_name(f".{file.stem}.{os.getpid()}.npz")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(partial, losses=np.concatenate(losses).astype(np.float32))
            partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise EvaluationError(
                f"cannot keep losses in {self._folder}: {error.strerror}; free space there or "
                "choose another workdir"
            ) from error

    def _file(self, name: str, length: int, job: Job) -> pathlib.Path:
        known = hashlib.sha256(self._model.encode())
        for document in job.documents:
            known.update(document.tokens_N.tobytes() + document.targets_N.tobytes() + b"|")
        for windows_W in job.plan[1:]:
            known.update(np.asarray(windows_W, np.int64).tobytes() + b"|")
        return self._folder / f"{name}-{length}-{known.hexdigest()[:16]}.npz"


def identity(model: Model) -> str:
    """A hash of what decides a model's figures: its config, and some numbers of each parameter."""
    known = hashlib.sha256(model.cfg.model.to_json_best_effort(sort_keys=True).encode())
    known.update(f"{model.cfg.data.length}".encode())  # which encodings may go by
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        flat = leaf.reshape(-1)
        some = np.asarray(_whole(flat[:: max(1, flat.size // SAMPLE)]))
        known.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        known.update(some.tobytes())
    return known.hexdigest()[:16]


def _whole(x: Array) -> Array:
    """An array that may lie on devices of other hosts, too."""
    there = getattr(x, "is_fully_addressable", True)
    return x if there else multihost_utils.process_allgather(x, tiled=True)
