"""A conversation: one text that grows, of which only what is new is read."""

from collections.abc import Iterator

import jax
import numpy as np

from lcm.decoding.engine import Batch, Engine
from lcm.decoding.requests import Event, Request
from lcm.models import State


class Session:
    """One row of an engine that remembers what it has read and written.

    A request whose prompt begins as the text so far goes on from there; another one begins anew
    where they part.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tokens = np.zeros(0, np.int32)
        self._state: State | None = None

    def run(self, request: Request) -> Iterator[Event]:
        """The tokens of a request, as they come; leaving off in the middle is no harm.

        Raises:
            UserError: for a request that the model has no room for.
        """
        batch = Batch(self._engine, [request], self._begun(request))
        written: list[int] = []
        try:
            while batch.busy:
                batch.read()
                for event in batch.write():
                    written.append(event.token)
                    yield event
        finally:
            # The last token has been drawn, and read by no layer.
            self._tokens = np.concatenate([request.prompt, np.array(written[:-1], np.int32)])
            self._state = batch.state if written and _whole(batch.state) else None

    def _begun(self, request: Request) -> tuple[State, int] | None:
        """The state so far, and how many tokens of the prompt it has read."""
        if self._state is None or self._engine.cache == "paged":
            return None
        size = min(len(self._tokens), request.read)
        same = self._tokens[:size] == request.prompt[:size]
        count = int(np.argmin(same)) if not same.all() else size
        # What it has read may be more than has been told, where it was interrupted.
        if count < int(self._state.used_B[0]) and not self._engine.whole:
            return None
        return self._state, count


def _whole(state: State) -> bool:
    """Whether it is there: a step that is interrupted has given it away and not brought another."""
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
