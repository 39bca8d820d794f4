"""Disks in OVAs are what they would be unpacked; choosing among them; packages that are refused.

::

    vm.ova    vm.ovf  vm.mf  disk1.vmdk (streamOptimized)  disk2.vmdk ...     by tarfile, qemu-img
"""

import asyncio
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.export.grammar import parse_source
from nbdsrv.export.opener import open_source
from nbdsrv.formats.opening import Opening, open_image
from nbdsrv.formats.ova.ovf import MAX_DISKS, MAX_OVF
from tests.disk.check_disk import check_disk
from tests.disk.reading import content
from tests.disk.threads import running_workers
from tests.formats.vmdk.images import golden, qemu_img, raw_file

MIB = 1 << 20
GOLDEN = golden(MIB + 512, 5)
OTHER = golden(MIB // 2, 6)
VMDK = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
ENVELOPE = """<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"
          xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
  <References>{files}</References>
  <DiskSection><Info>Disks</Info>{disks}</DiskSection>
  <VirtualSystem ovf:id="vm"><Info>A VM</Info></VirtualSystem>
</Envelope>
"""
FILE = '<File ovf:id="file{n}" ovf:href="{name}" ovf:size="1" {more}/>'
DISK = (
    '<Disk ovf:diskId="vmdisk{n}" ovf:fileRef="file{n}" ovf:capacity="1" ovf:format="{kind}"'
    " {more}/>"
)


def ovf(*names: str, kind: str = VMDK, file: str = "", disk: str = "") -> str:
    numbered = list(enumerate(names, 1))
    return ENVELOPE.format(
        files="".join(FILE.format(n=n, name=name, more=file) for n, name in numbered),
        disks="".join(DISK.format(n=n, kind=kind, more=disk) for n, _ in numbered),
    )


def pack(path: Path, members: dict[str, bytes | str], kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            raw = data.encode() if isinstance(data, str) else data
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Images by name."""
    directory = tmp_path_factory.mktemp("disks")
    found = {}
    for name, kind, options, raw in (
        ("disk1.vmdk", "vmdk", ["-o", "subformat=streamOptimized"], GOLDEN),
        ("disk2.vmdk", "vmdk", [], OTHER),
        ("disk.qcow2", "qcow2", [], OTHER),
    ):
        source = raw_file(directory / "raw", raw)
        qemu_img("convert", "-f", "raw", "-O", kind, *options, source, directory / name)
        found[name] = (directory / name).read_bytes()
    return found


@pytest.fixture
def ova(tmp_path: Path, disks: dict[str, bytes]) -> Path:
    text = ovf("disk1.vmdk")
    manifest = f"SHA256(vm.ovf)= {hashlib.sha256(text.encode()).hexdigest()}\n"
    members = {"vm.ovf": text, "vm.mf": manifest, "disk1.vmdk": disks["disk1.vmdk"]}
    return pack(tmp_path / "vm.ova", members)


@pytest.fixture
def two(tmp_path: Path, disks: dict[str, bytes]) -> Path:
    members = {"vm.ovf": ovf("disk1.vmdk", "disk2.vmdk"), **disks}
    return pack(tmp_path / "two.ova", members)


async def opened(workers: Workers, source: Path | str) -> Disk:
    return await open_source(parse_source(str(source)), workers)


async def refusal(workers: Workers, source: Path | str) -> str:
    with pytest.raises(DiskError) as raised:
        await opened(workers, source)
    assert "\n" not in str(raised.value)
    return str(raised.value)


async def test_contract(ova: Path, workers: Workers) -> None:
    await check_disk(lambda: opened(workers, ova), GOLDEN)


async def test_facts(ova: Path, workers: Workers) -> None:
    disk = await opened(workers, ova)
    facts = disk.facts
    assert disk.format == "ova"
    assert (facts["member"], facts["disk_id"]) == ("disk1.vmdk", "vmdisk1")
    assert (facts["disks"], facts["manifest"]) == (["disk1.vmdk"], "vm.mf")
    assert facts["image"]["format"] == "vmdk"  # type: ignore[index]
    assert facts["image"]["create_type"] == "streamOptimized"  # type: ignore[index]
    await disk.close()


@pytest.mark.parametrize(
    ("member", "expected"),
    [("disk1.vmdk", GOLDEN), ("disk2.vmdk", OTHER), ("vmdisk1", GOLDEN), ("vmdisk2", OTHER)],
)
async def test_choosing_a_disk(two: Path, member: str, expected: bytes, workers: Workers) -> None:
    disk = await opened(workers, f"{two}#{member}")
    assert await content(disk, 0, disk.size) == expected
    await disk.close()


async def test_a_choice_that_is_open_or_wrong_lists_the_disks(two: Path, workers: Workers) -> None:
    text = await refusal(workers, two)
    assert f"2 disks, choose one by {two}#NAME: 'disk1.vmdk', 'disk2.vmdk'" in text
    text = await refusal(workers, f"{two}#disk3.vmdk")
    assert "no disk 'disk3.vmdk' in it, only 'disk1.vmdk', 'disk2.vmdk'" in text


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
async def test_long_and_escaped_names(
    tmp_path: Path, disks: dict[str, bytes], kind: int, workers: Workers
) -> None:
    name = "ü" * 90 + " disk.vmdk"
    members = {"vm.ovf": ovf(name.replace(" ", "%20")), name: disks["disk2.vmdk"]}
    path = pack(tmp_path / "vm.ova", members, kind)
    disk = await open_image(str(path), "ova", Opening(workers))
    assert await content(disk, 0, disk.size) == OTHER
    await disk.close()


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
async def test_images_of_other_formats(
    tmp_path: Path, disks: dict[str, bytes], kind: str, workers: Workers
) -> None:
    inside = disks["disk.qcow2"] if kind == "qcow2" else OTHER
    members = {"vm.ovf": ovf("disk", kind="http://example.com/other"), "disk": inside}
    path = pack(tmp_path / "vm.ova", members)
    disk = await opened(workers, path)
    assert await content(disk, 0, disk.size) == OTHER
    assert disk.facts["image"]["format"] == kind  # type: ignore[index]
    await disk.close()


async def test_disks_without_content_are_none(
    tmp_path: Path, disks: dict[str, bytes], workers: Workers
) -> None:
    text = ovf("disk1.vmdk").replace("<Info>Disks</Info>", '<Disk ovf:diskId="empty"/>')
    path = pack(tmp_path / "vm.ova", {"vm.ovf": text, **disks})
    disk = await opened(workers, path)
    assert disk.facts["disks"] == ["disk1.vmdk"]
    await disk.close()


def delta(directory: Path) -> bytes:
    qemu_img("create", "-f", "vmdk", directory / "base.vmdk", MIB)
    given = ["-F", "vmdk", "-b", directory / "base.vmdk", directory / "delta.vmdk"]
    qemu_img("create", "-f", "vmdk", *given)
    return (directory / "delta.vmdk").read_bytes()


def qcow2_with_data_file(directory: Path) -> bytes:
    options = f"data_file={directory / 'data'}"
    qemu_img("create", "-f", "qcow2", "-o", options, directory / "image", MIB)
    return (directory / "image").read_bytes()


def text_descriptor(directory: Path) -> bytes:
    options = "subformat=monolithicFlat"
    qemu_img("create", "-f", "vmdk", "-o", options, directory / "flat.vmdk", MIB)
    return (directory / "flat.vmdk").read_bytes()


@pytest.mark.parametrize("make", [delta, text_descriptor, qcow2_with_data_file])
async def test_disks_that_need_files_of_the_host(tmp_path: Path, make, workers: Workers) -> None:
    members = {"vm.ovf": ovf("disk", kind="other"), "disk": make(tmp_path)}
    path = pack(tmp_path / "vm.ova", members)
    assert "'disk' needs files outside the archive; not followed" in await refusal(workers, path)
    assert [] == files_open_in(tmp_path)


def files_open_in(directory: Path) -> list[str]:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.islink(link)]
    return [target for target in targets if target.startswith(str(directory))]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (ovf("gone.vmdk"), "at 0: disk 'gone.vmdk' is not in the archive"),
        (ovf(), "no disks in the archive"),
        (ovf("vm.mf"), "disk 'vm.mf' is not the VMDK it should be"),
        (
            ovf("disk1.vmdk", file='ovf:compression="gzip"'),
            "compressed as a whole ('gzip')",
        ),
        (ovf("disk1.vmdk", file='ovf:chunkSize="100"'), "is in chunks; unpack it"),
        (ovf("disk1.vmdk", disk='ovf:parentRef="base"'), "is a delta; unpack it"),
        (ovf("empty", kind="raw"), "disk 'empty' is empty"),
        (ovf("nested", kind="x"), "disk 'nested': gzip images in an OVA are not served"),
        (
            ovf("a").replace('fileRef="file1"', 'fileRef="file9"'),
            "is in a file 'file9'",
        ),
        (ovf("a", "b").replace('id="file2"', 'id="file1"'), "two files with the id 'file1'"),
        (ovf(*map(str, range(MAX_DISKS + 1))), f"more than {MAX_DISKS} disks"),
        (ovf("disk1.vmdk")[:-8], "the OVF is no XML"),
        ("", "the OVF is no XML: no element found"),
        (ovf("a").replace("UTF-8", "KLINGON"), "the OVF cannot be decoded"),
        (ovf("a").replace("?>\n", "?>\n<!DOCTYPE Envelope>"), "the OVF has a document type"),
        (
            '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><x>&b;</x>',
            "the OVF has a document type",
        ),
        ('<!DOCTYPE x SYSTEM "file:///etc/passwd"><x/>', "the OVF has a document type"),
        (" " * (MAX_OVF + 1), f"an OVF of {MAX_OVF + 1} bytes"),
    ],
    ids=range(18),
)
async def test_packages_that_are_refused(
    tmp_path: Path, disks: dict[str, bytes], text: str, what: str, workers: Workers
) -> None:
    nested = b"\x1f\x8b\x08" + bytes(600)
    members = {"vm.ovf": text, "vm.mf": b"x" * 600, "empty": b"", "nested": nested, **disks}
    path = pack(tmp_path / "vm.ova", members)
    found = await refusal(workers, path)
    assert what in found
    assert str(path) in found


async def test_archives_that_are_no_ova(tmp_path: Path, workers: Workers) -> None:
    path = pack(tmp_path / "vm.ova", {"disk1.vmdk": b"x"})
    with pytest.raises(CorruptImage, match=r"no \.ovf in the archive"):
        await open_image(str(path), "ova", Opening(workers))
    path = pack(tmp_path / "vm.ova", {"vm.ovf": ovf("a")})
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("vm.ovf"))
    with pytest.raises(CorruptImage, match=r"a second member named vm\.ovf"):
        await open_image(str(path), "ova", Opening(workers))


async def test_cut_off_anywhere(ova: Path, workers: Workers) -> None:
    whole = ova.read_bytes()
    for size in (0, 100, 512, 1000, 3000, len(whole) // 2, len(whole) - 12000):
        ova.write_bytes(whole[:size])
        with pytest.raises(DiskError):
            await open_image(str(ova), "ova", Opening(workers))


async def test_a_member_is_read_only_within_itself(
    tmp_path: Path, disks: dict[str, bytes], workers: Workers
) -> None:
    cut = disks["disk2.vmdk"][:-65536]
    members = {"vm.ovf": ovf("disk"), "disk": cut, "behind": disks["disk2.vmdk"]}
    path = pack(tmp_path / "vm.ova", members)
    disk = await opened(workers, path)
    with pytest.raises(CorruptImage, match="lies beyond the end of the file"):
        await content(disk, 0, disk.size)
    await disk.close()


def test_any_ovf_is_understood_or_refused(tmp_path: Path, disks: dict[str, bytes]) -> None:
    text = ovf("disk2.vmdk").encode()

    @given(st.integers(0, len(text)), st.binary(min_size=1, max_size=30))
    @settings(max_examples=150, suppress_health_check=list(HealthCheck))
    def mutated(at: int, junk: bytes) -> None:
        mutant = text[:at] + junk + text[at + len(junk) :]
        path = pack(tmp_path / "vm.ova", {"vm.ovf": mutant, **disks})
        assert "\n" not in asyncio.run(outcome(path))

    mutated()


async def outcome(path: Path) -> str:
    """The error, "" if there is none."""
    async with running_workers() as workers:
        try:
            disk = await open_image(str(path), "ova", Opening(workers))
        except DiskError as error:
            return str(error)
        await disk.close()
    return ""
