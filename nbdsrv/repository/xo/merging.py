"""Merges that were interrupted, or are under way: two disks are becoming one.

::

    .20260101T020304Z.alias.vhd.merge.json      the parent is in the name
    {"chain": ["20260101T020304Z.alias.vhd",    the parent: takes what the others have
               "20260102T020304Z.alias.vhd"],   the target: what the parent is going to be
     "child": {"uuid": ...}, "parent": {"uuid": ...}, "step": "mergeBlocks", ...}

Block by block, the files of the others become the parent's. Until all is done

* the parent, and every other but the target, is neither what it was nor what it will be: refused;
* a block the target has not any more is the parent's, whatever the parent's table says;
* at the end the parent takes the target's unique id, then its name.

A state file nobody can read, or of the older kind without a chain, still says which disk is being
changed; the target is then the one that is made from it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from uuid import UUID

import msgspec

from nbdsrv.errors import CorruptImage
from nbdsrv.repository.xo.layout import merging_parent
from nbdsrv.repository.xo.remote import Remote
from nbdsrv.store.store import ObjectMissing
from nbdsrv.store.tree import Node

__all__ = ["Merge", "read_merges", "refused"]

MAX_STATE = 1 << 20
"""Bytes of a state file; they have some hundreds."""


@dataclass(frozen=True, slots=True)
class Merge:
    """One merge.

    Attributes:
        state: the path of its state file.
        parent: the path of the disk that takes the others' blocks.
        chain: the paths of all of them, the parent first, the target last; () if that is not said.
        target_id: the unique id of the target, or None.
    """

    state: str
    parent: str
    chain: tuple[str, ...]
    target_id: UUID | None

    @property
    def changing(self) -> tuple[str, ...]:
        """The paths of the disks whose content is not what it was."""
        return self.chain[:-1] or (self.parent,)


class _Identity(msgspec.Struct):
    uuid: str = ""


class _State(msgspec.Struct):
    chain: list[str] = []
    child: _Identity | None = None


def read_merges(remote: Remote, directory: str, nodes: Iterable[Node]) -> Mapping[str, Merge]:
    """The merges of a VDI's disks, by the parent's path. Blocking.

    Args:
        remote: the repository.
        directory: the VDI's.
        nodes: what is in it.

    Raises:
        StoreError: a state file cannot be read.
    """
    found: dict[str, Merge] = {}
    for node in nodes:
        name = merging_parent(node.name)
        if name is None or node.directory:
            continue
        path = f"{directory}/{name}"
        merge = _read(remote, f"{directory}/{node.name}", path)
        if merge is not None:
            found[path] = merge
    return found


def _read(remote: Remote, state: str, parent: str) -> Merge | None:
    try:
        said = msgspec.json.decode(remote.read(state, MAX_STATE), type=_State)
        chain = tuple(remote.beside(state, name) for name in said.chain)
        target = UUID(said.child.uuid) if said.child is not None and said.child.uuid else None
    except ObjectMissing:
        return None  # it has just ended
    except (CorruptImage, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        return Merge(state, parent, (), None)
    if len(chain) < 2 or chain[0] != parent:
        chain = ()
    return Merge(state, parent, chain, target)


def refused(merges: Mapping[str, Merge], path: str) -> Merge | None:
    """The merge because of which a disk is not a restore point any more."""
    return next((merge for merge in merges.values() if path in merge.changing), None)
