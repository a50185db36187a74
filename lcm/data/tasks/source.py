"""Examples of a task as documents, and as batches: packed for training, padded for scoring."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lcm.data.documents import Document
from lcm.data.tasks.task import Example, Task, span
from lcm.errors import DataError
from lcm.types import Batch, Context


class Encoder(Protocol):
    """What is needed of a tokenizer here: the words of the task, bytes, or any other."""

    @property
    def bos(self) -> int: ...

    @property
    def eos(self) -> int: ...

    def encode(self, text: str) -> np.ndarray: ...


class TaskSource:
    """Examples of the lengths a task is trained on; `name` is stable, so the held-out split is."""

    def __init__(self, task: Task, name: str, size: int = 100_000, seed: int = 0) -> None:
        self.task = task
        self._name = name
        self._examples = task.draw(span(task.train), size, seed, "train")

    def __len__(self) -> int:
        return len(self._examples)

    def name(self, index: int) -> str:
        return f"{self._name}/{index}"

    def __getitem__(self, index: int) -> Document:
        example = self._examples[index]
        return Document(self.name(index), example.target, example.prompt)


def encode(example: Example, tokenizer: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """BOS, prompt and target with EOS as one row of ids, and which of them are the target's."""
    prompt, target = tokenizer.encode(example.prompt), tokenizer.encode(example.target)
    ids = np.concatenate([[tokenizer.bos], prompt, target, [tokenizer.eos]]).astype(np.int32)
    return ids, np.arange(len(ids)) > len(prompt)


def longest(examples: Sequence[Example], tokenizer: Encoder) -> int:
    """Tokens of the longest example as a model reads it: without the EOS it ends in."""
    return max(len(encode(example, tokenizer)[0]) - 1 for example in examples)


def batch(examples: Sequence[Example], tokenizer: Encoder, length: int) -> Batch:
    """One example a row, padded to `length`, with a loss on targets alone.

    Raises DataError for an example that does not fit.
    """
    sheet = _Sheet(len(examples), length)
    for row, example in enumerate(examples):
        sheet.put(row, *_fitting(example, tokenizer, length))
    return sheet.batch()


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Batches by number: examples in turn, each into the first of `rows` rows with room.

    The first that fits nowhere ends a batch; batch n begins about where n - 1 ended, so that
    examples are gone through from end to end, and again. A batch depends on its number alone.
    """

    examples: Sequence[Example]
    tokenizer: Encoder
    rows: int
    length: int

    def __call__(self, step: int) -> Batch:
        sheet = _Sheet(self.rows, self.length)
        at = step * self._stride
        while True:
            example = self.examples[at % len(self.examples)]
            ids, of_target = _fitting(example, self.tokenizer, self.length)
            room = np.flatnonzero(sheet.used + len(ids) - 1 <= self.length)
            if not len(room):
                return sheet.batch()
            sheet.put(room[0], ids, of_target)
            at += 1

    @functools.cached_property
    def _stride(self) -> int:
        """Examples that a batch holds, about: a twentieth of it stays padding."""
        some = [self.examples[i % len(self.examples)] for i in range(256)]
        mean = sum(len(encode(example, self.tokenizer)[0]) - 1 for example in some) / len(some)
        return max(1, round(0.95 * self.rows * self.length / mean))


class _Sheet:
    """Rows that examples are put into, each a segment of its own."""

    def __init__(self, rows: int, length: int) -> None:
        shape = (rows, length)
        self.tokens, self.targets, self.positions, self.segments = np.zeros((4, *shape), np.int32)
        self.weight = np.zeros(shape, np.float32)
        self.used, self.count = np.zeros((2, rows), np.int32)

    def put(self, row: int, ids: np.ndarray, of_target: np.ndarray) -> None:
        size = len(ids) - 1
        at = slice(self.used[row], self.used[row] + size)
        self.used[row] += size
        self.count[row] += 1
        self.tokens[row, at], self.targets[row, at] = ids[:-1], ids[1:]
        self.positions[row, at], self.segments[row, at] = np.arange(size), self.count[row]
        self.weight[row, at] = of_target[1:]

    def batch(self) -> Batch:
        context = Context(self.positions, self.segments, np.full_like(self.segments, -1))
        return Batch(self.tokens, self.targets, context, self.weight)


def _fitting(example: Example, tokenizer: Encoder, length: int) -> tuple[np.ndarray, np.ndarray]:
    """An example's ids, and which are the target's. Raises DataError if they do not fit a row."""
    ids, of_target = encode(example, tokenizer)
    if len(ids) - 1 > length:
        raise DataError(
            f"an example of length {example.length} has {len(ids) - 1} tokens, rows have {length}: "
            f"set data.length={len(ids) - 1} or more, or shorter lengths of the task"
        )
    return ids, of_target
