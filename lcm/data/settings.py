"""The keys of a config's `data` section: their defaults, their meaning, and what they may hold."""

from typing import Any

from lcm.errors import ConfigError


def defaults() -> dict[str, tuple[Any, str]]:
    """Each key of `data` with its default value and one line of help."""
    return {
        "source": (
            "stdlib",
            "where documents come from: stdlib (this Python's library and its help topics), text, "
            "jsonl, parquet, array_record, or task:NAME (a synthetic task, see lcm.data.tasks)",
        ),
        "paths": ("", "a file, a glob (** goes through folders), or several separated by commas"),
        "field": ("text", "the key (jsonl) or column (parquet) that holds the text"),
        "tokenizer": (
            "bytes",
            "bytes, a Hugging Face tokenizer.json or a folder with one, a SentencePiece .model, or "
            "task:NAME (the words of a synthetic task)",
        ),
        "packing": (
            "concat",
            "how documents fill rows: concat (no padding), first_fit or best_fit (documents "
            "shorter than a row stay whole)",
        ),
        "packing_bins": (
            0,
            "rows that are packed and shuffled together; 0: as many as hold 262144 tokens, "
            "at least a batch",
        ),
        "heldout": (0.05, "share of the documents held out, chosen by a hash of their names"),
        "countdown": (False, "give each token the number of tokens its document still has to come"),
        "workers": (0, "processes that read and tokenize; 0: threads of this process"),
    }


def validate(data: Any) -> None:
    """Raises ConfigError for a value of `data` that no corpus could make work."""
    if not 0 <= data.heldout <= 1:
        raise ConfigError(f"data.heldout={data.heldout} is not a share: give a number from 0 to 1")
    if data.source.startswith("task:") and data.packing == "concat":
        raise ConfigError(
            f"data.packing=concat cuts examples of data.source={data.source} in two: "
            "set --config.data.packing=first_fit"
        )
    if data.source.startswith("task:") and data.paths:
        raise ConfigError(
            f"data.paths={data.paths!r} is set but data.source={data.source} reads no files: "
            "leave it empty"
        )
    if data.workers < 0:
        raise ConfigError(f"data.workers={data.workers} is negative: 0 reads in this process")
    if data.packing_bins < 0:
        raise ConfigError(
            f"data.packing_bins={data.packing_bins} is negative: 0 chooses a number of rows"
        )
