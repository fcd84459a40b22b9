"""Token ids into text while they are generated: exact, and a constant amount of work per token.

A token is a run of bytes, and a character may be spread over several tokens, so the text is what an
incremental UTF-8 decoder makes of the bytes: a character appears when its last byte does, never a
replacement character before its time, and the pieces joined are the decoding of all ids at once. (The ids
continue a prompt: the space that some tokenizers put before a word stays, where the decoding of a *first*
word would drop it.)

Stop strings may begin and end inside tokens. Text that could still become the beginning of one is held back:

    stop "END", tokens "a E", "N", "x":   push -> "a "   push -> ""   push -> "ENx"
    stop "END", tokens "a E", "N", "D":   push -> "a "   push -> ""   push -> ""      stopped = "END"
"""

import codecs
from collections.abc import Sequence
from typing import Protocol


class Pieces(Protocol):
    """What turning ids into text needs of a tokenizer; parallel.model.tokenizer.Tokenizer has it."""

    def is_special(self, id: int) -> bool:
        """Whether a token carries no text for a reader: end of turn, begin of sequence and so on."""
        ...

    def token_bytes(self, id: int) -> bytes:
        """The exact bytes of one token."""
        ...


class StopString:
    """Watches a text, character by character, for one string (Knuth, Morris, Pratt: SIAM J. Comput. 6(2)).

    `matched` is the length of the longest end of the text that begins the string: what has to be held back.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._fallback = self._borders(text)

    def advance(self, character: str) -> bool:
        """True when `character` completes the string."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        if self.text[self.matched] == character:
            self.matched += 1
        return self.matched == len(self.text)

    @staticmethod
    def _borders(text: str) -> list[int]:
        """For each prefix of `text`, the length of its longest proper prefix that is also its suffix."""
        borders = [0] * len(text)
        length = 0
        for end in range(1, len(text)):
            while length and text[length] != text[end]:
                length = borders[length - 1]
            length += text[length] == text[end]
            borders[end] = length
        return borders


class Detokenizer:
    """The text of one request, token by token.

    `stopped` is the stop string that ended the text, None so far. The first string to be *completed* ends
    it (of two that are completed by the same character the longer one); the text is cut before it, or after
    it with `include_stop`. Until `min_tokens` tokens are pushed no stop string counts.
    """

    def __init__(
        self,
        pieces: Pieces,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self.stopped: str | None = None
        self.num_tokens = 0
        self.num_characters = 0
        self._pieces = pieces
        self._watchers = [StopString(text) for text in sorted(stop, key=len, reverse=True)]
        self._include_stop = include_stop
        self._skip_special = skip_special
        self._min_tokens = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, id: int) -> str:
        """The text that is certain after token `id`; often empty. Nothing may be pushed after `stopped`."""
        assert self.stopped is None, f"token {id} pushed after the stop string {self.stopped!r}"
        self.num_tokens += 1
        if self._skip_special and self._pieces.is_special(id):
            return ""
        return self._release(self._decoder.decode(self._pieces.token_bytes(id)))

    def count(self) -> None:
        """Counts a token that ended the request and has no place in its text."""
        self.num_tokens += 1

    def finish(self) -> str:
        """The rest of the text when no token follows: what was held back, and half a character as U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, text: str) -> str:
        """Moves `text` behind what is held back; returns what can go out."""
        self.num_characters += len(text)
        if not self._watchers or self.num_tokens < self._min_tokens:
            return text
        start = len(self._held)
        self._held += text
        for position, character in enumerate(text, start):
            completed = [watcher for watcher in self._watchers if watcher.advance(character)]
            if completed:
                return self._cut(completed[0].text, position + 1)
        keep = len(self._held) - max(watcher.matched for watcher in self._watchers)
        text, self._held = self._held[:keep], self._held[keep:]
        return text

    def _cut(self, stop: str, end: int) -> str:
        self.stopped = stop
        text = self._held[: end if self._include_stop else end - len(stop)]
        self._held = ""
        return text


def printable(piece: bytes) -> str:
    """The bytes of one token as text for a reader; incomplete characters become U+FFFD."""
    return piece.decode("utf-8", "replace")


def escaped(piece: bytes) -> str:
    """The bytes of one token as text, or `bytes:\\xe2\\x82`: tokens that aren't UTF-8 stay different."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
