"""The shape of Llama 3.1 8B on pods that are not here: a million tokens a row, 4 to 1,024 chips.

    lcm reproduce pods [--scale cpu|tiny]

Two questions, answered by compiling train steps ahead of time. `long`: do rows of 64K to a million
tokens fit 64 chips of v5p, with keys sent around a ring and what the backward pass needs in the
host's memory? `growth`: what does a device hold and send as the mesh grows, each chip having one
row of 8,192 tokens and its share of all weights? `beside`: the steps that MaxText compiles, too.
`others`: models without attention in all layers, of 65,536 tokens a row.

Every step is kept in `runs/pods`, so that the same command goes on where it was stopped. A step
takes minutes; hours on two cores that are shared.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax

from lcm import config
from lcm.aot import gate
from lcm.aot.chips import GIB, chip
from lcm.report import plots
from lcm.report.tables import Table, markdown
from lcm.training.workdir import write_text

SCALES = ("cpu", "tiny")
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
PEERS = pathlib.Path(__file__).with_name("peer.json")  # of BESIDE, by peer.py
LLAMA = "llama3_8b"
RING = ("mesh.order=zigzag", "model.context_attention=ring", "model.remat=offload")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Step(NamedTuple):
    """A train step to compile: of `configs/MODEL.py:arg`, for a mesh over a topology."""

    arg: str
    topology: str
    mesh: str
    overrides: tuple[str, ...]
    model: str = LLAMA
    kind: str = ""

    @property
    def name(self) -> str:
        kind = f"{self.kind}-" if self.kind else ""
        return f"{kind}{self.arg or '8192'}-{self.topology}-{self.mesh}".replace(":", "-")


def long(tokens: int, context: int, chips: int = 64, topology: str = "v5p:4x4x4") -> Step:
    """A million tokens in a batch, of rows that lie on `context` chips each."""
    rows = chips // context
    mesh = f"fsdp={rows},context={context}"
    return Step(str(tokens), topology, mesh, (f"train.batch={rows}", *RING))


def growth(topology: str, chips: int) -> Step:
    """One row of 8,192 tokens a chip, weights over all of them."""
    return Step("", topology, f"fsdp={chips}", (f"train.batch={chips}",))


LONG = (long(65_536, 4), long(262_144, 16), long(1_048_576, 64))
GROWTH = (
    growth("v5p:2x2x1", 4),
    growth("v5p:2x2x4", 16),
    growth("v5p:4x4x4", 64),
    growth("v5p:4x8x8", 256),
    growth("v5p:8x8x16", 1024),
)
BESIDE = (
    Step("", "v5p:4x4x4", "fsdp=64", ("train.batch=256",), kind="beside"),
    Step(
        "65536",
        "v5p:4x4x4",
        "fsdp=16,context=4",
        ("train.batch=16", "mesh.order=zigzag", "model.context_attention=gather"),
        kind="beside",
    ),
    Step("", "v5e:16x16", "fsdp=256", ("train.batch=256",), kind="beside"),
)
OTHERS = tuple(
    Step("65536", "v5p:4x4x4", "fsdp=16,context=4", ("train.batch=16",), model, model)
    for model in ("mamba2_2p7b", "recurrentgemma_9b", "samba_1p3b")
)
TINY_LONG = (
    Step("tiny", "v5p:2x2x1", "fsdp=2,context=2", ("train.batch=2", "model.remat=offload")),
)
TINY_GROWTH = tuple(
    Step("tiny", topology, f"fsdp={chips}", (f"train.batch={chips}",))
    for topology, chips in (("v5p:2x2x1", 4), ("v5p:2x2x2", 8))
)


def run(workdir: pathlib.Path, scale: str) -> None:
    """Compiles what is not kept yet; prints tables, writes `results.json` and `growth.png`."""
    wanted = {
        "cpu": {"growth": GROWTH, "long": LONG, "beside": BESIDE, "others": OTHERS},
        "tiny": {"growth": TINY_GROWTH, "long": TINY_LONG},
    }[scale]
    results = {
        name: [kept(step, workdir / "kept") for step in steps] for name, steps in wanted.items()
    }
    if "beside" in results:
        ours = [{**each, "side": "lcm"} for each in results["beside"]]
        pairs = zip(ours, json.loads(PEERS.read_text()), strict=True)
        results["beside"] = [each for pair in pairs for each in pair]
    write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    for name, points in results.items():
        print(f"{name}\n\n{markdown(table(name, points))}\n")
    (workdir / "growth.png").write_bytes(plot(results["growth"]))
    print(f"wrote {workdir / 'results.json'} and {workdir / 'growth.png'}")


def kept(step: Step, folder: pathlib.Path) -> dict[str, Any]:
    """What is known of a step, from its file or by compiling it."""
    file = folder / f"{step.name}.json"
    if not file.exists():
        cfg = config.override(config.load(f"{CONFIGS / step.model}.py:{step.arg}"), step.overrides)
        cfg = gate.with_mesh(cfg, step.mesh)
        mesh = gate.mesh_of(cfg, step.topology)
        report = gate.measure(cfg, "train", step.topology, mesh)
        print(gate.text(report), flush=True)
        jax.clear_caches()
        folder.mkdir(parents=True, exist_ok=True)
        found = point(report, cfg)
        if step.model != LLAMA:
            found["model"] = step.model
        write_text(file, json.dumps(found, indent=1) + "\n")
    return json.loads(file.read_text())


def point(report: gate.Report, cfg: Any) -> dict[str, Any]:
    """Of a report what tables and plots show; bytes of one device and step."""
    names = ("topology", "mesh", "remat", "tokens", "arguments", "temporaries", "memory")
    names += ("host", "capacity", "flops", "cycles", "seconds")
    values = {name: getattr(report, name) for name in names}
    sent = {kind: list(each) for kind, each in report.collectives.items()}
    return values | {"length": cfg.data.length, "sent": sent}


def table(name: str, points: list[dict[str, Any]]) -> Table:
    """One step a line."""
    header = ["tokens a row", "mesh", "arguments", "temporaries", "host", "fits", "cycles"]
    rows = [
        [
            f"{p['length']:,}",
            f"{p['topology']}, " + ", ".join(f"{k} {v}" for k, v in p["mesh"].items()),
            *(_gib(p.get(key)) for key in ("arguments", "temporaries", "host")),
            "yes" if p["memory"] <= chip(p["topology"]).memory else "no",
            f"{p['cycles']:.3e}",
            ", ".join(f"{k} {n} ({size / GIB:.1f} GiB)" for k, (n, size) in p["sent"].items()),
            f"{p['seconds']:.0f} s",
        ]
        for p in points
    ]
    header += ["collectives", "compiled in"]
    for key in ("model", "side"):  # of what differs
        if any(key in p for p in points):
            header = [key, *header]
            rows = [[p[key], *row] for p, row in zip(points, rows, strict=True)]
    return Table(name, header, rows)


def _gib(size: int | None) -> str:
    """A dash for what was not asked when a step was compiled."""
    return "–" if size is None else f"{size / GIB:.2f} GiB"


def plot(points: list[dict[str, Any]]) -> bytes:
    """Memory of a device, and what it receives in a step, by the number of chips."""
    figure, (memory, sent) = plots.new_figure(2)
    chips = [p["tokens"] // p["length"] for p in points]
    for i, key in enumerate(("arguments", "temporaries")):
        drawn = [p[key] / GIB for p in points]
        memory.plot(chips, drawn, label=key, marker=plots.MARKERS[i], **plots.style(i))
    kinds = [kind for kind in KINDS if any(kind in p["sent"] for p in points)]
    for i, kind in enumerate(kinds, 2):
        drawn = [p["sent"].get(kind, (0, 0))[1] / GIB for p in points]
        sent.plot(chips, drawn, label=kind, marker=plots.MARKERS[i], **plots.style(i))
    for ax, what in ((memory, "GiB held by a chip"), (sent, "GiB of collectives, a chip and step")):
        ax.set_xscale("log", base=2)
        ax.set_xticks(chips, [f"{n:,}" for n in chips])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.set_xlabel("chips of v5p, a row of 8,192 tokens on each")
        ax.set_title(what, loc="left", fontsize=10)
        ax.legend(frameon=False)
    return plots.png(figure)
