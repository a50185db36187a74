"""A GGUF file as a `Source`: its metadata as a `config.json`, its tensors by Hugging Face names.

Tensors are dequantised by the `gguf` package, one when it is asked for.
"""

import functools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lcm.data import gguf as header
from lcm.errors import CheckpointError
from lcm.pretrained.gguf_families import ARCHITECTURES, Architecture, Metadata

_MISSING = "a GGUF file needs gguf: pip install 'lcm[pretrained]'"
_F32, _F16, _BF16 = 0, 1, 30  # ids of the types that are no quantisation


class Gguf:
    """The `Source` of a GGUF file; `.header` has its metadata.

    Raises:
        DataError: if the file is not whole, or no GGUF.
        CheckpointError: for architectures and types of tensors that are not known.
    """

    def __init__(self, path: str | Path):
        self.header = header.read(path)
        name = self.header.need("general.architecture")
        if name not in ARCHITECTURES:
            raise CheckpointError(
                f"{path} is of architecture {name}, and {', '.join(ARCHITECTURES)} are known: "
                "convert a model of one of these"
            )
        self._architecture: Architecture = ARCHITECTURES[name]
        self._tensors = {}
        for stored, info in self.header.tensors.items():
            self._check(stored, info)
            if found := self._architecture.name(stored):
                self._tensors[found] = stored
        self.config: dict[str, Any] = self._config(name)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.header.tensors[self._tensors[name]].shape

    def read(self, name: str) -> np.ndarray:
        return self._architecture.restore(self._stored(self._tensors[name]), name, self.config)

    def _stored(self, name: str) -> np.ndarray:
        """A tensor as the file has it, quantised ones as float32."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        info = self.header.tensors[name]
        start, size = info.start, _bytes(info)
        # Read, not taken from the map: pages of a map that have been looked at stay in memory.
        data = np.fromfile(self.header.path, np.uint8, size, offset=start)
        if info.type in (_F32, _F16, _BF16):
            dtype = {_F32: "<f4", _F16: "<f2", _BF16: ml_dtypes.bfloat16}[info.type]
            return data.view(dtype).reshape(info.shape)
        kind = GGMLQuantizationType(info.type)
        blocks = size // GGML_QUANT_SIZES[kind][1]
        # The package works through sixteen rows at a time. Blocks do not depend on each other, and
        # rows of more of them than a matrix has take half the time.
        width = max(n for n in range(1, 257) if blocks % n == 0)
        return dequantize(data.reshape(blocks // width, -1), kind).reshape(info.shape)

    def _check(self, name: str, info: header.TensorInfo) -> None:
        """Refuses a tensor that cannot be read, before any is."""
        if info.type not in readable():
            raise CheckpointError(
                f"tensor {name} of {self.header.path} is of type {_type_name(info.type)}, and "
                f"{', '.join(readable().values())} are known: take another quantisation"
            )
        if (end := info.start + _bytes(info)) > len(self.header.data):
            raise CheckpointError(
                f"tensor {name} of {self.header.path} ends at byte {end}, the file at "
                f"{len(self.header.data)}: it is cut short, fetch it again"
            )

    def _config(self, name: str) -> dict[str, Any]:
        metadata = Metadata(self.header, name)
        config = self._architecture.config(metadata)
        tokens = {
            f"{key}_token_id": self.header.metadata[f"tokenizer.ggml.{key}_token_id"]
            for key in ("bos", "eos")
            if f"tokenizer.ggml.{key}_token_id" in self.header.metadata
        }
        named = self.header.metadata.get("general.name")
        return config | tokens | ({"_name_or_path": named} if named else {})


@functools.cache
def readable() -> dict[int, str]:
    """Names by id of the types of tensors that can be read: what the package dequantises."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(_MISSING) from error
    found = {}
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        found[int(kind)] = kind.name
    return found


def _type_name(kind: int) -> str:
    from gguf import GGMLQuantizationType

    known = {int(member): member.name for member in GGMLQuantizationType}
    return known.get(kind, f"{kind}, of no known name")


def _bytes(info: header.TensorInfo) -> int:
    """Bytes of a tensor: rows are of whole blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(info.type)]
    return -(-info.size // block) * size
