"""Reads a borg repository, as a program of its own: run by the interpreter that borg runs on.

::

    nbdsrv ── stdin ──>  | header length 4 | body length 4 | JSON | body |   requests, one at a time
           <── stdout ── | the same                                      |   one answer to each

    hello     {version, path, passphrase}   ->  {version, borg, id, encryption}
    archives  {}                            ->  {transaction, archives: [{name, id, time, ...}]}
    files     {archive, least, most, asked} ->  {files: [{path, size, chunks, modified}], complete}
    chunks    {archive, path, first, count} ->  {size, count}, body: count x (id 32 | size 4)
    zeroes    {sizes}                       ->  body: an id for each size
    get       {id}                          ->  body: the chunk, proven by borg
    raw       {id}                          ->  {length}: its CRC is right

Rule: this file imports nothing but the standard library and borg, so that any interpreter runs it.
Nothing is written: no lock is taken, and where borg would mend an index (replaying what was
committed after it was written) that is done in memory.
"""

# mypy: disable-error-code="import-not-found, import-untyped, misc"
# borg has no types, and is where it is: in another interpreter.

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import stat
import struct
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator

    Answer = tuple[dict[str, Any], bytes]

VERSION = 1
FRAME = struct.Struct(">II")
MAX_HEADER = 16 << 20
MAX_BODY = 64 << 20
MAX_REQUEST = 1 << 20
MAX_NAME = 4096
ITEM_CHUNK = struct.Struct(">32sI")
MAX_COUNT = 1 << 20
KEPT_ITEMS = 4
MAX_INDEX = 1 << 30
"""Bytes of borg's index, which it keeps in memory: 20 million chunks."""
MAX_MEMORY = 4 << 30
"""Bytes of addresses: what a forged chunk expands to ends here."""


class Refusal(Exception):
    """An answer of the kind ``error``."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def read_exactly(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) != length:
        raise EOFError
    return data


def read_request(file: BinaryIO) -> dict[str, Any]:
    head, body = FRAME.unpack(read_exactly(file, FRAME.size))
    if head > MAX_REQUEST or body:
        raise EOFError
    request: dict[str, Any] = json.loads(read_exactly(file, head))
    return request


def write_answer(file: BinaryIO, header: dict[str, Any], body: bytes = b"") -> None:
    head = json.dumps(header).encode("utf-8", "surrogateescape")
    if len(head) > MAX_HEADER or len(body) > MAX_BODY:
        head = json.dumps({"error": "corrupt", "text": "an answer that is too long"}).encode()
        body = b""
    file.write(FRAME.pack(len(head), len(body)))
    file.write(head)
    file.write(body)
    file.flush()


def readable(text: str) -> str:
    """A name with bytes that are no UTF-8 made visible."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_only(base: Any, borg_index: Any, damage: Any, integrity_error: Any) -> Any:
    """Repository of borg without everything that would change one."""

    class ReadOnly(base):
        def prepare_txn(self, *args: Any, **kwargs: Any) -> None:
            raise Refusal("refused", "borg wanted to change the repository")

        def commit(self, *args: Any, **kwargs: Any) -> None:
            raise Refusal("refused", "borg wanted to change the repository")

        put = delete = save_config = commit_nonce_reservation = destroy = commit
        replay_segments = write_index = break_lock = commit

        def get(self, id: bytes) -> Any:  # noqa: A002 - borg's name
            try:
                return super().get(id)
            except FileNotFoundError as error:
                raise damage(f"{error.filename} is missing") from error

        def check_transaction(self) -> None:
            """It would replay here; ``open_index`` does so in memory."""

        def open_index(self, transaction_id: int | None, *_: Any, **__: Any) -> Any:
            committed = self.io.get_segments_transaction_id()
            if transaction_id is not None and transaction_id == committed:
                path = os.path.join(self.path, f"index.{transaction_id}")
                with contextlib.suppress(ValueError, OSError, *integrity_error):
                    return self._stored_index(path, transaction_id)
            if committed is None:
                if transaction_id is not None:
                    raise Refusal("corrupt", "no segment holds a commit; `borg check` may help")
                return borg_index()
            return self._replayed(committed)

        def _stored_index(self, path: str, transaction_id: int) -> Any:
            from borg.crypto.file_integrity import IntegrityCheckedFile

            if os.path.getsize(path) > MAX_INDEX:
                raise Refusal("unsupported", f"{path} has more than {MAX_INDEX} bytes")
            integrity = self._read_integrity(transaction_id, b"index")
            with IntegrityCheckedFile(path, write=False, integrity_data=integrity) as fd:
                return borg_index.read(fd)

        def _replayed(self, committed: int) -> Any:
            """The index as the log tells it, up to the last commit."""
            index = borg_index()
            for segment, _ in self.io.segment_iterator():
                if segment > committed:
                    break
                try:
                    for tag, key, offset, _ in self.io.iter_objects(segment, read_data=False):
                        if tag == 0:
                            index[key] = (segment, offset)
                        elif tag == 1:
                            index.pop(key, None)
                except integrity_error:
                    continue  # what was behind it is missed where it is wanted
            return index

    return ReadOnly


