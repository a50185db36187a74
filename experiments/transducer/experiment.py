"""A transducer that copies what stutters, at the lengths it was trained on and twice those.

    lcm reproduce transducer [--scale cpu|tiny]

Graves, "Sequence Transduction with Recurrent Neural Networks", 2012, arXiv:1211.3711, of Mamba-2
layers: each input symbol is said one to three times and is to be given once.
"""

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from lcm import config, models, report
from lcm.data import stutter
from lcm.decoding import transducer as decoding
from lcm.evaluation.edits import error_rate
from lcm.models import transducer
from lcm.training.fit import fit
from lcm.training.workdir import write_text

SCALES = ("cpu", "tiny")
SYMBOLS = 8
JOINTS = ("sum", "tanh")


class Scale(NamedTuple):
    """How large a run is: `trained` are numbers of labels, `tested` those of test sets."""

    width: int
    steps: int
    rows: int
    trained: tuple[int, int]
    tested: tuple[int, ...]
    count: int
    beam: int  # rows that beam search decodes
    lr: float = 3e-3


CPU = Scale(48, 600, 32, (2, 10), (5, 10, 15, 20), 100, 10)
TINY = Scale(16, 3, 4, (1, 2), (2, 4), 4, 2)


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains one model a joint, decodes, and writes `results.json` and the page."""
    sizes = {"cpu": CPU, "tiny": TINY}[scale]
    results = {joint: _one(sizes, joint, workdir / f"{joint}.json") for joint in JOINTS}
    write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    headers = ["joint", "search", *(f"{n} labels" for n in sizes.tested)]
    lines = [
        [joint, search, *(f"{result[search][str(n)]:.3f}" for n in sizes.tested)]
        for joint, result in results.items()
        for search in ("greedy", "beam")
    ]
    for line in [headers, *lines]:
        print("  ".join(f"{cell:>10}" for cell in line))
    published = report.Published(
        "phone error rate on TIMIT: transducer, CTC (here: label error rate, greedy)",
        "23.2 %, 25.5 % (as remembered, not looked up)",
        f"sum {_at(results, 'sum', sizes)}, tanh {_at(results, 'tanh', sizes)}",
        "Graves, 2012, arXiv:1211.3711",
    )
    command = f"lcm reproduce transducer --scale {scale} --workdir {workdir}"
    page = report.publish(
        [report.published_beside_measured([published]), report.provenance((), command)],
        workdir / "report.html",
        title="A transducer that copies what stutters",
    )
    print(f"\nwrote {page}")


def _at(results: dict[str, Any], joint: str, sizes: Scale) -> str:
    return " / ".join(f"{results[joint]['greedy'][str(n)]:.1%}" for n in sizes.tested)


def _one(sizes: Scale, joint: str, file: pathlib.Path) -> dict[str, Any]:
    """Error rates of one joint by search and number of labels; what is finished is read."""
    if file.exists():
        return json.loads(file.read_text())
    spec = _spec(sizes, joint)
    params, losses = _trained(spec, sizes)
    result: dict[str, Any] = {"loss": losses, "greedy": {}, "beam": {}}
    room = max(sizes.tested)  # one shape, and so one compilation, for all of them
    for labels in sizes.tested:
        seed = (labels, 0)  # the training's are (step, 1)
        pairs = stutter.pairs(SYMBOLS, (labels, labels), sizes.count, seed, room)
        wanted = stutter.sequences(pairs)
        got = decoding.greedy(spec, params, pairs.frames_BT, pairs.frames_B, most=3 * room)
        result["greedy"][str(labels)] = error_rate(got, wanted)
        searched = [_beam(spec, params, pairs, row, labels) for row in range(sizes.beam)]
        result["beam"][str(labels)] = error_rate(searched, wanted[: sizes.beam])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(result) + "\n")
    return result


def _beam(spec: Any, params: Any, pairs: Any, row: int, labels: int) -> Sequence[int]:
    frames = pairs.frames_BT[row][: pairs.frames_B[row]].tolist()
    symbols = decoding.symbols_of(spec, params, frames, padded=pairs.frames_BT.shape[1])
    return decoding.beam_search(symbols, len(frames), width=4, most=3 * labels)[0].labels


def _spec(sizes: Scale, joint: str) -> transducer.TransducerSpec:
    shape = [
        *("model.pattern=mamba2", "model.mlp=none", "model.state=16", "model.heads=4"),
        *(f"model.width={sizes.width}", f"model.vocab={SYMBOLS + 1}"),
    ]
    network = lambda depth: models.spec(config.override(config.base(), [*shape, depth]))  # noqa: E731
    return transducer.TransducerSpec(network("model.depth=2"), network("model.depth=1"), joint)


def _trained(spec: transducer.TransducerSpec, sizes: Scale) -> tuple[Any, list[float]]:
    drawn = (stutter.pairs(SYMBOLS, sizes.trained, sizes.rows, (n, 1)) for n in itertools.count())
    return fit(
        lambda params, pairs: transducer.loss(spec, params, pairs).mean(),
        transducer.init(spec, jax.random.key(0)),
        (transducer.Pairs(*pairs) for pairs in drawn),
        sizes.steps,
        sizes.lr,
        spec.joint,
    )
