"""A disk and its parents, each proven to be what its child was made from.

::

    20260103.. ── parent_unicode_name, parent_unique_id ──> 20260102.. ──> 20260101..
    newest                                                                 oldest, not differencing

Rules:

* A point's metadata says which id its disk has: the snapshot's.
* The id in the child's header is the one in the parent's footer, or nothing is served. The only
  exception is a parent that has just become its child in a merge, and the merge's state says so.
* Names are relative to the directory of the disk that names them, not to where its data is.
* ``isVhdDifferencing`` of the point's metadata is not looked at: merges make it wrong.
"""

import errno as os_errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.repository.xo.disk_file import DiskFile, open_disk_file
from nbdsrv.repository.xo.merging import Merge, refused
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.store.store import ObjectMissing

__all__ = [
    "MAX_CHAIN",
    "Chain",
    "Opener",
    "check_identity",
    "check_link",
    "open_chain",
    "refuse_merging",
]

MAX_CHAIN = 512
"""Disks in a chain; retention and full backups keep it to some dozens."""

Merges = Mapping[str, Merge]
Opener = Callable[[str], DiskFile]
"""From a disk's path to the disk, open; raises DiskError."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Open disks, the newest first.

    Attributes:
        files: each made from the one behind it.
        falls_to: of a disk that is being merged, by its number: the number of the disk that has
            the blocks it has lost.
    """

    files: tuple[DiskFile, ...]
    falls_to: Mapping[int, int]

    def close(self) -> None:
        """Close all files; idempotent."""
        for file in self.files:
            file.close()


def refuse_merging(remote: Remote, merges: Merges, path: str) -> None:
    """Raises CorruptImage if the disk is just being made into another."""
    merge = refused(merges, path)
    if merge is not None:
        text = f"corrupt image: {remote.full(path)} at 0: it is being merged with the next point"
        state = remote.full(merge.state)
        raise CorruptImage(f"{text} and is no restore point any more; {state} says so")


def open_chain(
    remote: Remote,
    path: str,
    merges: Merges,
    snapshot: str = "",
    opener: Opener | None = None,
) -> Chain:
    """Open a disk and all its parents. Blocking.

    Args:
        remote: the repository.
        path: of the disk.
        merges: of its directory.
        snapshot: the disk's id, as ``check_identity`` takes it.
        opener: instead of ``open_disk_file``.

    Raises:
        CorruptImage: one of them is missing, damaged, not the right one, or being merged.
        UnsupportedImage: it is too long, or mixes sizes of blocks.
        StoreError: one cannot be read.
    """
    refuse_merging(remote, merges, path)
    opener = opener or partial(open_disk_file, remote)
    files: list[DiskFile] = []
    falls_to: dict[int, int] = {}
    try:
        files.append(opener(path))
        check_identity(files[0], snapshot)
        while files[-1].differencing:
            child = files[-1]
            where = _parent_path(remote, child, files)
            parent = _open_parent(remote, child, where, opener)
            files.append(parent)
            check_link(child, parent, merges)
            if where in merges:
                falls_to |= _falling(files, merges[where])
            _check_blocks(files[0], parent)
    except ObjectMissing as error:
        _close(files)
        raise CorruptImage(f"corrupt image: {remote.full(path)} at 0: is missing") from error
    except BaseException:
        _close(files)
        raise
    return Chain(tuple(files), falls_to)


def check_identity(file: DiskFile, snapshot: str) -> None:
    """Raises CorruptImage if a point's disk is another than its metadata says.

    Args:
        file: under the name the metadata gives.
        snapshot: the id the metadata gives; nothing is proven if it is none.
    """
    try:
        wanted = UUID(snapshot)
    except ValueError:
        return
    if file.unique_id != wanted:
        text = f"it is {file.unique_id}, and the point's disk is {wanted}"
        raise file.corrupt(f"{text}: another disk is under its name")


def check_link(child: DiskFile, parent: DiskFile, merges: Merges) -> None:
    """Raises CorruptImage unless the parent is what the child was made from."""
    wanted, found = child.header.parent_id, parent.unique_id
    if found == wanted:
        return
    merge = merges.get(parent.path)
    if merge is not None and found in {child.unique_id, merge.target_id} - {None}:
        return  # the merge is all but done
    text = f"its parent {parent.name} is {found}, and it was made from {wanted}"
    raise child.corrupt(f"{text}: another disk is under the parent's name")


def _parent_path(remote: Remote, child: DiskFile, files: list[DiskFile]) -> str:
    where = child.parent(remote)
    if any(where == file.path for file in files):
        raise child.corrupt(f"its parent {remote.full(where)} is made from it: a loop")
    if len(files) >= MAX_CHAIN:
        raise UnsupportedImage(f"{files[0].name}: more than {MAX_CHAIN} disks in a chain")
    return where


def _open_parent(remote: Remote, child: DiskFile, where: str, opener: Opener) -> DiskFile:
    try:
        return opener(where)
    except ObjectMissing as error:
        raise child.corrupt(f"its parent {remote.full(where)} is missing") from error
    except DiskError as error:
        if error.errno in {os_errno.EMFILE, os_errno.ENFILE}:
            raise
        raise type(error)(f"{error} (the parent of {child.name})", error.errno) from error


def _check_blocks(top: DiskFile, parent: DiskFile) -> None:
    ours, theirs = top.header.block_size, parent.header.block_size
    if ours != theirs:
        text = f"blocks of {ours} bytes, but its parent {parent.name} has {theirs}"
        raise UnsupportedImage(f"{top.name}: {text}; such chains are not read")


def _falling(files: list[DiskFile], merge: Merge) -> dict[int, int]:
    """Which disks above the last one, the merge's parent, give their blocks away to it."""
    last = len(files) - 1
    if not merge.chain:
        return {last - 1: last}
    giving = frozenset(merge.chain[1:])
    return {number: last for number in range(last) if files[number].path in giving}


def _close(files: list[DiskFile]) -> None:
    for file in files:
        file.close()
