"""Code found by what is said of it: a Mamba-2 retriever beside BM25, on the standard library.

    lcm reproduce retriever [--scale cpu|tiny]

"Mamba Retriever", 2024, arXiv:2408.08066, small and from nothing: vectors of hashed words, trained
by InfoNCE with in-batch negatives, on modules whose names do not hold them out.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lcm import config, models, report
from lcm.data.descriptions import Description, descriptions, rows, words
from lcm.data.documents import is_heldout
from lcm.data.stdlib import StandardLibrary
from lcm.evaluation.retrieval import BM25, ranks, recall, reciprocal_rank
from lcm.models import decoder, retriever
from lcm.training.fit import fit
from lcm.training.workdir import write_text

SCALES = ("cpu", "tiny")
HELD_OUT = 0.1
KS = (1, 5, 10, 100)
VARIANTS = {"mamba2": False}  # and whether layers read in both directions by turns


class Scale(NamedTuple):
    """How large a run is; lengths are in words, EOS included. 0 pairs are all there are."""

    width: int
    steps: int
    rows: int
    vocabulary: int
    query: int
    passage: int
    pairs: int = 0
    lr: float = 3e-3
    temperature: float = 0.05


CPU = Scale(96, 500, 64, 8192, 16, 48)
TINY = Scale(16, 2, 4, 64, 6, 8, pairs=300)


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains what is not there yet, ranks held-out passages, and writes `results.json`."""
    sizes = {"cpu": CPU, "tiny": TINY}[scale]
    pairs = list(descriptions(StandardLibrary()))
    pairs = pairs[:: len(pairs) // sizes.pairs] if sizes.pairs else pairs
    test = [pair for pair in pairs if is_heldout(_module(pair), HELD_OUT)]
    train = [pair for pair in pairs if not is_heldout(_module(pair), HELD_OUT)]
    results = {"train": len(train), "test": len(test), "rows": {}}
    for cut in (0, sizes.passage):
        name = f"BM25, {cut - 1} words" if cut else "BM25, whole"
        results["rows"][name] = _figures(_bm25(test, sizes, cut))
    for name, both in VARIANTS.items():
        file = workdir / f"{name.replace(', ', '_').replace(' ', '_')}.json"
        results["rows"] |= _one(sizes, name, both, train, test, file)
    write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    print(f"{len(test)} held-out passages, {len(train)} pairs to learn from")
    print(f"{'':28}" + "".join(f"{f'recall@{k}':>12}" for k in KS) + f"{'MRR@10':>12}")
    for name, row in results["rows"].items():
        print(f"{name:28}" + "".join(f"{value:12.3f}" for value in row.values()))
    best = max(VARIANTS, key=lambda name: results["rows"][name]["MRR@10"])
    published = report.Published(
        "MRR@10 of a bi-encoder (MS MARCO dev, pretrained 130M; here code, from nothing)",
        "mamba-130m 32.29, bert-base 32.85",
        f"{100 * results['rows'][best]['MRR@10']:.1f}, BM25 on all words "
        f"{100 * results['rows']['BM25, whole']['MRR@10']:.1f}",
        "Mamba Retriever, 2024, arXiv:2408.08066",
    )
    command = f"lcm reproduce retriever --scale {scale} --workdir {workdir}"
    sections = [report.published_beside_measured([published]), report.provenance((), command)]
    page = report.publish(
        sections, workdir / "report.html", title="Code found by what is said of it"
    )
    print(f"\nwrote {page}")


def _module(pair: Description) -> str:
    return pair.name.partition(":")[0]


def _bm25(test: Sequence[Description], sizes: Scale, cut: int) -> np.ndarray:
    """Scores on all words of a passage, or on those that the models read."""
    passages = [words(pair.passage)[: cut - 1 if cut else None] for pair in test]
    index = BM25(passages)
    return np.stack([index.scores(words(pair.query)) for pair in test])


def _figures(scores_QN: np.ndarray) -> dict[str, float]:
    ranks_Q = ranks(scores_QN, np.arange(len(scores_QN)))
    return {**{f"recall@{k}": recall(ranks_Q, k) for k in KS}, "MRR@10": reciprocal_rank(ranks_Q)}


def _one(
    sizes: Scale,
    name: str,
    both: bool,
    train: Sequence[Description],
    test: Sequence[Description],
    file: pathlib.Path,
) -> dict[str, dict[str, float]]:
    """Figures of a model before and after training; what is finished is read."""
    if file.exists():
        return json.loads(file.read_text())
    shape = [
        *("model.pattern=mamba2", "model.mlp=none", "model.depth=2", "model.state=16"),
        *("model.heads=4", f"model.width={sizes.width}", f"model.vocab={sizes.vocabulary}"),
    ]
    encoder = models.spec(config.override(config.base(), shape))
    spec = retriever.RetrieverSpec(encoder, both, sizes.temperature)
    params = decoder.init(encoder, jax.random.key(0))
    embed = jax.jit(lambda params, tokens, count: retriever.embed(spec, params, tokens, count))

    def tested(params: Any) -> dict[str, float]:
        q, p = _read(test, sizes)
        chunk = 4 * sizes.rows
        vectors = [_embedded(embed, params, each, chunk) for each in (q, p)]
        return _figures(vectors[0] @ vectors[1].T)

    found = {f"{name}, untrained": tested(params)}
    found[name] = tested(_trained(spec, params, sizes, name, *_read(train, sizes)))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(found) + "\n")
    return found


def _read(pairs: Sequence[Description], sizes: Scale) -> tuple[Any, Any]:
    queries = rows([words(pair.query) for pair in pairs], sizes.vocabulary, sizes.query)
    return queries, rows([words(p.passage) for p in pairs], sizes.vocabulary, sizes.passage)


def _embedded(embed: Any, params: Any, read: tuple[Any, Any], chunk: int) -> np.ndarray:
    """Vectors, in chunks of one shape: the last is filled up with rows of nothing but EOS."""
    tokens, count = read
    fill = -len(tokens) % chunk
    tokens, count = np.pad(tokens, ((0, fill), (0, 0))), np.pad(count, (0, fill), constant_values=1)
    parts = [
        np.asarray(embed(params, tokens[n : n + chunk], count[n : n + chunk]))
        for n in range(0, len(tokens), chunk)
    ]
    return np.concatenate(parts)[: len(tokens) - fill]


def _trained(
    spec: retriever.RetrieverSpec, params: Any, sizes: Scale, name: str, queries: Any, passages: Any
) -> Any:
    rng = np.random.default_rng(0)

    def batches() -> Iterator:
        while True:
            at = rng.choice(len(queries[0]), sizes.rows, replace=False)
            yield [(tokens[at], count[at]) for tokens, count in (queries, passages)]

    def loss(params: Any, batch: Any) -> jax.Array:
        return retriever.loss(spec, params, *batch).mean()

    return fit(loss, params, batches(), sizes.steps, sizes.lr, name)[0]
