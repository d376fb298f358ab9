"""Tokens to text as they come, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moepp_jax.data import Tokenizer
from moepp_jax.errors import ConfigError

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a byte is shown as that is no whole character
_LONGEST = 3  # bytes of a character that lacks its last one
_WINDOW = 8  # tokens of the prompt, enough to know how the next one reads


class Reader:
    """The text of one sequence, token by token; to be watched by `Generator`.

    A character may come in several tokens of a byte each, and a stop string in any number of them:
    what is handed out is text that no later token changes.

    Attributes:
      text: so far, without what may still change.
      ended: a stop string came; it is not in the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[Any] = ()):
        """
        Args:
          prompt: what the text continues. Some tokenizers drop a space where a text begins, so it
            matters that this one does not begin here.
          stop: strings that end the text.
        """
        self._decode = tokenizer.decode
        self._stop = checked_stops(stop)
        # Tokens whose text is settled, then those that may still change it.
        self._before, self._new = self._context(prompt), []
        self._settled = ""
        self._handed_out = 0
        self.text = ""
        self.ended = False

    def __call__(self, token: int) -> bool:
        """Reads a token; true if it ends the text."""
        self._new.append(token)
        text = self._text_of_new()
        broken = len(text) - len(text.rstrip(_BROKEN))
        if broken:
            self._read(self._settled + text[: len(text) - min(broken, _LONGEST)])
        else:
            self._settled += text
            self._read(self._settled)
            if self._decode(self._new):
                self._before = self._new
            else:
                self._before += self._new
            self._new = []
        return self.ended

    def close(self) -> None:
        """No token will come: what was held back is text."""
        if not self.ended:
            self._read(self._settled + self._text_of_new(), last=True)

    def finished(self) -> str:
        """The whole text, where no token will come."""
        self.close()
        return self.text

    def take(self) -> str:
        """The text since the last call."""
        piece = self.text[self._handed_out :]
        self._handed_out = len(self.text)
        return piece

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, from the beginning of a character on."""
        size = _WINDOW
        while size < len(prompt) and self._decode(prompt[-size:]).startswith(_BROKEN):
            size *= 2
        return list(prompt[-size:])

    def _text_of_new(self) -> str:
        before, whole = self._decode(self._before), self._decode(self._before + self._new)
        if whole.startswith(before) or before.endswith(_BROKEN):
            return whole[len(before) :]
        # Some decoders show a run of bytes as broken while any of its characters is not complete.
        return self._decode(self._new)

    def _read(self, whole: str, last: bool = False) -> None:
        longest = max(map(len, self._stop), default=0)
        # An earlier place was looked at when its text was settled.
        since = max(0, len(self.text) - longest)
        places = [at for s in self._stop if (at := whole.find(s, since)) >= 0]
        if places:
            self.text, self.ended = whole[: min(places)], True
        else:
            sure = len(whole) - (0 if last else _beginning(whole, self._stop))
            # More may be held back than last time; what was handed out stands.
            if sure > len(self.text):
                self.text = whole[:sure]


def checked_stops(stop: Sequence[Any]) -> tuple[str, ...]:
    """
    Raises:
      ConfigError: a stop string is empty or no string.
    """
    for s in stop:
        if not isinstance(s, str) or not s:
            raise ConfigError(f"stop = {s!r} must be a text of at least one character")
    return tuple(stop)


def _beginning(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    begun = (s[:n] for s in stops for n in range(1, len(s)))
    return max((len(s) for s in begun if text.endswith(s)), default=0)
