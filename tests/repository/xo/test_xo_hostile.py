"""Repositories made to deceive: refused in one line, in little memory, and nothing else hurt."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import brotli
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError, UnsupportedImage
from nbdsrv.repository.selector import select
from nbdsrv.repository.xo.layout import time_of
from nbdsrv.store.store import StoreError
from tests.cli.program import hidden_from, nbdsrv
from tests.disk.reading import content
from tests.formats.mutants import Mutation, mutations, threads
from tests.repository.xo.made import BLOCK, Layer, Made, bits, disk_uuid
from tests.repository.xo.opened import contents, opened

A, B = "20260201T000000Z", "20260202T000000Z"
TIME_OF_B = int(time_of(B) or 0) * 1000
"""Milliseconds, as the metadata has it."""
GIB = 1 << 30
MAX_MEMORY = 300 << 20


def block(seed: int) -> bytes:
    return bytes([seed]) * BLOCK


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Two points; the tests spoil the first, or its disk."""
    made = Made(tmp_path / "xo")
    made.point(A, [Layer(A, 2 * BLOCK, {0: block(1)})])
    made.point(B, [Layer(B, 2 * BLOCK, {0: block(2)})])
    return made


async def refused(made: Made, workers: Workers, said: str) -> None:
    """The first point is not served, and the second is; what is wrong is said."""
    async with opened(made.root, workers) as repository:
        first, second = await repository.points()
        assert first.flags == ("damaged",), first
        assert said in str(first.facts["reason"]), first.facts["reason"]
        with pytest.raises(DiskError) as error:
            await repository.open_disk(first, "root")
        assert "\n" not in str(error.value)
        assert second.flags == ()
        assert await contents(repository, f"web@{B}") == block(2) + bytes(BLOCK)
        done = await repository.verify("structure")
        assert {hurt.point for finding in done.findings for hurt in finding.hurts} == {f"web/{A}"}


def alias(made: Made) -> Path:
    return made.root / made.vdi() / f"{A}.alias.vhd"


def data(made: Made, name: str) -> Path:
    return made.root / made.vdi() / "data" / f"{A}.vhd" / name


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("../" * 20 + "etc/passwd", "leads out"),
        ("/etc/passwd", "leads out"),
        ("", "empty"),
        ("x" * 1025, "not a path"),
        ("data/nothing.vhd", "where nothing is"),
        (f"{A}.alias.vhd", "an alias"),
        (f"{B}.alias.vhd", "an alias"),
        ("data/\0", "not a path"),
        ("..", "is missing"),
        (f"data/{B}.vhd", "another disk is under its name"),
    ],
)
async def test_aliases(made: Made, target: str, said: str, workers: Workers) -> None:
    alias(made).write_text(target)
    await refused(made, workers, said)


async def test_symbolic_links_out_of_the_repository(
    made: Made, tmp_path: Path, workers: Workers
) -> None:
    outside = tmp_path / "outside"
    data(made, "").rename(outside)
    data(made, "").symlink_to(outside)
    await refused(made, workers, "leads out of the repository")
    data(made, "").unlink()
    data(made, "").symlink_to(data(made, ""))
    await refused(made, workers, "")


async def test_json_of_a_gibibyte_is_not_read(made: Made, workers: Workers) -> None:
    os.truncate(made.root / made.vm() / f"{A}.json", GIB)
    await refused(made, workers, "longer than 33554432 bytes")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[" * 100_000,
        b'{"x":' * 100_000,
        b'{"vhds": 5}',
        b'{"vhds": {"a": 5}}',
        b'{"vhds": {"a": "../../../x.vhd"}}',
        b'{"vm": {"uuid": "\xff"}, "vhds": {}}',
        b'{"xva": "../../../x.xva"}',
        b'{"xva": "none.xva"}',
        json.dumps({"vhds": {str(n): "x.vhd" for n in range(5000)}}).encode(),
    ],
)
async def test_json_that_is_none(made: Made, text: bytes, workers: Workers) -> None:
    (made.root / made.vm() / f"{A}.json").write_bytes(text)
    await refused(made, workers, "")


