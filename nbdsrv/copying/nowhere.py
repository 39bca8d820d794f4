"""Writing to nowhere: what is left of a copy is that everything could be read.

::

    nbdsrv copy SOURCE null:       how fast is the source, and is every byte of it readable?
"""

from nbdsrv.formats.writer import ImageWriter, Plan

__all__ = ["NullWriter"]


class NullWriter(ImageWriter):
    """Takes everything, in any order, and keeps nothing."""

    ordered = False
    seekable = False  # nobody needs to look for zeroes in what is thrown away

    async def open(self, size: int) -> None:
        """Any size."""

    async def begin(self, plan: Plan) -> None:
        """Nothing has to be made."""

    async def data(self, offset: int, data: memoryview) -> None:
        """Forgotten."""

    async def zero(self, offset: int, length: int) -> None:
        """Forgotten."""

    async def finish(self) -> None:
        """Nothing is left to do."""

    async def abort(self) -> None:
        """Nothing is there to be undone."""
