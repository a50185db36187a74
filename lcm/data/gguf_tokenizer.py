"""The tokenizer in the metadata of a GGUF file, as a tokenizer of the `tokenizers` package.

A GGUF file has the vocabulary, its merges or scores, the kind of each token, and the *name* of the
way in which text is split before merging; the splits themselves are facts published in the
`tokenizer.json` of the models (and listed in llama.cpp, src/llama-vocab.cpp).
"""

from typing import Any

from lcm.data import gguf
from lcm.errors import DataError

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6  # kinds of tokens that are no plain text

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_SHORT}|{_WORD}{_UPPER}+{_LOWER}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_GPT2, _DIGITS = "gpt2", "digits"  # the splits that the tokenizers package has by itself

# What `tokenizer.ggml.pre` calls a split, by the split. Files older than the key have none, and
# those whose converter did not know the model have "default": GPT-2's split was the usual one.
_SPLITS = {
    (_GPT2,): ("default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2", "trillion"),
    (_DIGITS, _GPT2): (
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    (_LLAMA3,): ("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe", "pixtral"),
    (_QWEN2,): ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"),
    (_TEKKEN,): ("tekken",),
    (_GPT4O,): ("gpt-4o", "llama4"),
    (_BLOOM,): ("bloom", "poro-chat", "gpt3-finnish"),
}
SPLITS = {name: parts for parts, names in _SPLITS.items() for name in names}
# Their tokenizer.json composes characters first (NFC).
_COMPOSED = {"qwen2", "deepseek-r1-qwen", "mpt", "olmo", "command-r"}
# A word that is in the vocabulary is one token, whatever the merges; and a text begins with <bos>.
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}
_BEGUN = {"llama-bpe", "llama3", "llama-v3", "tekken"}


def build(header: gguf.Header) -> tuple[Any, dict[str, Any]]:
    """The `tokenizers.Tokenizer` of a file, and its `bos`, `eos`, `add_bos` and `stops`.

    Raises DataError for kinds of vocabularies and splits that are not known.
    """
    kind = header.need("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise DataError(
            f"{header.path} has a tokenizer of kind {kind!r}, and 'gpt2' and 'llama' are known: "
            "put the model's tokenizer.json beside the file"
        )
    tokens = header.need("tokenizer.ggml.tokens")
    for key in ("token_type", "scores"):
        if len(header.metadata.get(f"tokenizer.ggml.{key}", tokens)) != len(tokens):
            raise DataError(
                f"{header.path} has {len(tokens)} tokens and not as many tokenizer.ggml.{key}: "
                "convert the model to GGUF again"
            )
    tokenizer = (_byte_level if kind == "gpt2" else _sentencepiece)(header, tokens)
    _add_tokens(tokenizer, header, tokens, spaced=kind == "llama")
    ids = _special(header, kind, len(tokens))
    if ids["add_bos"]:
        _begin(tokenizer, tokens[ids["bos"]], ids["bos"])
    return tokenizer, ids


def _special(header: gguf.Header, kind: str, size: int) -> dict[str, Any]:
    """First and last token and what else ends a text; without a first token the last serves."""

    def token(name: str) -> int | None:
        number = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return number if number is not None and 0 <= number < size else None

    eos = token("eos")
    if eos is None:
        raise DataError(
            f"{header.path} has no token for the end of a document (tokenizer.ggml.eos_token_id): "
            "convert the model to GGUF again"
        )
    bos = token("bos")
    begun = kind == "llama" or header.metadata.get("tokenizer.ggml.pre") in _BEGUN
    return {
        "bos": eos if bos is None else bos,
        "eos": eos,
        "add_bos": bos is not None and header.metadata.get("tokenizer.ggml.add_bos_token", begun),
        "stops": [other for name in ("eot", "eom") if (other := token(name)) is not None],
    }


def _byte_level(header: gguf.Header, tokens: list[str]) -> Any:
    """GPT-2's kind: merges of the bytes of words, written in 256 characters that print."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import ByteLevel as Offsets

    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise DataError(
            f"{header.path} splits text as {name!r} (tokenizer.ggml.pre), and known are "
            f"{', '.join(sorted(SPLITS))}: put the model's tokenizer.json beside the file"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in header.need("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=name in _WHOLE_WORDS)
    except Exception as error:  # the package raises nothing narrower
        raise DataError(
            f"{header.path} has merges that do not fit its tokens ({error}): convert it again"
        ) from None
    tokenizer = Tokenizer(model)
    if name in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    steps = []
    for part in SPLITS[name]:
        if part == _DIGITS:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif part != _GPT2:
            steps.append(pre_tokenizers.Split(Regex(part), "isolated"))
    by_itself = SPLITS[name][-1] == _GPT2
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_itself))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = Offsets(trim_offsets=False)
    return tokenizer


def _sentencepiece(header: gguf.Header, tokens: list[str]) -> Any:
    """SentencePiece's BPE: of the neighbours in a text, those of the highest score merge first.

    Blanks are written U+2581, one is put before a text, and characters that are no token are the
    bytes `<0xNN>` (Kudo and Richardson, 2018, arXiv:1808.06226).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    kinds = header.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    spelled = [token.replace(" ", "\u2581") if not token.strip(" ") else token for token in tokens]
    vocabulary = {token: index for index, token in enumerate(spelled)}
    scores = header.metadata.get("tokenizer.ggml.scores", [0.0] * len(tokens))
    if header.metadata.get("general.architecture", "").startswith("gemma"):
        scores = [0.0] * len(tokens)  # there the order of the tokens is that of merging
    unknown = next(
        (token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None
    )
    model = models.BPE(
        vocabulary,
        _merges(spelled, scores, kinds, vocabulary),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=_BYTE in kinds,
    )
    tokenizer = Tokenizer(model)
    blanks = normalizers.Replace(" ", "\u2581")
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if header.metadata.get("tokenizer.ggml.add_space_prefix", True):
        blanks = normalizers.Sequence([normalizers.Prepend("\u2581"), blanks])
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = blanks
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _merges(
    tokens: list[str], scores: list[float], kinds: list[int], vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """Every way of making a token of two others, the token of the highest score first.

    Ways to one token are in the order of the ids of their halves, as in published conversions.
    """
    order = sorted(range(len(tokens)), key=lambda index: (-scores[index], index))
    found = []
    for index in order:
        token = tokens[index]
        if kinds[index] in (_UNKNOWN, _CONTROL, _BYTE):
            continue
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        found += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return found


def _add_tokens(tokenizer: Any, header: gguf.Header, tokens: list[str], spaced: bool) -> None:
    """Tokens that are found whole in a text: control tokens, and those the makers added."""
    from tokenizers import AddedToken

    kinds = header.metadata.get("tokenizer.ggml.token_type", [])
    special, whole = [], []
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER and not (spaced and not token.strip(" \u2581")):
            whole.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(whole)


def _begin(tokenizer: Any, token: str, number: int) -> None:
    """Has the tokenizer put <bos> before a text where it is asked for special tokens."""
    from tokenizers.processors import Sequence, TemplateProcessing

    begun = TemplateProcessing([token, "$A"], [token, "$A", token, "$B"], [(token, number)])
    before = tokenizer.post_processor
    tokenizer.post_processor = Sequence([before, begun]) if before else begun