async def test_json_of_another_point(made: Made, workers: Workers) -> None:
    """Copied from one point's name to another's: the other's content is not served under it."""
    path, other = (made.root / made.vm() / f"{stamp}.json" for stamp in (A, B))
    said = {**json.loads(other.read_text()), "timestamp": TIME_OF_B + 999}
    other.write_text(json.dumps(said))
    path.write_text(json.dumps(said))
    await refused(made, workers, f"{A}.json: it is the metadata of {B}, under another point's name")


@pytest.mark.parametrize("timestamp", [None, -1, 1e300, "soon", [], TIME_OF_B])
async def test_a_time_alone_proves_nothing(made: Made, workers: Workers, timestamp: object) -> None:
    path = made.root / made.vm() / f"{A}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "timestamp": timestamp}))
    async with opened(made.root, workers) as repository:
        assert await contents(repository, f"web@{A}") == block(1) + bytes(BLOCK)


async def test_numbers_in_json_that_are_none(made: Made, workers: Workers) -> None:
    path = made.root / made.vm() / f"{A}.json"
    said = json.loads(path.read_text())
    for vdi in said["vdis"].values():
        vdi |= {"virtual_size": -(10**30), "name_label": ["x"], "$snapshot_of$uuid": {}}
    for vbd in said["vbds"].values():
        vbd |= {"userdevice": "9" * 5000, "device": None}
    path.write_text(json.dumps({**said, "size": 1e300, "tags": 7, "mode": []}))
    async with opened(made.root, workers) as repository:
        first = (await repository.points())[0]
        assert first.disks[0].size == 2 * BLOCK
        assert await contents(repository, f"web@{A}") == block(1) + bytes(BLOCK)


@pytest.mark.parametrize("name", ["header", "footer", "bat", "chunk-filters.json"])
async def test_parts_that_are_bombs(made: Made, name: str, workers: Workers) -> None:
    bomb = brotli.compress(bytes(1 << 26), quality=5)
    data(made, name).write_bytes(bomb if name != "chunk-filters.json" else bytes(1 << 20))
    async with opened(made.root, workers) as repository:
        first = (await repository.points())[0]
        if name == "bat":  # zeroes, and nobody looks at more of them than the disk has blocks
            assert await contents(repository, f"web@{A}") == bytes(2 * BLOCK)
        elif name == "chunk-filters.json":
            assert "longer than 4096" in str(first.facts["reason"])
        else:
            assert first.flags == ("damaged",)


async def test_a_block_that_is_a_bomb_or_too_short(made: Made, workers: Workers) -> None:
    path = data(made, "blocks/0/0")
    for size, said in ((1 << 26, "more than 2097664 bytes"), (100, "a block of 100 bytes")):
        path.write_bytes(brotli.compress(bytes(size), quality=5))
        async with opened(made.root, workers) as repository:
            with pytest.raises(CorruptImage, match=said):
                await contents(repository, f"web@{A}")
            (finding,) = (await repository.verify("chunks")).findings
            assert finding.key.endswith("blocks/0/0")
    os.truncate(path, GIB)
    async with opened(made.root, workers) as repository:
        with pytest.raises(CorruptImage, match="longer than"):
            await contents(repository, f"web@{A}")


