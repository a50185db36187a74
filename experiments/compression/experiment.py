"""Text said again from vectors: how much comes through, by how many characters one stands for.

    lcm reproduce compression [--scale cpu|tiny]

Recurrent Context Compression (2024, arXiv:2406.06110), small: a character model on the standard
library becomes encoder and decoder, and both learn to say a segment again from an excerpt on. One
reads the last layer's vectors alone. Then the encoder stays, and texts are of several segments.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm import config, models, report
from lcm.data.documents import is_heldout
from lcm.data.stdlib import StandardLibrary
from lcm.models import compression, decoder
from lcm.models.compression import Asked, CompressionSpec, Task
from lcm.ops.losses import cross_entropy
from lcm.report.tables import Table, captioned, number
from lcm.training.fit import fit
from lcm.training.workdir import write_text

SCALES = ("cpu", "tiny")
HELD_OUT = 0.1
# What is kept of a segment: a vector for so many characters, of all layers or of the last alone.
MODELS = {"c=4": (4, True), "c=8": (8, True), "c=16": (16, True), "c=8, last layer": (8, False)}
CONTINUED = "c=8"  # in the second stage


class Scale(NamedTuple):
    """How large a run is: texts of one `segment`, then of `segments` of them; `bytes` to read."""

    depth: int
    width: int
    heads: int
    segment: int
    segments: int
    task: Task
    first: int  # steps of the character model
    steps: int  # of the first stage
    more: int  # of the second
    rows: int
    tested: int
    bytes: int = 0  # 0 is all
    lr: float = 2e-3


CPU = Scale(4, 64, 4, 64, 4, Task(0.9, (6, 10), 32), 1000, 1500, 300, 16, 512)
TINY = Scale(2, 16, 2, 16, 2, Task(0.5, (1, 2), 4), 2, 2, 2, 4, 8, 20_000)


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains and scores what is not there yet, and writes `results.json` and the page."""
    sizes = {"cpu": CPU, "tiny": TINY}[scale]
    results: dict[str, dict[str, Any]] = {}
    for name in MODELS:
        results[name] = studied(sizes, name, workdir / f"{name.replace(', ', '_')}.json")
        write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    shown = tables(sizes, results)
    write_text(workdir / "tables.md", captioned(shown))
    print(f"\n{(workdir / 'tables.md').read_text()}")
    least, most = sizes.task.excerpt
    text = [
        f"Segments of {sizes.segment} characters; an excerpt of {least} to {most} is given, the "
        f"{sizes.task.answer} behind it are to be said, each from the right ones before it. "
        f"{sizes.tested} rows of modules that no model was trained on. With the vectors of "
        "another text it is what a character model guesses without any."
    ]
    command = f"lcm reproduce compression --scale {scale} --workdir {workdir}"
    sections = [
        report.Section("What comes through", text, shown),
        report.provenance((), command),
    ]
    page = report.publish(sections, workdir / "report.html", title="Text said again from vectors")
    print(f"\nwrote {page}")


def spec_of(sizes: Scale, name: str) -> CompressionSpec:
    """Encoder and decoder of the character model's shape."""
    ratio, every = MODELS[name]
    network = character_model(sizes)
    return CompressionSpec(network, network, sizes.segment, ratio, every)


def character_model(sizes: Scale) -> models.ModelSpec:
    shape = f"model.depth={sizes.depth}", f"model.width={sizes.width}", f"model.heads={sizes.heads}"
    return models.spec(config.override(config.base(), [*shape, "model.vocab=256"]))


@functools.cache
def text(heldout: bool, most: int) -> np.ndarray:
    """Bytes of all modules of one split, one after another, int32."""
    source = StandardLibrary()
    names = range(len(source))
    taken = [n for n in names if is_heldout(source.name(n), HELD_OUT) == heldout]
    found = np.frombuffer("\n".join(source[n].text for n in taken).encode(), np.uint8)
    return found[: most or None].astype(np.int32)


def drawn(sizes: Scale, seed: int, length: int, rows: int, heldout: bool = False) -> Iterator:
    """Rows from random places of the text, one batch after another."""
    whole, rng = text(heldout, sizes.bytes), np.random.default_rng(seed)
    while True:
        start_B1 = rng.integers(len(whole) - length, size=(rows, 1))
        yield whole[start_B1 + np.arange(length)]


def trained(
    sizes: Scale,
    steps: int,
    loss: Callable[[Any, Any, jax.Array], Any],
    params: Any,
    batches: Iterator,
    title: str,
) -> Any:
    """Parameters after so many steps; `loss` has a key of its own for each batch."""
    keys = jax.random.key(1)
    numbered = ((batch, jax.random.fold_in(keys, n)) for n, batch in enumerate(batches))
    of_batch = lambda params, each: loss(params, *each)  # noqa: E731
    return fit(of_batch, params, numbered, steps, sizes.lr, title)[0]


