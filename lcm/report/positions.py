"""The reference of position encodings: `lcm positions`, made from the registry alone."""

import dataclasses
import functools
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lcm import positions
from lcm.errors import ConfigError
from lcm.parallel import path
from lcm.positions import ENCODINGS, Dims, PositionEncoding
from lcm.report import page, plots, probes
from lcm.report.sections import Picture, Section
from lcm.report.tables import Table, to_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDS = {"from scratch": "from scratch", "tune": "a short tuning", "none": "none"}
KEEPS = {"rotated": "keys as they are used", "raw": "keys before rotation"}
# Sizes that stand for their letters in the shapes of parameters.
LETTERS = {1010: "D", 13: "H", 74: "K", 37: "K/2", 8192: "L"}
SIZES = Dims(width=1010, heads=13, kv_heads=13, head_size=74, length=8192)

# What pictures show: a model trained on 64 tokens, at 256.
DRAWN = Dims(width=256, heads=4, kv_heads=4, head_size=64, length=64)
LENGTH = 256
EXAMPLES: dict[str, dict[str, Any]] = {
    **{name: {"factor": 4.0} for name in ("linear", "ntk", "by_parts", "yarn", "llama3", "clex")},
    "learned": {"length": LENGTH},
    "dynamic_ntk": {"factor": 2.0},
    "longrope": {
        "factor": 4.0,
        "short": (1.0,) * 32,
        "long": tuple(float(4 ** (i / 31)) for i in range(32)),
    },
    "proportional": {"p": 0.5},
    "rerope": {"window": 32},
    "leaky_rerope": {"window": 32, "k": 8.0},
    "self_extend": {"group": 8, "window": 32},
    "lm_infinite": {"window": 48, "sinks": 8},
    "lm_infinite_alibi": {"window": 48, "sinks": 8},
    "streaming_llm": {"sinks": 8},
    "reattention": {"sinks": 8, "local": 32, "top": 1, "clip": 3, "span": 8, "chunk": 1},
    "fire": {"threshold": 64.0},
    "cope": {"positions": 16},
    "uniform_scale": {"factor": 1.5},
    "head_scale": {"factor": 1.5},
    "floor_scale": {"floor": 64},
    "aligned": {"temperature": 0.5},
    "chunked": {"size": 48},
}


def names(of: str = "") -> list[str]:
    """Encodings of a name or of a chain such as log_n+yarn; without one, all but chain.

    Raises:
        ConfigError: for one that is not known.
    """
    if not of:
        return [name for name in ENCODINGS if name != "chain"]
    for name in of.split("+"):
        if name not in ENCODINGS:
            raise ConfigError(
                f"position encoding {name!r} is unknown: choose from {', '.join(ENCODINGS)}"
            )
    return of.split("+")


def facts(name: str) -> dict[str, str]:
    """What a table says of an encoding, by column."""
    kind = ENCODINGS[name]
    about = kind.about
    return {
        "formula": about.formula,
        "source": about.source or "–",
        "needs training": NEEDS[about.training],
        "cost beside attention": about.cost,
        "cache holds": KEEPS.get(kind.cache, "that of its parts")
        if name != "chain"
        else "of the second",
        "parameters": parameters(name),
        "fields": (", ".join(fields(kind())) or "none") if name != "chain" else "first, second",
    }


def fields(encoding: PositionEncoding) -> list[str]:
    """`name=default` of each field; the encoding inside another one by its name."""
    shown = []
    for field in dataclasses.fields(encoding):
        value = getattr(encoding, field.name)
        if isinstance(value, PositionEncoding):
            value = positions.config(value)["name"]
        shown.append(f"{field.name}={value}")
    return shown


def parameters(name: str) -> str:
    """Shapes, in letters of the model's sizes: D width, H heads, K head size, L trained length."""
    if name == "chain":
        return "those of both"
    encoding = ENCODINGS[name]().resolved(SIZES)
    found = []
    for make, where in ((encoding.init, "shared"), (encoding.init_layer, "in each layer")):
        tree = jax.eval_shape(lambda make=make: make(jax.random.key(0), SIZES))
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found += [f"{path(keys, '.')} [{_shape(leaf.shape)}] {where}" for keys, leaf in leaves]
    return ", ".join(found) or "none"


def _shape(shape: tuple[int, ...]) -> str:
    return ", ".join(LETTERS.get(size, str(size)) for size in shape)


def table() -> Table:
    """All encodings, one a row."""
    columns = list(facts("nope"))
    rows = [[name, *facts(name).values()] for name in names()]
    return Table("Position encodings, joined by + as a chain", ["name", *columns], rows, prose=True)


def text(of: str = "") -> str:
    """What fits a terminal of all encodings, or entries in full."""
    if not of:
        shown = [[name, facts(name)["needs training"], facts(name)["formula"]] for name in names()]
        listed = to_text(Table("", ["name", "needs training", "formula"], shown, prose=True))
        more = "lcm positions NAME tells all of one, --html FILE of all, with pictures"
        return f"{listed.strip()}\n\n{more}"
    return "\n\n".join(_entry(name) for name in names(of))


def _entry(name: str) -> str:
    kind = ENCODINGS[name]
    rows = [f"  {column:<22} {value}" for column, value in facts(name).items()]
    return "\n".join([f"{name}: {kind.about.title}", "", inspect.getdoc(kind), "", *rows])