@pytest.mark.parametrize("layout", ["vhd", "none"])
async def test_gigantic_tables(tmp_path: Path, layout: str, workers: Workers) -> None:
    made = Made(tmp_path / "xo")
    layer = Layer(A, 2 * BLOCK, {0: block(1)}, layout="none")
    made.point(A, [layer])
    layer.entries, layer.layout = 0xFFFFFFFF, layout
    if layout == "none":
        header = made.encoder.header(layer, None)
        data(made, "header").write_bytes(header)
    else:
        layer.entries = None
        raw = bytearray(made.encoder.vhd(layer, None))
        layer.entries = 0xFFFFFFFF
        raw[512:1536] = made.encoder.header(layer, None)
        alias(made).unlink()
        made.file(f"{made.vdi()}/{A}.vhd", bytes(raw))
        path = made.root / made.vm() / f"{A}.json"
        path.write_text(path.read_text().replace(".alias.vhd", ".vhd"))
    async with opened(made.root, workers) as repository:
        (point,) = await repository.points()
        assert point.flags == ("damaged",)
        assert "4294967295" in str(point.facts["reason"])


async def test_huge_disks_and_odd_blocks_are_unsupported(made: Made, workers: Workers) -> None:
    for size, entries in ((1 << 62, 1 << 26), ((1 << 63) - 1, (1 << 32) - 1), (1 << 63, 1)):
        layer = Layer(A, size, entries=entries)
        data(made, "header").write_bytes(
            made.encoder.pack("brotli", made.encoder.header(layer, None))
        )
        data(made, "footer").write_bytes(made.encoder.pack("brotli", made.encoder.footer(layer)))
        await refused(made, workers, "")


async def test_chains_in_a_circle(made: Made, workers: Workers) -> None:
    for stamp, parent in ((A, B), (B, A)):
        layer = Layer(stamp, 2 * BLOCK, parent=parent)
        path = made.root / made.vdi() / "data" / f"{stamp}.vhd"
        for name, part in (
            ("header", made.encoder.header(layer, f"{parent}.alias.vhd")),
            ("footer", made.encoder.footer(layer)),
        ):
            (path / name).write_bytes(made.encoder.pack("brotli", part))
    async with opened(made.root, workers) as repository:
        for point in await repository.points():
            assert point.flags == ("damaged",)
            assert "loop" in str(point.facts["reason"])


@pytest.mark.parametrize(
    "name", ["../../../../../../etc/passwd", "", "/etc/passwd", "\0x", "none.vhd"]
)
async def test_names_of_parents(made: Made, name: str, workers: Workers) -> None:
    layer = Layer(A, 2 * BLOCK, parent=B)
    for part, raw in (
        ("header", made.encoder.header(layer, name)),
        ("footer", made.encoder.footer(layer)),
    ):
        data(made, part).write_bytes(made.encoder.pack("brotli", raw))
    await refused(made, workers, "parent" if name in {"", "\0x", "none.vhd"} else "leads out")


async def test_a_chain_without_end(tmp_path: Path, workers: Workers) -> None:
    made = Made(tmp_path / "xo")
    stamps = [
        f"2026{n // 24 // 28 + 1:02}{n // 24 % 28 + 1:02}T{n % 24:02}0000Z" for n in range(520)
    ]
    for before, stamp in zip([None, *stamps], stamps, strict=False):
        made.disk(Layer(stamp, BLOCK, layout="none", parent=before))
    made.point(stamps[-1], [made.layers["root", stamps[-1]]])
    async with opened(made.root, workers) as repository:
        (point,) = await repository.points()
        assert point.flags == ("damaged",)
        with pytest.raises(DiskError):
            await repository.open_disk(point, "root")
    made.point(stamps[500], [made.layers["root", stamps[500]]])
    async with opened(made.root, workers) as repository:
        assert await contents(repository, f"@{stamps[500]}") == bytes(BLOCK)


