"""A stream of tokens to a stream of text, up to the first stop string."""

import codecs
from collections.abc import Sequence

from lcm.data.tokenizers import Tokenizer
from lcm.errors import UserError


class TextStream:
    """Text that is safe to show, token by token: none of it is ever taken back.

    The parts put together are `tokenizer.decode` of all tokens, cut where the first stop string
    begins: the one that begins first, whatever tokens it is spread over and whichever is complete
    first. Bytes that are no UTF-8 become U+FFFD as by Python's `errors="replace"`.

    Held back are the beginnings of characters and of stop strings, and a blank at either end, which
    some tokenizers drop from a whole text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop:
            raise UserError("a stop string is empty and would end every text: leave it out")
        self.stopped = False  # a stop string was found: further tokens add nothing
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._blanks: bytes | None = b""  # those before the text; None once it has begun
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token: int) -> str:
        """The text that can be shown now that `token` is there."""
        if self.stopped:
            return ""
        self._ids.append(int(token))
        self._held += self._utf8.decode(self._added(int(token)))
        begun = self._begun()
        if self._cut(begun):
            return self._show(len(self._held))
        return self._show(min(begun, len(self._held.removesuffix(" "))))

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        if self.stopped:
            return ""
        if self._blanks is not None:
            self._held = self._tokenizer.decode(self._ids)
        self._held += self._utf8.decode(b"", final=True)
        if not self._cut(len(self._held)) and self._held.endswith(" "):
            self._held = self._held[: -1 if self._drops_last() else None]
        return self._show(len(self._held))

    def _show(self, end: int) -> str:
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def _added(self, token: int) -> bytes:
        """What the last token adds to the text; at its beginning, as many blanks as `decode`."""
        added = self._tokenizer.token_bytes(token)
        if self._blanks is None:
            return added
        self._blanks += added
        if not (text := self._blanks.lstrip(b" ")):
            return b""
        decoded = self._tokenizer.decode(self._ids)
        self._blanks = None
        return b" " * (len(decoded) - len(decoded.lstrip(" "))) + text

    def _begun(self) -> int:
        """Where what may become a stop string begins; the end of the text if nothing may."""
        size = len(self._held)
        first = size - max(map(len, self._stop), default=1) + 1
        places = range(max(0, first), size)
        return next((i for i in places if self._opens(self._held[i:])), size)

    def _opens(self, text: str) -> bool:
        return any(len(text) < len(stop) and stop.startswith(text) for stop in self._stop)

    def _cut(self, before: int) -> bool:
        """Cuts the text at the first stop string, if it is there and none may begin `before` it."""
        found = [at for stop in self._stop if 0 <= (at := self._held.find(stop)) <= before]
        if found:
            self._held, self.stopped = self._held[: min(found)], True
        return self.stopped

    def _drops_last(self) -> bool:
        return not self._tokenizer.decode(self._ids).endswith(" ")
