"""SmolLM2-135M, trained at 8,192 tokens, reads 16,384 without training: loss beside retrieval.

    lcm reproduce smollm2_extension [--scale cpu|grid|tiny]

Six readings of one pretrained model, each a change of its config. Loss is that of the very same
tokens after more and more context, and by position in the longest window; retrieval is the passkey
task, whose key lies at several depths. Neither alone ranks the methods: a window keeps the loss and
forgets the key.

What is found is kept in `runs/smollm2_extension/kept`, loss by length and keys one by one, so that
the same command goes on where it was stopped, and `--scale grid` adds depths to what `cpu` found.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lcm import config, models, report
from lcm.data import tokenizers
from lcm.decoding.context import extended
from lcm.evaluation import heldout, passkey, scorer, summaries
from lcm.evaluation.documents import Document, at_least, within_budget
from lcm.evaluation.memory import Losses, identity
from lcm.evaluation.perplexity import Job
from lcm.evaluation.windows import cut_suffixes, planned_tokens, token_losses
from lcm.pretrained import Model, changed, load
from lcm.progress import progress
from lcm.report import plots
from lcm.report.tables import Table, to_text
from lcm.training.workdir import write_text

SCALES = ("cpu", "grid", "tiny")
FACTOR = 2  # of the trained length, what methods with a factor are set to at every length

# An extension by its name in `lcm positions`, and its fields at `{n}` tokens.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("", ()),
    "yarn": ("yarn", ()),
    "dynamic ntk": ("dynamic_ntk", ("length={n}", f"factor={FACTOR}")),
    "self-extend": ("self_extend", ("group=4", "window={w}")),
    "dual chunk": ("dual_chunk", ()),
    "lm-infinite": ("lm_infinite", ()),
}

# These are the plain model up to the trained length, whose figures then stand for theirs.
WITHIN = ("dynamic ntk", "lm-infinite")


class Scale(NamedTuple):
    """What is read: by which model, at which lengths, how much of it.

    spans: stretches of the longest length whose ends are scored, each of another document.
    suffix: tokens at the end of each.
    """

    model: str
    lengths: tuple[int, ...]
    spans: int
    suffix: int
    depths: tuple[float, ...]
    data: tuple[str, ...] = ()
    methods: tuple[str, ...] = tuple(METHODS)


CPU = Scale(
    model="smollm2-135m",
    lengths=(4096, 8192, 16_384),
    spans=1,
    suffix=2048,
    depths=(0.25,),
    data=("data.heldout=0.5",),
)
GRID = CPU._replace(depths=(0.1, 0.25, 0.5, 0.75, 0.9))
TINY = Scale(
    model="",  # a random one
    lengths=(1024, 2048),
    spans=2,
    suffix=64,
    depths=(0.5,),
    methods=("plain", "dynamic ntk", "lm-infinite"),
)


def run(workdir: pathlib.Path, scale: str) -> None:
    """Scores what is not there yet; writes `results.json` and the page."""
    sizes = {"cpu": CPU, "grid": GRID, "tiny": TINY}[scale]
    plain = load(sizes.model) if sizes.model else random_model()
    plain = plain._replace(cfg=config.override(plain.cfg, sizes.data))
    documents = spans(plain, sizes)
    result: dict[str, Any] = {"scale": scale, "trained": plain.cfg.data.length}
    result["documents"] = [document.name for document in documents]
    result["methods"] = {
        name: scores(plain, sizes, name, documents, workdir / "kept") for name in sizes.methods
    }
    write_text(workdir / "results.json", json.dumps(result, indent=1) + "\n")
    command = f"lcm reproduce smollm2_extension --scale {scale} --workdir {workdir}"
    page = report.publish(
        [*sections(result, sizes), report.provenance((), command)],
        workdir / "report.html",
        title=f"Context extension of {plain.cfg.name}: trained at {plain.cfg.data.length:,}",
    )
    tables = [loss_table(result, sizes), *passkey_tables(result)]
    print("\n\n".join(map(to_text, tables)))
    print(f"\nwrote {page}")


def random_model() -> Model:
    """A tiny model of bytes that nobody trained, for tests."""
    cfg = config.override(config.shrink(config.base()), ["data.length=1024"])
    params = models.init(cfg, jax.random.key(0))
    return Model(cfg, params, tokenizers.load(cfg.data.tokenizer), 0)


def at_length(plain: Model, name: str, length: int) -> Model:
    """The model under a method, to read texts of a length."""
    extension, fields = METHODS[name]
    if not extension or (name in WITHIN and length <= plain.cfg.data.length):
        return plain
    filled = [field.format(n=length, w=plain.cfg.data.length // 4) for field in fields]
    model = extended(plain, extension, FACTOR)
    return changed(model, [f"model.positions.{field}" for field in filled])


def spans(plain: Model, sizes: Scale) -> list[Document]:
    """The documents that are read, one of the longest length for each span."""
    length = sizes.lengths[-1]
    long = at_least(heldout(plain.cfg, plain.tokenizer), length)
    budget = sizes.spans * length
    return within_budget(long, span=length, max_tokens=budget, seed=plain.cfg.seed)


def scores(
    plain: Model, sizes: Scale, name: str, documents: list[Document], folder: pathlib.Path
) -> dict[str, Any]:
    """Loss and retrieval of a method at each length."""
    found: dict[str, Any] = {}
    for length in sizes.lengths:
        model = at_length(plain, name, length)
        title = f"{name} at {length:,}"
        losses = ends(model, documents, sizes, length, folder, title)
        file = folder / f"passkey-{length}-{identity(model)}.json"
        keys = passkey.retrieve(model, [length], file=file, depths=sizes.depths, title=title)
        sums, counts = summaries.sums_and_counts([[x[-sizes.suffix :] for x in losses]])
        found[str(length)] = {
            "loss": float(sums.sum() / counts.sum()),
            "passkey": [
                {k: trial[k] for k in ("depth", "found", "logprob", "written", "key")}
                for trial in keys["trials"]
                if trial["depth"] in sizes.depths
            ],
        }
        if length == sizes.lengths[-1]:
            found["by_position"] = np.mean(losses, axis=0).round(4).tolist()
    return found


def ends(
    model: Model,
    documents: list[Document],
    sizes: Scale,
    length: int,
    kept: pathlib.Path,
    title: str,
) -> list[np.ndarray]:
    """The loss of each token in windows of a length that end where the spans do, nan elsewhere."""
    whole = [len(document.tokens_N) for document in documents]
    plan = cut_suffixes(whole, span=sizes.lengths[-1], suffix=length, context=0)
    memory, job = Losses(kept, identity(model)), Job(documents, plan)
    losses = memory.find("ends", length, job)
    if losses is None:
        done, total = 0, planned_tokens(plan, length)
        with progress(f"loss: {title}") as tell:

            def advance(tokens: int) -> None:
                nonlocal done
                done += tokens
                tell(done, total)

            score = scorer(model.cfg, model.params)
            losses = token_losses(score, documents, plan, batch_tokens=length, advance=advance)
        memory.keep("ends", length, job, losses)
    return losses


def sections(result: dict[str, Any], sizes: Scale) -> list[report.Section]:
    """Loss of the same tokens, loss by position, keys."""
    trained, longest = result["trained"], sizes.lengths[-1]
    lines = {n: smooth(found["by_position"]) for n, found in result["methods"].items()}
    last = ", ".join(f"{name} {line[-1]:.2f}" for name, line in lines.items())
    picture = report.Picture(
        "loss-by-position",
        plots.png(plots.curves_by_position(lines, trained, "nats per token")),
        f"Line plot of loss against position in windows of {longest:,}. At the end: {last}.",
        f"Loss by position in windows of {longest:,} tokens, mean over {width(longest)} positions. "
        "The dashed line is the trained length.",
    )
    words = [
        f"The last {sizes.suffix:,} tokens of {len(result['documents'])} stretches of {longest:,} "
        f"tokens of held-out documents ({', '.join(result['documents'])}), read in windows that "
        "end there: the same tokens, after more and more context."
    ]
    keys = [
        "A five-digit number among idle sentences, at a share of the way through a prompt that "
        "fills the length (Mohtashami and Jaggi, 2023). Found: the first number that greedy "
        "decoding writes is the key. Log-probability: mean over the tokens of the key, in nats; "
        "chance is -2.3 a digit."
    ]
    return [
        report.Section("Loss", words, [loss_table(result, sizes)], [picture]),
        report.Section("Passkey retrieval", keys, passkey_tables(result)),
    ]


def loss_table(result: dict[str, Any], sizes: Scale) -> Table:
    """Perplexity and loss of the same tokens, by method and window."""
    rows = []
    for name, found in result["methods"].items():
        losses = [found[str(n)]["loss"] for n in sizes.lengths]
        rows.append([name, *(f"{np.exp(loss):,.2f} ({loss:.3f})" for loss in losses)])
    header = ["", *(f"{n:,} tokens" for n in sizes.lengths)]
    return Table(f"Perplexity (nats) of the last {sizes.suffix:,} tokens", header, rows)


def passkey_tables(result: dict[str, Any]) -> list[Table]:
    """Keys found, and the mean log-probability of keys, by length and depth."""
    found = result["methods"]
    lengths = [n for n in next(iter(found.values())) if n != "by_position"]
    header, right, likely = [""], [], []
    for n in lengths:
        trials = next(iter(found.values()))[n]["passkey"]
        header += [f"{int(n):,} at {t['depth']:.0%}" for t in trials]
    for name, each in found.items():
        trials = [trial for n in lengths for trial in each[n]["passkey"]]
        right.append([name, *("yes" if t["found"] else "no" for t in trials)])
        likely.append([name, *(f"{t['logprob']:.2f}" for t in trials)])
    return [
        Table("Key found", header, right),
        Table("Mean log-probability of the key's tokens", header, likely),
    ]


def width(length: int) -> int:
    """Positions that a point of a curve is the mean of."""
    return max(1, length // 64)


def smooth(values: Sequence[float]) -> np.ndarray:
    size = width(len(values))
    return np.convolve(values, np.ones(size) / size, mode="valid")