async def test_filters_nobody_knows(made: Made, workers: Workers) -> None:
    data(made, "chunk-filters.json").write_bytes(b'["lzma"]')
    async with opened(made.root, workers) as repository:
        first = (await repository.points())[0]
        assert "lzma" in str(first.facts["reason"])
        with pytest.raises((CorruptImage, UnsupportedImage), match="lzma"):
            await repository.open_disk(first, "root")


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_bombs_take_little_memory(tmp_path: Path) -> None:
    made = Made(tmp_path / "xo")
    made.point(A, [Layer(A, 40 * BLOCK, {n: block(n) for n in range(40)})])
    bomb = brotli.compress(bytes(1 << 28), quality=5)
    for number in range(40):
        data(made, f"blocks/0/{number}").write_bytes(bomb)
    os.truncate(made.file(f"{made.vm()}/{B}.json", b""), GIB)
    command = [sys.executable, "-m", "nbdsrv", "verify", "--level", "chunks", f"xo:{made.root}"]
    script = "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode;"
    script += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", script, *command],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("more than 2097664 bytes") >= 40
    assert int(done.stdout.split()[-1]) * 1024 < MAX_MEMORY


# --- mutants -------------------------------------------------------------------------------------

PARTS = ("json", "alias", "header", "footer", "bat", "chunk-filters.json", "blocks/0/0", "vhd")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = Made(tmp_path_factory.mktemp("mutants") / "xo")
    small = os.urandom(4096) * 512
    made.point(A, [Layer(A, 2 * BLOCK, {0: small}, layout="gzip")])
    made.point(B, [Layer(B, 2 * BLOCK, {1: small}, layout="vhd")])
    return made


@given(part=st.sampled_from(PARTS), changes=mutations(2048), cut=st.none() | st.integers(0, 2000))
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutants(real: Made, part: str, changes: list[Mutation], cut: int | None) -> None:
    path = {
        "json": real.root / real.vm() / f"{A}.json",
        "alias": alias(real),
        "vhd": real.root / real.vdi() / f"{B}.vhd",
    }.get(part) or data(real, part)
    good = path.read_bytes()
    mutant = bytearray(good)
    for position, new in changes:
        at = position % len(good) if part != "vhd" else position
        mutant[at : at + len(new)] = new
    path.write_bytes(mutant if cut is None else mutant[:cut])
    try:
        with threads() as (runner, workers):
            runner.run(_attempt(real, workers))
    finally:
        path.write_bytes(good)


