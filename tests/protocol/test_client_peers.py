"""The client's classes over a blocking socket against real servers: nbdkit, qemu-nbd, nbd-server.

The shell is the smallest that works: send what is due, receive, hand over. Servers are started
with a connected or a listening socket of ours, so that nothing has to be waited for. A missing
program skips its tests, except where CI=true.
"""

import os
import random
import shutil
import socket
import subprocess
from contextlib import contextmanager

import pytest

from protocol.answers import Data, Done, Failed, Hole, Status
from protocol.connection import ClientConnection
from protocol.constants import Dialect, Errno, Info, Reply, TransmissionFlag
from protocol.errors import Refused
from protocol.handshake.client import ClientHandshake
from protocol.handshake.client_states import State
from protocol.handshake.wants import (
    ContextsListed,
    Described,
    Ended,
    Export,
    Listed,
    Mode,
    TlsPolicy,
    Wants,
)
from protocol.terms import BlockSizes, Negotiated
from protocol.uri import Uri, parse

MIB = 1 << 20
SIZE = 8 * MIB
DATA_AT, DATA_LENGTH = 2 * MIB, MIB
ALLOCATION = "base:allocation"
TIMEOUT_S = 20


@pytest.fixture
def image(tmp_path):
    """8 MiB: a hole, one MiB of random data at 2 MiB, a hole."""
    path = tmp_path / "disk.img"
    data = random.Random(1).randbytes(DATA_LENGTH)
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.seek(DATA_AT)
        file.write(data)
    return path


def contents(image):
    return image.read_bytes()


def need(program):
    if shutil.which(program) is None and os.environ.get("CI") != "true":
        pytest.skip(f"{program} is not installed")


@contextmanager
def ended(process):
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def on_stdin(*command):
    """A server that serves the one connection it is born with."""
    need(command[0])
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_S)
    with theirs:
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs)
    # Hang up first: nbdkit finishes its one connection before it heeds a signal.
    with ended(process), ours:
        yield ours


@contextmanager
def listening(path, *command):
    """A server started as systemd would, with its socket listening already."""
    need(command[0])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        script = 'exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
        process = subprocess.Popen(["sh", "-c", script, "sh", *command], stdin=listener)
    with ended(process):
        yield


def nbdkit(*arguments):
    return on_stdin("nbdkit", "--single", *map(str, arguments))


class Peer:
    """A blocking client: no cleverness, every byte through the classes under test."""

    def __init__(self, connected, **wants):
        self.socket = connected
        self.handshake = ClientHandshake(Wants(**wants))
        self.connection = None

    def next_event(self):
        while True:
            self.socket.sendall(self.handshake.data_to_send())
            received = self.socket.recv(65536)
            events = self.handshake.receive_data(received) if received else self.handshake.eof()
            if events:
                [event] = events
                if isinstance(event, Negotiated):
                    self.connection = ClientConnection(event)
                return event

    def ask(self, *arguments):
        self.handshake.ask(*arguments)
        return self.next_event()

    def run(self, *requests):
        """Send all requests at once, gather what is answered until each is done."""
        requests = list(requests)
        answers = {cookie: [] for cookie, _ in requests}
        self.socket.sendall(b"".join(sent for _, sent in requests))
        while self.connection.inflight:
            received = self.socket.recv(65536)
            if not received:
                self.connection.eof()
            for answer in self.connection.receive_data(received):
                if isinstance(answer, Data):
                    answers[answer.cookie].append((answer.offset, bytes(answer.data)))
                else:
                    answers[answer.cookie].append(answer)
        return [answers[cookie] for cookie, _ in requests]

    def read(self, offset, length, **options):
        """The bytes, or the failure."""
        [answers] = self.run(self.connection.read(offset, length, **options))
        done = answers[-1]
        if done.failure is not None:
            return done.failure
        return assembled(offset, length, answers)

    def finish(self):
        self.socket.sendall(self.connection.disconnect())
        while received := self.socket.recv(65536):
            self.connection.receive_data(received)
        self.connection.eof()


def assembled(offset, length, answers):
    buffer = bytearray(length)
    for answer in answers:
        if isinstance(answer, tuple):
            at, data = answer
            buffer[at - offset : at - offset + len(data)] = data
        else:
            assert isinstance(answer, Hole | Done)
    return bytes(buffer)


def check_reads(peer, golden):
    """The whole export in pieces of odd sizes, all in flight together, then single bytes."""
    most = min(peer.connection.terms.blocks.maximum, 300_001)
    places = range(0, len(golden), most)
    requests = [peer.connection.read(at, min(most, len(golden) - at)) for at in places]
    pieces = peer.run(*requests)
    got = b"".join(
        assembled(at, min(most, len(golden) - at), answers)
        for at, answers in zip(places, pieces, strict=True)
    )
    assert golden == got
    for at in (0, DATA_AT - 1, DATA_AT, DATA_AT + DATA_LENGTH - 1, len(golden) - 1):
        assert golden[at : at + 1] == peer.read(at, 1)


