"""Pins: points that something outside of the repository stands on (docs/repository-format.md).

::

    pins/<32 hex>.json   {"v": 1, "point": "vm1/01HX...", "host": "hv1", "what": "/srv/ov/vm1"}

A lease says who is reading now and goes with its holder. An overlay stands on its point also while
nobody serves it, so its pin stays until the overlay is dropped. It is named by the overlay's id:
putting it again changes nothing.
"""

import errno as os_errno
import re
from dataclasses import dataclass

import msgspec

from nbdsrv.errors import RepositoryError
from nbdsrv.store.store import ObjectMissing, Store, Stored, StoreError

__all__ = ["PINS", "Pin", "pin_key", "pins", "put_pin"]

PINS = "pins/"
MAX_PIN = 1 << 16
"""Bytes of a pin."""

_NAME = re.compile(r"pins/[0-9a-f]{32}\.json")


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    v: int = 1
    point: str
    host: str = ""
    what: str = ""


@dataclass(frozen=True, slots=True)
class Pin:
    """One that stands.

    Attributes:
        key: of its object.
        point: ``group/ulid``.
        host: where what stands on it is; for people.
        what: the path of it there; for people.
    """

    key: str
    point: str
    host: str
    what: str

    def __str__(self) -> str:
        where = f" on {self.host}" if self.host else ""
        return f"overlay {self.what or self.key}{where}"


def pin_key(name: str) -> str:
    """Of the pin of an overlay; ``name`` is its id, 32 digits of hex."""
    return f"{PINS}{name}.json"


def put_pin(store: Store, name: str, point: str, host: str, what: str) -> None:
    """Pin a point. Blocking; to do so again changes nothing.

    Args:
        store: of the repository.
        name: the overlay's id.
        point: ``group/ulid``.
        host: where the overlay is.
        what: its path there.

    Raises:
        StoreError: it cannot be put.
    """
    data = msgspec.json.encode(_Record(point=point, host=host, what=what))
    try:
        if store.get(pin_key(name), MAX_PIN) == data:
            return  # opened again, perhaps over a repository that can only be read by now
    except ObjectMissing:
        pass
    store.put(pin_key(name), data)


def pins(store: Store, read: dict[Stored, Pin] | None = None) -> list[Pin]:
    """All of them. Blocking.

    Args:
        store: of the repository.
        read: those of earlier calls, by their row in the listing, which are not fetched again: an
            overlay's pin never comes to name another point. Is added to.

    Raises:
        RepositoryError: one makes no sense, and nobody knows which point it pins.
        StoreError: the store does not answer.
    """
    found = []
    for stored in store.list(PINS):
        if _NAME.fullmatch(stored.key) is None:
            continue  # somebody else's
        if read is not None and stored in read:
            found.append(read[stored])
            continue
        try:
            record = msgspec.json.decode(store.get(stored.key, MAX_PIN), type=_Record)
        except ObjectMissing:
            continue  # dropped meanwhile
        except StoreError as error:
            if error.errno != os_errno.EFBIG:
                raise
            raise _senseless(store, stored.key, "too long") from error
        except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            raise _senseless(store, stored.key, str(error)) from error
        if record.v != 1:
            raise RepositoryError(f"{store.name}: {stored.key}: use a newer nbdsrv")
        pin = Pin(stored.key, record.point, record.host, record.what)
        found.append(pin)
        if read is not None:
            read[stored] = pin
    return found


def _senseless(store: Store, key: str, why: str) -> RepositoryError:
    text = f"corrupt repository: {store.name}: {key}: {why}"
    return RepositoryError(f"{text}; it pins some point: open its overlay again, or delete it")
