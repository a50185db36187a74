"""The seam between a file format and the families of models."""

from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """A pretrained model at rest: what its `config.json` says, and its tensors by their names.

    Names, shapes and the keys of the config are those of Hugging Face checkpoints, whatever the
    file is.
    """

    @property
    def config(self) -> dict[str, Any]:
        """The content of a `config.json`."""

    def names(self) -> tuple[str, ...]:
        """Every tensor there is."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored: float32, float16 or bfloat16 (of ml_dtypes).

        Raises:
            CheckpointError: naming the tensor and its file, if it cannot be read.
        """