def write(
    out: str | os.PathLike[str], of: str = "", dims: Dims = DRAWN, length: int = LENGTH
) -> Path:
    """One self-contained page: the table, then each encoding with a picture of what it does.

    Raises:
        ConfigError: for an encoding that is not known, or where the page cannot be written.
    """
    out, shown = Path(out), names(of)
    intro = (
        "A model takes one by --config.model.positions=NAME and its fields by"
        " --config.model.positions.FIELD=VALUE; NAME+NAME is a chain. Pictures are of one document"
        f" of {length} tokens, {length / dims.length:g} times the trained length {dims.length},"
        f" heads of {dims.head_size}, parameters as they begin."
    )
    sections = [Section("All encodings", [intro], [table()])] if not of else []
    sections += [section(name, dims, length) for name in shown]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page.render("Position encodings", sections), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the page to {out}: {error.strerror}") from error
    return out


def section(name: str, dims: Dims = DRAWN, length: int = LENGTH) -> Section:
    """One encoding: what it says of itself, its entry, its picture."""
    kind = ENCODINGS[name]
    rows = [[column, value] for column, value in facts(name).items()]
    paragraphs = inspect.getdoc(kind).split("\n\n")
    pictures = [] if name == "chain" else [picture(name, dims, length)]
    entry = Table("Entry", ["", name], rows, prose=True)
    return Section(f"{name}: {kind.about.title}", paragraphs, [entry], pictures)


def example(name: str, dims: Dims = DRAWN) -> tuple[PositionEncoding, str]:
    """What is drawn of an encoding, and how a config names it; what joins others joins RoPE."""
    own = EXAMPLES.get(name, {})
    made = positions.make({"name": name, **own})
    label = ", ".join([name, *(f"{k}={v}" for k, v in own.items() if not isinstance(v, tuple))])
    if type(made).adapt is not PositionEncoding.adapt:
        made, label = positions.Chain(made, positions.RoPE()), f"{label}, joined with rope"
    return made.resolved(dims), label


def picture(name: str, dims: Dims = DRAWN, length: int = LENGTH) -> Picture:
    """A map of distances for remaps, decay by distance for all others."""
    encoding, label = example(name, dims)
    drawn = f"{label}; {length} tokens, trained on {dims.length}"
    if isinstance(encoding, positions.Remap):
        rho = probes.probe(encoding, dims, length).rho
        seen = f"distances from {np.nanmin(rho):.0f} to {np.nanmax(rho):.0f}"
        return Picture(
            name,
            plots.png(distance_map(rho), dpi=110),
            f"Map of the distance at which each query sees each key: {seen}.",
            f"Distance rho(i, j) at which query i sees key j, read from the angle of the slowest"
            f" pair; white is not seen ({drawn}).",
        )
    cosines = probes.added(encoding, dims, length)
    if cosines is not None:
        curves, what = {"all heads": cosines}, "cosine of what joins the last place and the others"
    else:
        curves = scores_by_head(probes.probe(encoding, dims, length).scores)
        if isinstance(encoding, positions.RoPE | positions.Chain):
            curves["plain RoPE"] = _plain(dims, length)
        what = "score of the last query, q = k = 1, by distance, less that of distance 0"
    return Picture(
        name,
        plots.png(decay(curves, dims.length, what.partition(",")[0]), dpi=110),
        f"Line plot: {what}.",
        f"{what[0].upper()}{what[1:]}; where a line ends nothing is seen ({drawn}).",
    )


@functools.cache
def _plain(dims: Dims, length: int) -> np.ndarray:
    return probes.probe(positions.RoPE(), dims, length).scores[0]


def scores_by_head(scores_HS: np.ndarray) -> dict[str, np.ndarray]:
    """One curve if all heads are alike, else one for each."""
    if np.allclose(scores_HS, scores_HS[:1], atol=1e-3):
        return {"all heads": scores_HS[0]}
    return {f"head {head}": row for head, row in enumerate(scores_HS)}


def decay(curves: dict[str, np.ndarray], trained: int, unit: str) -> "Figure":
    """Curves over keys, drawn against their distance from the last query."""
    figure, (ax,) = plots.new_figure()
    for index, (name, row) in enumerate(curves.items()):
        seen = np.where(np.isfinite(row), row, np.nan)[::-1]
        look = {"color": "#b0b0b0", "zorder": 1} if name == "plain RoPE" else plots.style(index)
        few = {"marker": "."} if np.isfinite(seen).sum() < 8 else {}
        ax.plot(seen, linewidth=1.6, label=name, **look, **few)
    ax.set_xlim(0, len(seen) - 1)
    ax.axvline(trained, color=plots.GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    ax.set_xlabel("distance i - j (tokens; dashed: the trained length)")
    ax.set_ylabel(unit)
    if len(curves) > 1:
        plots.legend(figure, ax)
    return figure


def distance_map(rho: np.ndarray) -> "Figure":
    """rho(i, j) as colours, queries downwards."""
    figure, (ax,) = plots.new_figure()
    ax.grid(False)
    shown = ax.imshow(rho, cmap="viridis", interpolation="nearest")
    figure.colorbar(shown, ax=ax, label="rho(i, j)", shrink=0.9)
    ax.set_xlabel("key j")
    ax.set_ylabel("query i")
    return figure
