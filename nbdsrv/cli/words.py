"""Numbers as people read them."""

__all__ = ["counted", "human"]


def human(size: int) -> str:
    """Bytes with a binary unit, four digits."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if amount < 1024 or unit == "PiB":
            break
        amount /= 1024
    return f"{amount:.4g} {unit}"


def counted(count: int, thing: str) -> str:
    """``1 point``, ``2 points``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
