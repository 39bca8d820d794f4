"""A peer's words, made fit to be shown.

Error texts and export descriptions are "suitable for direct display to a human being", says the
specification of an honest peer. A hostile one puts escape sequences for the terminal in them, or
a line break and a forged second line for the log.
"""

__all__ = ["displayed"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def displayed(data: bytes) -> str:
    """One line of printable text; whatever is neither UTF-8 nor printable is replaced."""
    text = data.decode(errors="replace")
    return "".join(char if char.isprintable() else REPLACEMENT for char in text)
