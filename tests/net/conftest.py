"""Servers for the tests: shared ones for what leaves no trace, and a factory for the rest.

After each test every client is closed and the server must hold as few descriptors as before.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from authority import Certificates
from encrypted import tls_options
from served_images import (
    DISK_SIZE,
    HUGE_FAR,
    HUGE_SIZE,
    MIB,
    SCRATCH_SIZE,
    Images,
    Scratch,
    Serve,
    write_sparse,
)
from serving import ServerProcess, command, eventually

from protocol.constants import Dialect


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """The read-only images."""
    folder = tmp_path_factory.mktemp("images")
    rng = random.Random(1)
    head, tail = rng.randbytes(MIB), rng.randbytes(MIB + 777)
    block, big = rng.randbytes(1 << 16), rng.randbytes(40 * MIB)
    write_sparse(folder / "disk", DISK_SIZE, {0: head, 2 * MIB: tail})
    write_sparse(folder / "huge", HUGE_SIZE, {0: block, HUGE_FAR: block})
    write_sparse(folder / "big", len(big), {0: big})
    golden = head + bytes(MIB) + tail
    return Images(folder / "disk", folder / "huge", folder / "big", golden, big, block)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server of one's own; it is stopped, and its exit code checked, at the end."""
    started: list[ServerProcess] = []

    def start(*arguments: str | Path, uris: int = 1) -> ServerProcess:
        server = ServerProcess(command(*arguments), uris=uris)
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


def _checked(server: ServerProcess) -> Iterator[ServerProcess]:
    """Lend a shared server to one test."""
    before = server.descriptors()
    yield server
    server.hang_up()
    server.check_log()
    assert server.is_alive()
    assert eventually(lambda: server.descriptors() <= before), "descriptors were leaked"


def _warm_up(server: ServerProcess) -> None:
    """What the server opens once and keeps is not to be taken for a leak."""
    idle = server.descriptors()
    server.connect().enter(server.uris[0].export).disconnect()
    assert eventually(lambda: server.descriptors() <= idle + 2)


@pytest.fixture(scope="session")
def _readonly_process(
    images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    socket = tmp_path_factory.mktemp("readonly") / "sock"
    server = ServerProcess(
        command(images.disk, images.huge, images.big, "--listen", f"unix:{socket}"), uris=3
    )
    _warm_up(server)
    yield server
    server.stop()


@pytest.fixture
def readonly(_readonly_process: ServerProcess) -> Iterator[ServerProcess]:
    """Serves ``images`` read-only on a Unix socket."""
    yield from _checked(_readonly_process)


@pytest.fixture(scope="session")
def _writable_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("writable")
    write_sparse(folder / "scratch", SCRATCH_SIZE, {})
    where = f"unix:{folder / 'sock'}"
    server = ServerProcess(command(folder / "scratch", "--write", "--listen", where))
    _warm_up(server)
    yield server
    server.stop()


@pytest.fixture
def writable(_writable_process: ServerProcess) -> Iterator[ServerProcess]:
    """Serves ``scratch`` for writing on a Unix socket."""
    yield from _checked(_writable_process)


@pytest.fixture
def scratch(writable: ServerProcess) -> Scratch:
    """The image behind ``writable``, all random data."""
    socket = writable.uris[0].socket
    assert socket is not None
    path = Path(socket).with_name("scratch")
    golden = random.Random(2).randbytes(SCRATCH_SIZE)
    with path.open("r+b") as file:
        file.write(golden)
    return Scratch(path, golden)


@pytest.fixture(params=list(Dialect), ids=lambda dialect: dialect.name.lower())
def dialect(request: pytest.FixtureRequest) -> Dialect:
    """Each of the three."""
    found: Dialect = request.param
    return found


@pytest.fixture(params=[Dialect.STRUCTURED, Dialect.EXTENDED], ids=["structured", "extended"])
def chunked(request: pytest.FixtureRequest) -> Dialect:
    """The two with chunks."""
    found: Dialect = request.param
    return found


@pytest.fixture
def forced(
    serve: Serve, images: Images, certificates: Certificates, tmp_path: Path
) -> ServerProcess:
    """TLS required."""
    where = ("--listen", f"unix:{tmp_path}/sock")
    return serve(images.disk, images.big, *where, *tls_options(certificates), uris=2)


@pytest.fixture
def selective(
    serve: Serve, images: Images, certificates: Certificates, tmp_path: Path
) -> ServerProcess:
    """``big`` over TLS only, ``disk`` for everyone."""
    where = ("--listen", f"unix:{tmp_path}/sock")
    modes = ("--tls", "per-export", "--tls-export", "big")
    return serve(images.disk, images.big, *where, *modes, *tls_options(certificates), uris=2)


@pytest.fixture
def encrypted_scratch(
    serve: Serve, certificates: Certificates, tmp_path: Path
) -> tuple[ServerProcess, Path]:
    """A writable image over TLS."""
    image = tmp_path / "image"
    image.write_bytes(random.Random(1).randbytes(6 * MIB))
    where = ("--listen", f"unix:{tmp_path}/sock")
    return serve(image, "--write", *where, *tls_options(certificates)), image
