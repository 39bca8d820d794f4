"""Messages of our errors: one line, whatever names from inside an image are in them."""

import errno

import pytest

from nbdsrv.errors import MAX_TEXT, CorruptImage, DiskError


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "\x1b[31m", "a\u2028b", "x\r"])
def test_nothing_unprintable_reaches_a_terminal_or_a_log(name: str) -> None:
    text = str(CorruptImage(f"corrupt image: disk at 0: its parent's name is {name}"))
    assert text.isprintable()
    assert text.startswith("corrupt image: disk at 0: ")


def test_a_name_of_any_length_leaves_a_message_of_a_bounded_one() -> None:
    text = str(DiskError(f"/a/path: {'x' * 1_000_000} (the parent of /another/path)"))
    assert len(text) < MAX_TEXT
    assert text.startswith("/a/path: xxx")
    assert text.endswith("(the parent of /another/path)")


def test_a_usual_message_is_left_as_it_is() -> None:
    text = "/srv/Bücher/Platte 1.img: No such file or directory"
    assert text == str(DiskError(text, errno.ENOENT))