async def _attempt(made: Made, workers: Workers) -> None:
    """Whatever it is, it is listed, read or refused; and both verify without a traceback."""
    async with opened(made.root, workers) as repository:
        for point in await repository.points():
            assert "\n" not in str(point.facts.get("reason", ""))
            for disk in point.disks:
                try:
                    found = await repository.open_disk(point, disk.name)
                except DiskError:
                    continue
                try:
                    for at in (0, found.size // 2, max(found.size - 4096, 0)):
                        await content(found, at, min(4096, found.size - at))
                        await found.extents(at, min(4096, found.size - at) or 1)
                except DiskError as error:
                    assert "\n" not in str(error)  # noqa: PT017 - of whatever kind
                finally:
                    await found.close()
        await repository.verify("chunks")


async def test_select_of_what_is_damaged_says_why(made: Made, workers: Workers) -> None:
    alias(made).write_text("")
    async with opened(made.root, workers) as repository:
        assert (await select(repository, f"web@{B}")).disk == "root"
        with pytest.raises(DiskError, match="empty"):
            await select(repository, f"web@{A}")
        assert disk_uuid("root", A)


async def test_select_of_a_partial_point_says_why(made: Made, workers: Workers) -> None:
    made.point(B, [Layer(B, BLOCK, {}, name=name) for name in ("root", "data")])
    (made.root / made.vdi() / f"{B}.alias.vhd").write_text("")
    async with opened(made.root, workers) as repository:
        assert (await repository.points())[1].flags == ("partial",)
        assert (await select(repository, "web/data")).point.id == B
        for selector, said in ((f"web/root@{B}", "empty"), ("web/root", "latest point of 'web'")):
            with pytest.raises(DiskError, match=said):
                await select(repository, selector)


async def test_a_block_spread_over_too_many_layers_is_an_error(
    tmp_path: Path, workers: Workers
) -> None:
    """Deeper than Python calls itself; Xen Orchestra writes whole blocks, so that none is."""
    made = Made(tmp_path / "deep")
    stamps = [f"202602{1 + n // 24:02}T{n % 24:02}0000Z" for n in range(250)]
    data = bytes(BLOCK)
    for number, stamp in enumerate(stamps):
        parent = stamps[number - 1] if number else None
        some = {0: bits([number])} if parent else {}
        made.point(stamp, [Layer(stamp, BLOCK, {0: data}, some, parent=parent)])
    async with opened(made.root, workers) as repository:
        point = (await repository.points())[-1]
        disk = await repository.open_disk(point, "root")
        try:
            with pytest.raises(CorruptImage, match="too many layers"):
                await content(disk, 0, 512 * 300)
        finally:
            await disk.close()


def test_json_that_cannot_be_read_hides_no_other_point(made: Made, tmp_path: Path) -> None:
    """A bad sector, or a file of somebody else's: nothing is known of that point alone."""
    (made.root / made.vm() / f"{A}.json").chmod(0)
    source, prefix = f"xo:{made.root}", hidden_from()
    listed = nbdsrv("ls", "--json", source, prefix=prefix)
    flags = {point["point"]: point["flags"] for point in json.loads(listed.stdout)}
    assert flags == {A: ["damaged"], B: []}
    verified = nbdsrv("verify", source, prefix=prefix)
    assert verified.returncode == 1, verified
    assert f"could not be read: {made.root / made.vm() / A}.json" in verified.stdout
    copied = nbdsrv("copy", f"{source}#web@{B}", str(tmp_path / "b.img"), prefix=prefix)
    assert copied.returncode == 0, copied.stderr
    refused = nbdsrv("copy", f"{source}#web@{A}", str(tmp_path / "a.img"), prefix=prefix)
    assert refused.returncode == 1
    assert "Permission denied" in refused.stderr


def test_a_vm_that_cannot_be_read_is_not_sound(made: Made) -> None:
    (made.root / made.vm()).chmod(0)
    try:
        verified = nbdsrv("verify", f"xo:{made.root}", prefix=hidden_from())
    finally:
        (made.root / made.vm()).chmod(0o755)
    assert verified.returncode == 1, verified
    assert f"could not be read: {made.root / made.vm()}: Permission denied" in verified.stdout


def _bad_sector(remote: object, path: str, limit: int) -> bytes:
    raise StoreError(f"{path}: {os.strerror(errno.EIO)}")


async def test_json_that_can_be_read_again(
    made: Made, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(made.root, workers) as repository:
        with monkeypatch.context() as patched:
            patched.setattr(type(repository._remote), "read", _bad_sector)
            assert [point.flags for point in await repository.points()] == [("damaged",)] * 2
        assert [point.flags for point in await repository.points()] == [(), ()]


@pytest.mark.parametrize("layout", ["vhd", "brotli"])
async def test_a_disk_that_can_be_read_again(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """That it could not be is not remembered: its file is as old and as long as before."""
    made = Made(tmp_path / "xo")
    made.point(A, [Layer(A, 2 * BLOCK, {0: block(1)}, layout=layout)])
    made.point(B, [Layer(B, 2 * BLOCK, {1: block(2)}, layout=layout, parent=A)])

    def stale(*_: object) -> bytes:
        raise StoreError(f"a file: {os.strerror(errno.ESTALE)}", errno.ESTALE)

    async with opened(made.root, workers) as repository:
        with monkeypatch.context() as patched:
            patched.setattr("nbdsrv.repository.xo.health.open_disk_file", stale)
            assert [point.flags for point in await repository.points()] == [("damaged",)] * 2
        assert [point.flags for point in await repository.points()] == [(), ()]
        assert await contents(repository, f"web@{B}") == block(1) + block(2)