def check_writes(peer, image):
    golden = bytearray(contents(image))
    connection = peer.connection
    data = random.Random(2).randbytes(70_000)
    cookie, header = connection.write(12_345, len(data), fua=True)
    assert [[Done(cookie, None)]] == peer.run((cookie, header + data))
    golden[12_345 : 12_345 + len(data)] = data
    requests = [connection.flush(), connection.trim(4 * MIB, 65536)]
    if connection.terms.flags & TransmissionFlag.SEND_WRITE_ZEROES:
        requests.append(connection.write_zeroes(DATA_AT, 65536))
        golden[DATA_AT : DATA_AT + 65536] = bytes(65536)
    if connection.terms.flags & TransmissionFlag.SEND_CACHE:
        requests.append(connection.cache(0, 65536))
    assert [[Done(cookie, None)] for cookie, _ in requests] == peer.run(*requests)
    check_reads(peer, golden)
    peer.finish()
    assert golden == contents(image)


# --- nbdkit ----------------------------------------------------------------------------------


def test_nbdkit_structured(image):
    with nbdkit("file", image) as connected:
        peer = Peer(connected, export="any", queries=(ALLOCATION, "x-none:x"))
        terms = peer.next_event()
        assert (terms.size, terms.dialect) == (SIZE, Dialect.STRUCTURED)
        assert list(terms.contexts.values()) == [ALLOCATION]
        check_reads(peer, contents(image))
        check_status(peer)
        check_writes(peer, image)


def check_status(peer):
    [[status, _]] = peer.run(peer.connection.block_status(0, SIZE))
    assert isinstance(status, Status)
    assert peer.connection.terms.contexts[status.context_id] == ALLOCATION
    ranges = []
    at = 0
    for length, flags in status.extents:
        ranges += [] if flags & 2 else [(at, at + length)]
        at += length
    assert at == SIZE
    assert ranges == [(DATA_AT, DATA_AT + DATA_LENGTH)]
    [[one, _]] = peer.run(peer.connection.block_status(0, SIZE, one=True))
    assert one.extents == ((DATA_AT, 3),)


def test_nbdkit_without_structured_replies(image):
    with nbdkit("--no-sr", "file", image) as connected:
        peer = Peer(connected, queries=(ALLOCATION,))
        terms = peer.next_event()
        assert (terms.dialect, terms.contexts) == (Dialect.SIMPLE, {})
        check_writes(peer, image)


def test_nbdkit_oldstyle(image):
    with nbdkit("--oldstyle", "--readonly", "file", image) as connected:
        peer = Peer(connected)
        assert peer.next_event().size == SIZE
        check_reads(peer, contents(image))
        peer.finish()


def test_nbdkit_oldstyle_has_no_tls(image):
    with nbdkit("--oldstyle", "file", image) as connected, pytest.raises(Refused):
        Peer(connected, tls=TlsPolicy.REQUIRE).next_event()


@pytest.mark.parametrize("mask", [0, 1, 2])
def test_nbdkit_masking_handshake_flags(image, mask):
    """Plain newstyle, fixed with the 124 zeroes, and plain newstyle without them."""
    with nbdkit("--mask-handshake", mask, "file", image) as connected:
        peer = Peer(connected)
        terms = peer.next_event()
        expected = Dialect.STRUCTURED if mask == 1 else Dialect.SIMPLE
        assert (SIZE, expected) == (terms.size, terms.dialect)
        check_reads(peer, contents(image))
        peer.finish()


def test_nbdkit_has_no_tls_to_require(image):
    with nbdkit("--tls=off", "file", image) as connected:
        peer = Peer(connected, tls=TlsPolicy.REQUIRE)
        with pytest.raises(Refused, match="STARTTLS"):
            peer.next_event()
        peer.handshake.abort()
        assert peer.next_event() == Ended()


def test_nbdkit_info_and_list(image):
    with nbdkit(
        "--filter=exportname",
        "--filter=blocksize-policy",
        "file",
        image,
        "exportname=a",
        "exportname=b",
        "exportname-list=explicit",
        "exportname-strict=true",
        "exportdesc=fixed:some disk",
        "blocksize-minimum=512",
        "blocksize-preferred=64K",
        "blocksize-maximum=1M",
        "blocksize-error-policy=error",
    ) as connected:
        peer = Peer(connected, mode=Mode.LIST)
        assert Listed((Export("a", "some disk"), Export("b", "some disk"))) == peer.next_event()
        assert ContextsListed((ALLOCATION,)) == peer.ask(Mode.LIST_CONTEXTS, "a")
        with pytest.raises(Refused) as caught:
            peer.ask(Mode.INFO, "c")
        assert peer.handshake.state is State.IDLE
        assert caught.value.reply == Reply.ERR_UNKNOWN
        described = peer.ask(Mode.INFO, "a", (ALLOCATION,))
        assert isinstance(described, Described)
        assert BlockSizes(512, 65536, MIB) == described.terms.blocks
        assert described.terms.description == "some disk"
        peer.ask(Mode.GO, "b")
        assert contents(image)[DATA_AT : DATA_AT + 512] == peer.read(DATA_AT, 512)
        peer.finish()


