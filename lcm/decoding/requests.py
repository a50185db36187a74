"""What is asked of the engine, and what it tells as it goes."""

import dataclasses
from typing import NamedTuple

import numpy as np

from lcm.decoding.settings import Sampling
from lcm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to go on with: token ids `[n]`, at least one, and how.

    stop: strings that end the text, whatever tokens they are spread over.
    """

    prompt: np.ndarray
    sampling: Sampling = Sampling()  # noqa: RUF009, frozen
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        prompt = np.asarray(self.prompt)
        if prompt.ndim != 1 or not len(prompt):
            raise UserError(
                f"a prompt of token ids has shape {prompt.shape}: give at least one token, such as "
                "the tokenizer's bos"
            )
        if not np.issubdtype(prompt.dtype, np.integer):
            raise UserError(f"a prompt of {prompt.dtype} must be one of token ids, whole numbers")
        object.__setattr__(self, "prompt", prompt.astype(np.int32))

    @property
    def tokens(self) -> int:
        """What its row comes to at the most."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def read(self) -> int:
        """Tokens to prefill: all but the last, which the first step reads."""
        return len(self.prompt) - 1


def check_ids(prompt: np.ndarray, vocab: int, name: str = "a prompt") -> None:
    """Refuses token ids that are not of the vocabulary."""
    least, most = prompt.min(), prompt.max()
    if least < 0 or most >= vocab:
        raise UserError(
            f"{name} has token {most if most >= vocab else least}: ids of this model are 0 to "
            f"{vocab - 1}"
        )


class Event(NamedTuple):
    """One token of a request.

    request: its number among those given.
    logprob, raw_logprob: as in `Drawn`.
    text: what can be shown now; a token may hold back text, or bring more than its own.
    finish: empty, or why it is the last: "stop" or "length".
    """

    request: int
    token: int
    logprob: float
    raw_logprob: float
    text: str
    finish: str
