"""Numbers as people read them, and names as a line can show them."""

__all__ = ["counted", "human", "printable"]


def human(size: int) -> str:
    """Bytes with a binary unit, four digits."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if amount < 1024 or unit == "EiB":
            break
        amount /= 1024
    return f"{amount:.4g} {unit}"


def counted(count: int, thing: str) -> str:
    """``1 point``, ``2 points``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def printable(name: str) -> str:
    """A name somebody else chose: it neither ends the line nor moves the cursor."""
    return name if name.isprintable() else ascii(name)[1:-1]