def regular_files_only(damage: Any) -> None:
    """Give borg's modules an ``open`` that does not wait for the other end of a pipe."""
    import borg.crypto.file_integrity
    import borg.repository

    def opener(path: str, flags: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise damage(f"{path}: no regular file")
        return fd

    for module in (borg.repository, borg.crypto.file_integrity):
        vars(module)["open"] = functools.partial(open, opener=opener)


class Session:
    """One repository."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.path = request["path"]
        passphrase = request.get("passphrase")
        if passphrase is not None:
            os.environ["BORG_PASSPHRASE"] = passphrase
        elif "BORG_PASSPHRASE" not in os.environ and "BORG_PASSCOMMAND" not in os.environ:
            os.environ["BORG_PASSPHRASE"] = ""  # nobody is asked at a terminal
        import borg
        from borg.crypto.file_integrity import FileIntegrityError
        from borg.hashindex import NSIndex
        from borg.helpers import IntegrityError
        from borg.logger import setup_logging
        from borg.repository import Repository

        setup_logging(level="critical", env_var=None)
        self.borg = borg.__version__
        if not self.borg.startswith(("1.1", "1.2", "1.4")):
            text = f"borg {self.borg} is installed; this reads through 1.1, 1.2 and 1.4"
            raise Refusal("unsupported", text)
        self.integrity_error = (IntegrityError, FileIntegrityError)
        self.damage = IntegrityError
        regular_files_only(IntegrityError)
        self.make = read_only(Repository, NSIndex, IntegrityError, self.integrity_error)
        self.repository: Any = None
        self.transaction: list[int | None] = []
        self.items: collections.OrderedDict[tuple[str, str], Any] = collections.OrderedDict()
        self.details: dict[str, dict[str, Any]] = {}
        self.open()

    def open(self) -> None:
        """Open it; again where it has changed."""
        from borg.helpers import Manifest

        if self.repository is not None:
            self.repository.io.close()
        self.repository = self.make(self.path, exclusive=False, lock=False)
        self.repository.open(self.path, False, lock=False)
        self.transaction = self.current_transaction()
        self.details = {k: v for k, v in self.details.items() if "failure" not in v}
        self.manifest, self.key = Manifest.load(self.repository, (Manifest.Operation.READ,))
        self.items.clear()

    def current_transaction(self) -> list[int | None]:
        return [self.repository.get_index_transaction_id(), self.repository.io.get_latest_segment()]

    # --- requests ---------------------------------------------------------------------------------

    def hello(self, request: dict[str, Any]) -> Answer:
        import borg.crypto.key as keys

        return {
            "version": VERSION,
            "borg": self.borg,
            "id": self.repository.id.hex(),
            "encryption": getattr(type(self.key), "ARG_NAME", None) or "unknown",
            "encrypted": not isinstance(self.key, keys.PlaintextKey),
        }, b""

    def archives(self, request: dict[str, Any]) -> Answer:
        if self.transaction != self.current_transaction():
            self.open()
        found = [self.described(info) for info in self.manifest.archives.list()]
        return {"transaction": self.transaction, "archives": found}, b""

    def described(self, info: Any) -> dict[str, Any]:
        id_ = info.id.hex()
        known = self.details.get(id_)
        if known is None:
            known = {"id": id_, "name": readable(info.name), "time": info.ts.timestamp()}
            try:
                archive = self.archive(info.name)
            except self.damage as error:
                known["failure"] = one_line(error)
            except Exception as error:
                if type(error).__name__ != "ObjectNotFound":
                    raise
                known["failure"] = f"its metadata is missing: {one_line(error)}"
            else:
                meta = archive.metadata
                known["hostname"] = readable(str(meta.get("hostname", "")))
                known["username"] = readable(str(meta.get("username", "")))
                known["comment"] = readable(str(meta.get("comment", "")))
                known["chunker"] = [str(each) for each in meta.get("chunker_params", ())]
            self.details[id_] = known
        return known

    def archive(self, name: str) -> Any:
        from borg.archive import Archive

        return Archive(self.repository, self.key, self.manifest, name)

    def named(self, request: dict[str, Any]) -> Any:
        for name in self.manifest.archives:
            if readable(name) == request["archive"]:
                return self.archive(name)
        raise Refusal("missing", f"there is no archive {request['archive'][:200]!r}")

    def files(self, request: dict[str, Any]) -> Answer:
        archive = self.named(request)
        asked, complete = set(request["asked"]), True
        found: list[dict[str, Any]] = []
        for item in self.regular(archive):
            path = readable(item.path)
            size = self.size_of(item)
            if size < request["least"] and path not in asked:
                continue
            if len(path) > MAX_NAME:
                continue
            if len(found) >= request["most"] and path not in asked:
                complete = False
                continue
            modified = item.get("mtime", 0) / 1e9
            row = {"path": path, "size": size, "chunks": len(item.chunks), "modified": modified}
            found.append(row)
        return {"files": found, "complete": complete}, b""

    def regular(self, archive: Any) -> Iterator[Any]:
        for item in archive.iter_items():
            if stat.S_ISREG(item.mode) and "chunks" in item and "part" not in item:
                yield item

    def size_of(self, item: Any) -> int:
        return sum(chunk[1] for chunk in item.chunks)

    def chunks(self, request: dict[str, Any]) -> Answer:
        item = self.item(request)
        first, count = request["first"], min(request["count"], MAX_COUNT)
        part = item[first : first + count]
        body = b"".join(ITEM_CHUNK.pack(chunk[0], chunk[1]) for chunk in part)
        return {"count": len(item), "size": sum(chunk[1] for chunk in item)}, body

    def item(self, request: dict[str, Any]) -> Any:
        """The chunk list of a file; the last ones are kept, since they are asked for in parts."""
        key = (request["archive"], request["path"])
        if key in self.items:
            self.items.move_to_end(key)
            return self.items[key]
        archive = self.named(request)
        for item in self.regular(archive):
            if readable(item.path) == request["path"]:
                self.items[key] = item.chunks
                while len(self.items) > KEPT_ITEMS:
                    self.items.popitem(last=False)
                return item.chunks
        raise Refusal("missing", f"the archive has no file {request['path'][:200]!r}")

    def zeroes(self, request: dict[str, Any]) -> Answer:
        sizes = [size for size in request["sizes"] if 0 < size <= MAX_BODY]
        return {}, b"".join(bytes(self.key.id_hash(bytes(size))) for size in sizes)

    def fetched(self, id_: bytes) -> bytes:
        from borg.repository import Repository

        try:
            return bytes(self.repository.get(id_))
        except (Repository.ObjectNotFound, self.damage):
            # Compacted meanwhile, perhaps: what is still referred to lies elsewhere now.
            if self.transaction == self.current_transaction():
                raise
            self.open()
            return bytes(self.repository.get(id_))

    def get(self, request: dict[str, Any]) -> Answer:
        id_ = bytes.fromhex(request["id"])
        data = self.key.decrypt(id_, self.fetched(id_))
        return {}, bytes(data)

    def raw(self, request: dict[str, Any]) -> Answer:
        return {"length": len(self.fetched(bytes.fromhex(request["id"])))}, b""


REQUESTS = frozenset(["hello", "archives", "files", "chunks", "zeroes", "get", "raw"])


def one_line(error: BaseException) -> str:
    get = getattr(error, "get_message", None)
    text = get() if get is not None else str(error) or type(error).__name__
    return " ".join(text.split())[:900]


def answer(session: Session, request: dict[str, Any]) -> Answer:
    """The answer, whatever goes wrong."""
    try:
        name = request["do"]
        if name not in REQUESTS:
            return {"error": "refused", "text": "no such request"}, b""
        found: Answer = getattr(session, name)(request)
        return found
    except Refusal as error:
        return {"error": error.kind, "text": str(error)}, b""
    except MemoryError:
        return {"error": "failed", "text": "out of memory"}, b""
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        return {"error": kind_of(error), "text": one_line(error)}, b""


KINDS = {
    "ObjectNotFound": "corrupt",
    "PassphraseWrong": "passphrase",
    "NoPassphraseFailure": "passphrase",
    "PasscommandFailure": "passphrase",
    "PasswordRetriesExceeded": "passphrase",
    "KeyfileNotFoundError": "key",
    "KeyfileInvalidError": "key",
    "KeyfileMismatchError": "key",
    "RepoKeyNotFoundError": "key",
    "InvalidRepository": "none",
    "InvalidRepositoryConfig": "none",
    "DoesNotExist": "none",
    "AtticRepository": "unsupported",
    "NoManifestError": "corrupt",
    "UnsupportedPayloadError": "unsupported",
    "UnsupportedManifestError": "unsupported",
    "MandatoryFeatureUnsupported": "unsupported",
}


def kind_of(error: BaseException) -> str:
    names = [cls.__name__ for cls in type(error).__mro__]
    for name in names:
        if name in KINDS:
            return KINDS[name]
    if any(name in ("IntegrityError", "FileIntegrityError", "UnpackException") for name in names):
        return "corrupt"
    return "failed" if isinstance(error, OSError) else "corrupt"


def main() -> None:
    """Answer until there is nobody to answer."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What borg prints must not get among the answers, and nothing is asked.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    session: Session | None = None
    try:
        while True:
            request = read_request(requests)
            if session is None:
                try:
                    session = Session(request)  # and then answer it
                except Refusal as error:
                    write_answer(answers, {"error": error.kind, "text": str(error)})
                    continue
                except ImportError as error:
                    write_answer(answers, {"error": "import", "text": one_line(error)})
                    continue
                except Exception as error:  # noqa: BLE001 - whatever it is, it is told
                    write_answer(answers, {"error": kind_of(error), "text": one_line(error)})
                    continue
            header, body = answer(session, request)
            write_answer(answers, header, body)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)


if __name__ == "__main__":
    main()