def test_nbdkit_errors_are_failures_and_the_connection_goes_on(image):
    with nbdkit(
        "--filter=error", "file", image, "error-pread=EIO", "error-pread-rate=100%"
    ) as connected:
        peer = Peer(connected)
        peer.next_event()
        failure = peer.read(0, 4096)
        assert isinstance(failure, Failed)
        assert failure.errno is Errno.EIO
        [[done]] = peer.run(peer.connection.flush())
        assert done.failure is None
        peer.finish()


# --- qemu-nbd --------------------------------------------------------------------------------


@contextmanager
def qemu_nbd(directory, *arguments):
    uri = Uri(socket=str(directory / "qemu.sock"), export="disk")
    command = ("qemu-nbd", "--persistent", "--export-name", uri.export, *map(str, arguments))
    with listening(uri.socket, *command):
        yield uri


@contextmanager
def connected_to(uri):
    with socket.socket(socket.AF_UNIX) as connected:
        connected.settimeout(TIMEOUT_S)
        connected.connect(parse(str(uri)).socket)
        yield connected


def test_qemu_nbd_everything(image, tmp_path):
    with qemu_nbd(tmp_path, "-f", "raw", "-D", "a disk", image) as uri:
        with connected_to(uri) as connected:
            peer = Peer(connected, mode=Mode.LIST)
            assert Listed((Export("disk", "a disk"),)) == peer.next_event()
            with pytest.raises(Refused) as caught:
                peer.ask(Mode.GO, "other")
            assert (caught.value.reply, "other" in caught.value.text) == (Reply.ERR_UNKNOWN, True)
            peer.handshake.abort()
            assert peer.next_event() == Ended()
        with connected_to(uri) as connected:
            peer = Peer(connected, export=uri.export, queries=(ALLOCATION,))
            terms = peer.next_event()
            assert (
                terms.size,
                terms.dialect,
                terms.description,
                terms.name,
            ) == (SIZE, Dialect.STRUCTURED, "a disk", "disk")
            assert terms.blocks_advertised
            check_reads(peer, contents(image))
            check_status(peer)
            [answers] = peer.run(peer.connection.read(DATA_AT - 4096, 8192))
            assert Hole in {type(answer) for answer in answers}
            data = peer.read(DATA_AT - 4096, 8192, unfragmented=True)
            assert contents(image)[DATA_AT - 4096 : DATA_AT + 4096] == data
            check_writes(peer, image)


def test_qemu_nbd_bitmap_beside_allocation(tmp_path):
    need("qemu-img")
    need("qemu-io")
    disk = tmp_path / "disk.qcow2"
    for command in (
        ["qemu-img", "create", "-q", "-f", "qcow2", disk, "8M"],
        ["qemu-img", "bitmap", "--add", "-g", "64k", disk, "b"],
        ["qemu-io", "-c", "write -P 5 1M 128k", disk],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)
    bitmap = "qemu:dirty-bitmap:b"
    arguments = ("-f", "qcow2", "-r", "-B", "b", disk)
    with qemu_nbd(tmp_path, *arguments) as uri, connected_to(uri) as connected:
        peer = Peer(connected, export="disk", queries=(bitmap, ALLOCATION), infos=(Info.NAME,))
        terms = peer.next_event()
        assert {bitmap, ALLOCATION} == set(terms.contexts.values())
        assert terms.flags & TransmissionFlag.READ_ONLY
        [answers] = peer.run(peer.connection.block_status(0, SIZE))
        statuses = {terms.contexts[s.context_id]: s.extents for s in answers[:-1]}
        rest = SIZE - MIB - 131072
        assert ((MIB, 0), (131072, 1), (rest, 0)) == statuses[bitmap]
        assert ((MIB, 3), (131072, 0), (rest, 3)) == statuses[ALLOCATION]
        peer.finish()


# --- nbd-server ------------------------------------------------------------------------------


def test_nbd_server(image, tmp_path):
    config = tmp_path / "nbd-server.conf"
    config.write_text(
        "[generic]\nallowlist = true\n"
        f"[disk]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n"
    )
    with on_stdin("nbd-server", "-C", str(config), "-d", "0") as connected:
        peer = Peer(connected, mode=Mode.LIST)
        assert Listed((Export("disk", ""),)) == peer.next_event()
        terms = peer.ask(Mode.GO, "disk", (ALLOCATION,))
        assert (terms.size, terms.dialect, terms.contexts) == (SIZE, Dialect.SIMPLE, {})
        check_writes(peer, image)