@functools.cache
def begun(sizes: Scale) -> Any:
    """The character model that both begin as: it reads segments that are said again behind them.

    So it knows how to copy what stands in its context, as a pretrained model does, and as one of
    this size does not learn from text alone.
    """
    spec, length, task = character_model(sizes), sizes.segment, sizes.task._replace(share=1.0)

    def loss(params: Any, rows_BM: Any, key: jax.Array) -> Any:
        asked = compression.ask(task, key, rows_BM, length)
        tokens_BL = jnp.concatenate([rows_BM[:, :length], asked.tokens_BL], axis=1)
        targets_BL = jnp.concatenate([tokens_BL[:, 1:length], asked.targets_BL], axis=1)
        # The excerpt's first is no target: nothing tells which place is taken up.
        context = models.default_context(tokens_BL.shape)
        logits, _ = decoder.apply(spec, params, tokens_BL, context, None)
        kept = jnp.delete(logits, length - 1, axis=1, assume_unique_indices=True)
        return cross_entropy(kept, targets_BL)[0].mean()

    batches = drawn(sizes, 0, length + sizes.task.answer + 1, sizes.rows)
    params = decoder.init(spec, jax.random.key(0))
    return trained(sizes, sizes.first, loss, params, batches, "characters")


def taught(
    sizes: Scale, spec: CompressionSpec, params: Any, stage: int, segments: int, title: str
) -> Any:
    """Parameters after a stage on texts of so many segments."""
    length = segments * sizes.segment
    moving, kept = compression.apart(params, stage)

    def loss(moving: Any, rows_BM: Any, key: jax.Array) -> Any:
        asked = compression.ask(sizes.task, key, rows_BM, length)
        return compression.loss(spec, moving | kept, asked)

    batches = drawn(sizes, stage, length + sizes.task.answer + 1, sizes.rows)
    steps = sizes.steps if stage == 1 else sizes.more
    return trained(sizes, steps, loss, moving, batches, f"{title}, stage {stage}") | kept


def studied(sizes: Scale, name: str, file: pathlib.Path) -> dict[str, Any]:
    """Figures of one model after each stage; what is finished is read."""
    if file.exists():
        return json.loads(file.read_text())
    spec = spec_of(sizes, name)
    both = {"encoder": begun(sizes), "decoder": begun(sizes)}
    params = compression.init(spec, jax.random.key(0)) | both
    params["maps"]["embed"] = jnp.eye(sizes.width)  # one model's vectors are the other's
    params = taught(sizes, spec, params, 1, 1, name)
    found = {"prefix": spec.prefix(sizes.segment), "one": scored(sizes, spec, params, 1)}
    if name == CONTINUED:
        found["several"] = scored(sizes, spec, params, sizes.segments)
        after = taught(sizes, spec, params, 2, sizes.segments, name)
        found["several, taught"] = scored(sizes, spec, after, sizes.segments)
        found["one, taught"] = scored(sizes, spec, after, 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(found, indent=1) + "\n")
    return found


def scored(sizes: Scale, spec: CompressionSpec, params: Any, segments: int) -> dict[str, float]:
    """Right characters of held-out answers and bits of each, by the text and by another one."""
    length = segments * sizes.segment
    rows = drawn(sizes, 2, length + sizes.task.answer + 1, sizes.tested, heldout=True)
    asked = compression.ask(sizes.task._replace(share=1.0), jax.random.key(2), next(rows), length)
    other = asked._replace(text_BN=np.roll(asked.text_BN, 1, axis=0))
    found = _figures(spec, params, asked)
    return found | {f"{name}, other": x for name, x in _figures(spec, params, other).items()}


def _figures(spec: CompressionSpec, params: Any, asked: Asked) -> dict[str, float]:
    nll_BL, right_BL = jax.jit(lambda p, asked: compression.answered(spec, p, asked))(params, asked)
    weight_BL = np.asarray(asked.weight_BL)
    mean = lambda x: float((np.asarray(x) * weight_BL).sum() / weight_BL.sum())  # noqa: E731
    return {"right": mean(right_BL), "bits": mean(nll_BL) / np.log(2)}


def tables(sizes: Scale, results: dict[str, dict[str, Any]]) -> list[Table]:
    """By ratio after the first stage, and what the second does for longer texts."""
    header = ["right", "bits", "right, other text", "bits, other text"]
    line = lambda one: [number(x, 3) for x in reordered(one)]  # noqa: E731
    first = [[name, str(found["prefix"]), *line(found["one"])] for name, found in results.items()]
    found, several = results[CONTINUED], f"{sizes.segments} segments"
    named = {
        "one segment": "one",
        f"{several}": "several",
        "one segment, after stage 2": "one, taught",
        f"{several}, after stage 2": "several, taught",
    }
    second = [[name, *line(found[key])] for name, key in named.items()]
    return [
        Table("Answers after the first stage", ["", "places", *header], first),
        Table(f"{CONTINUED}, by the length of the text", ["", *header], second),
    ]


def reordered(one: dict[str, float]) -> list[float]:
    return [one[name] for name in ("right", "bits", "right, other", "bits, other")]
