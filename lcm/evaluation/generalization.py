"""Train on short examples of a task, score longer ones: a run of a study."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from lcm.data import tasks
from lcm.data.tasks import PARTS, PackedRows, Part, Task
from lcm.evaluation.exact_match import PLAIN, points_over_seeds
from lcm.positions import Placement
from lcm.training.seeds import BatchAt, train_seeds
from lcm.training.workdir import write_text
from lcm.types import Batch

RESULT = "accuracy.json"


def study(
    cfg: ConfigDict,
    folder: pathlib.Path,
    *,
    seeds: int,
    tested: Task,
    lengths: Sequence[int],
    count: int,
    start: Any = None,
    placement: Placement = PLAIN,
    title: str = "train",
) -> list[dict[str, Any]]:
    """Accuracy by length, over seeds, of a config trained on the task of its `data.source`.

    Trained and scored once, then read from `accuracy.json`; what was interrupted goes on from its
    newest checkpoint. `start`: as in `train_seeds`. `placement`: of the tokens scored.

    Raises:
        UserError: for configs, tasks and workdirs that cannot be.
    """
    file = folder / RESULT
    if file.exists():
        return json.loads(file.read_text())["points"]
    params = trained(cfg, folder, seeds, start=start, title=title)
    points = points_over_seeds(cfg, params, seeds, tested, lengths, count, placement=placement)
    write_text(file, json.dumps({"source": cfg.data.source, "points": points}, indent=1) + "\n")
    return points


def trained(
    cfg: ConfigDict, folder: pathlib.Path, seeds: int, *, start: Any = None, title: str = "train"
) -> Any:
    """The stacked parameters of a run, trained as far as it is not yet.

    Raises:
        UserError: as `study`.
    """
    return train_seeds(cfg, folder, range(seeds), batches_of(cfg), start=start, title=title)


def batches_of(cfg: ConfigDict) -> BatchAt:
    """Packed training batches by seed and step; each seed has examples of its own."""
    task, size = tasks.make(cfg.data.source), tasks.size(cfg.data.source)
    rows: dict[int, PackedRows] = {}

    def at(seed: int, step: int) -> Batch:
        if seed not in rows:
            examples = task.draw(tasks.span(task.train), size, seed, "train")
            rows[seed] = PackedRows(examples, task.vocabulary, cfg.train.batch, cfg.data.length)
        return rows[seed](step)

    return at


def row_length(task: Task, lengths: Sequence[int], multiple: int = 32) -> int:
    """Tokens that hold any example of these lengths, rounded up.

    The longest of 200 examples a length; a quarter more where examples of one length differ
    widely, as those of string functions do.
    """
    sizes = [
        [tasks.longest([example], task.vocabulary) for example in task.draw([n], 200, 0, part)]
        for n in lengths
        for part in PARTS
        if there(task, n, part)
    ]
    size = max(map(max, sizes))
    if any(max(some) > 1.3 * min(some) and max(some) > 0.8 * size for some in sizes):
        size += size // 4
    return -(-size // multiple) * multiple


def there(task: Task, length: int, part: Part) -> bool:
    """Whether a task has examples of this length in this part."""
    return bool(task.cells(length) or task.pool([length], part))
