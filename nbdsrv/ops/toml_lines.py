"""On which line of a TOML document each key stands.

::

    1  [[export]]                      ("export",) 1   ("export", 0) 1
    2  name = "vm1"                    ("export", 0, "name") 2
    3  allow = [                       ("export", 0, "allow") 3
    4    {uid = 1000},                 ("export", 0, "allow", 0) 4   (..., 0, "uid") 4

``tomllib`` tells the line of what is no TOML; for what is TOML and makes no sense to us, it does
not. This reads a document that ``tomllib`` has accepted, and so can be short: it knows where keys
and values end, and leaves to ``tomllib`` what they mean. Key strings are the exception.
"""

import re
import tomllib
from bisect import bisect_right

__all__ = ["Path", "key_lines"]

Path = tuple[str | int, ...]
"""Keys, and positions in arrays, from the top."""

MAX_DEPTH = 100
"""Values within values. ``tomllib`` gives up on deeper ones, too."""

_BLANK = re.compile(r"[ \t]*")
_SPACE = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_PLAIN = re.compile(r"[^,\]}#\n]*")


def key_lines(text: str) -> dict[Path, int]:
    """The line, from 1, of each key, table and array element of a valid document.

    A table that is only implied by another's name has the line of that; one that is given in
    several places, the first.

    Raises:
        RecursionError: values are nested deeper than ``MAX_DEPTH``.
    """
    return _Scanner(text.replace("\r\n", "\n")).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self._lines: dict[Path, int] = {}
        self._elements: dict[Path, int] = {}
        self._depth = 0

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        while True:
            self._skip(_SPACE)
            if self._at >= len(self._text):
                return self._lines
            if self._text.startswith("[", self._at):
                table = self._header()
            else:
                self._pair(table)

    def _header(self) -> Path:
        """``[a.b]`` or ``[[a.b]]``; the table that the following keys belong to."""
        line = self._line()
        array = self._text.startswith("[[", self._at)
        self._at += 2 if array else 1
        path: Path = ()
        keys = self._key()
        for number, key in enumerate(keys):
            path += (key,)
            self._note(path, line)
            if array and number == len(keys) - 1:
                position = self._elements.get(path, 0)
                self._elements[path] = position + 1
                path += (position,)
            elif path in self._elements:
                path += (self._elements[path] - 1,)
        self._note(path, line)
        self._at += 2 if array else 1
        return path

    def _pair(self, table: Path) -> None:
        line = self._line()
        path = table
        for key in self._key():
            path += (key,)
            self._note(path, line)
        self._at += 1  # the equals sign
        self._value(path)

    def _key(self) -> list[str]:
        """A dotted key; stops behind it, at the next thing that is no blank."""
        keys = []
        while True:
            self._skip(_BLANK)
            if match := _BARE.match(self._text, self._at):
                keys.append(match[0])
            else:
                match = _STRING.match(self._text, self._at)
                assert match is not None, "no valid TOML"
                keys.append(str(tomllib.loads(f"x = {match[0]}")["x"]))
            self._at = match.end()
            self._skip(_BLANK)
            if not self._text.startswith(".", self._at):
                return keys
            self._at += 1

    def _value(self, path: Path) -> None:
        self._skip(_BLANK)
        opening = self._text[self._at : self._at + 1]
        if opening and opening in "[{":
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise RecursionError("values are nested too deep")
            self._at += 1
            self._members(path, "]" if opening == "[" else "}")
            self._depth -= 1
        elif match := _STRING.match(self._text, self._at):
            self._at = match.end()
        else:
            self._skip(_PLAIN)

    def _members(self, path: Path, closing: str) -> None:
        position = 0
        while True:
            self._skip(_SPACE)
            if self._text.startswith(closing, self._at):
                self._at += 1
                return
            if closing == "]":
                self._note((*path, position), self._line())
                self._value((*path, position))
                position += 1
            else:
                self._pair(path)
            self._skip(_SPACE)
            if self._text.startswith(",", self._at):
                self._at += 1

    def _note(self, path: Path, line: int) -> None:
        self._lines.setdefault(path, line)

    def _line(self) -> int:
        return bisect_right(self._ends, self._at - 1) + 1

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
