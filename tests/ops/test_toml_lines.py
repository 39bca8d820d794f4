"""Lines of keys: against documents whose writer knows where it put what, and against tomllib."""

import tomllib
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.ops.toml_lines import MAX_DEPTH, Path, key_lines

Value = Any


def paths(value: object, base: Path = ()) -> set[Path]:
    """Every place in what tomllib made of a document."""
    found = {base} if base else set()
    if isinstance(value, dict):
        for key, each in value.items():
            found |= paths(each, (*base, key))
    elif isinstance(value, list):
        for n, each in enumerate(value):
            found |= paths(each, (*base, n))
    return found


@dataclass
class Writer:
    """Writes a document in some of the many ways there are, and knows the lines."""

    draw: st.DrawFn
    text: str = ""
    lines: dict[Path, int] = field(default_factory=dict)

    def put(self, text: str) -> None:
        self.text += text

    def note(self, path: Path) -> None:
        self.lines.setdefault(path, self.text.count("\n") + 1)

    def choose(self, *options: str) -> str:
        return self.draw(st.sampled_from(options))

    def key(self, key: str) -> None:
        bare = key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
        if bare and self.draw(st.booleans()):
            self.put(key)
        elif "'" not in key and key.isprintable() and self.draw(st.booleans()):
            self.put(f"'{key}'")
        else:
            self.put(self.basic(key))

    @staticmethod
    def basic(text: str) -> str:
        return '"' + "".join(f"\\U{ord(c):08x}" if not c.isalnum() else c for c in text) + '"'

    def keys(self, path: Path) -> None:
        for n, key in enumerate(path):
            if n:
                self.put(self.choose(".", " . "))
            self.key(str(key))

    def gap(self) -> None:
        """Anything that may stand between values of an array."""
        self.put(self.choose("", " ", "\n", "\n  # [a] = {,\n", "\t"))

    def value(self, value: Value, path: Path, *, inline: bool = False) -> None:
        if isinstance(value, list):
            self.put("[")
            for n, each in enumerate(value):
                self.gap()
                self.note((*path, n))
                self.value(each, (*path, n), inline=inline)
                self.gap()
                last = n == len(value) - 1
                self.put("," if not last else self.choose("", ","))
            self.gap()
            self.put("]")
        elif isinstance(value, dict):
            self.put("{")
            for n, (key, each) in enumerate(value.items()):
                self.put(self.choose("", " ") + (", " if n else ""))
                self.note((*path, key))
                self.key(key)
                self.put(self.choose("=", " = "))
                self.value(each, (*path, key), inline=True)
            self.put("}")
        elif isinstance(value, str):
            self.string(value)
        else:
            self.put(str(value).lower() if isinstance(value, bool) else repr(value))

    def string(self, text: str) -> None:
        kind = self.choose("basic", "long", "literal")
        if kind == "long":
            self.put('"""' + self.choose("", "\n") + text.replace("\\", "\\\\").replace('"', '\\"'))
            self.put(self.choose("", '"', '""') + '"""')
        elif kind == "literal" and "'" not in text and "\n" not in text:
            self.put(f"'{text}'")
        else:
            self.put(self.basic(text))

    def pair(self, table: Path, name: Path, value: Value) -> None:
        self.put(self.choose("", " ", "\n", "# x = [\n"))
        for n in range(len(name)):
            self.note((*table, *name[: n + 1]))
        self.keys(name)
        self.put(self.choose("=", " = ", "\t=\t"))
        self.value(value, (*table, *name))
        self.put(self.choose("", " ", "  # [[no]]\n", ""))
        self.put("\n")


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=4)
STRINGS = st.text(st.sampled_from("ab\n#[]{}=.,'\" \\é"), max_size=8)
SCALARS = st.booleans() | st.integers(-99, 99) | STRINGS | st.floats(-9, 9)
VALUES = st.recursive(
    SCALARS,
    lambda each: st.lists(each, max_size=3) | st.dictionaries(NAMES, each, max_size=3),
    max_leaves=6,
)


@st.composite
def documents(draw: st.DrawFn) -> Writer:
    writer = Writer(draw)
    for key, value in draw(st.dictionaries(NAMES, VALUES, max_size=3)).items():
        writer.pair((), (f"t{key}",), value)
    if draw(st.booleans()):  # dotted keys make tables of their own
        writer.pair((), ("dotted", draw(NAMES), "z"), draw(VALUES))
    for n in range(draw(st.integers(0, 3))):
        writer.put(writer.choose("", "\n", "   "))
        writer.note(("array",))
        writer.note(("array", n))
        writer.put(writer.choose("[[", "[[ ") + writer.choose("array", '"array"') + "]]\n")
        for key, value in draw(st.dictionaries(NAMES, VALUES, max_size=3)).items():
            writer.pair(("array", n), (f"k{key}",), value)
        for m in range(draw(st.integers(0, 2))):
            writer.note(("array", n, "inner"))
            writer.note(("array", n, "inner", m))
            writer.put("[[array.inner]] # a comment\n")
            writer.pair(("array", n, "inner", m), ("x",), draw(VALUES))
    for name in draw(st.lists(NAMES, max_size=3, unique=True)):
        writer.note(("table",))
        writer.note(("table", name))
        writer.put("[ table . ")
        writer.key(name)
        writer.put(" ]\n")
        for key, value in draw(st.dictionaries(NAMES, VALUES, max_size=3)).items():
            writer.pair(("table", name), (key,), value)
    return writer


@given(documents(), st.booleans())
def test_every_key_has_the_line_it_was_written_on(writer: Writer, carriage: bool) -> None:
    text = writer.text.replace("\n", "\r\n") if carriage else writer.text
    parsed = tomllib.loads(text)
    found = key_lines(text)
    assert set(found) == paths(parsed)
    assert found == writer.lines


def test_the_picture_of_the_module() -> None:
    text = '[[export]]\nname = "vm1"\nallow = [\n  {uid = 1000},\n]\n'
    assert key_lines(text) == {
        ("export",): 1,
        ("export", 0): 1,
        ("export", 0, "name"): 2,
        ("export", 0, "allow"): 3,
        ("export", 0, "allow", 0): 4,
        ("export", 0, "allow", 0, "uid"): 4,
    }


def test_a_table_of_an_element_belongs_to_the_last_one() -> None:
    text = "[[a]]\n[[a]]\n[a.b]\nc = 1\n[[a.d]]\n[[a.d]]\n[a.d.e]\n"
    assert key_lines(text)["a", 1, "b", "c"] == 4
    assert key_lines(text)["a", 1, "d", 1, "e"] == 7
    assert set(key_lines(text)) == paths(tomllib.loads(text))


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "   # a"])
def test_nothing(text: str) -> None:
    assert key_lines(text) == {}


def test_depth_is_bounded() -> None:
    text = "a = " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
    with pytest.raises(RecursionError):
        key_lines(text)


@pytest.mark.parametrize("ending", ["", "\n"])
def test_a_string_that_looks_like_more(ending: str) -> None:
    text = 'a = \'\'\'\n[[b]]\nc = 1\n\'\'\'\nd = """x\\"""""\ne = 2'
    assert key_lines(text + ending) == {("a",): 1, ("d",): 5, ("e",): 6}
    assert set(tomllib.loads(text + ending)) == {"a", "d", "e"}
