"""What lies in a repository is anybody's: it may cost a full backup, never content or the host."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdsrv.backup.engine import Order
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.xo.checksums import About, ChecksumFile, Sums, checksum_name, encode, sum_of
from nbdsrv.repository.xo.sealing import Sealing
from nbdsrv.repository.xo.writer_lineage import read_lineage
from nbdsrv.store.directory_tree import DirectoryTree
from tests.backup.tracked import Guest, back_up
from tests.repository.native.read_back import noise
from tests.repository.xo.independent import all_points
from tests.repository.xo.written import MIB, files, make_remote, opened

UUID = "eeeeeeee-0000-4000-8000-000000000001"


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutants_of_checksums(tmp_path: Path, data: st.DataObject) -> None:
    sums = Sums()
    for block in range(0, 3000, 7):
        sums.put(block, sum_of(str(block).encode()))
    about = About(uuid=UUID, name="sda", size=3000 * 2 * MIB, point="20260101T000000Z")
    raw = bytearray(encode(about, sums, Sealing.none()))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                raw[at] ^= data.draw(st.integers(1, 255))
            case 1:
                del raw[at:]
                break
            case _:
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    (tmp_path / checksum_name(UUID)).write_bytes(raw)
    tree = DirectoryTree(str(tmp_path))
    try:
        found = ChecksumFile.load(tree, "", UUID, Sealing.none())
        assert found is not None
        # Whatever it was, what it says is what was stored.
        assert [block for block, _ in found.rows()] == [*range(0, 3000, 7)]
        assert found.check(7, b"7") is True
        assert found.check(8, b"7") is None
    except DiskError:
        pass
    finally:
        tree.close()


def test_ancestors_that_go_round(tmp_path: Path) -> None:
    other = UUID[:-1] + "2"
    for uuid, parent in ((UUID, other), (other, UUID)):
        about = About(uuid=uuid, parent=parent, name="sda", size=1, point="20260101T000000Z")
        content = encode(about, Sums(), Sealing.none())
        (tmp_path / checksum_name(uuid)).write_bytes(content)
    tree = DirectoryTree(str(tmp_path))
    found = ChecksumFile.load(tree, "", UUID, Sealing.none())
    assert found is not None
    with pytest.raises(CorruptImage, match="its own ancestor"):
        found.check(0, b"")
    assert ChecksumFile.load(tree, "", "../../etc/passwd", Sealing.none()) is None
    tree.close()


def _prepared(root: Path) -> tuple[Path, Path]:
    (vdi,) = root.glob("xo-vm-backups/*/vdis/*/*")
    return vdi.parent.parent.parent, vdi


@pytest.mark.parametrize(
    "harm",
    [
        "no checksums",
        "broken checksums",
        "broken parent",
        "alias out",
        "broken point",
        "huge point",
        "deep point",
        "paths out",
        "missing block table",
    ],
)
async def test_a_broken_parent_costs_a_full_backup(
    tmp_path: Path, workers: Workers, harm: str
) -> None:
    root = make_remote(tmp_path / "r")
    target, guest = opened(root), Guest(bytearray(noise(3 * MIB)))
    await back_up(workers, target, guest)
    await back_up(workers, target, guest)
    vm, vdi = _prepared(root)
    sums, points = sorted(vdi.glob(".*.nbdsrv")), sorted(vm.glob("2*.json"))
    aliases, data = sorted(vdi.glob("2*.vhd")), sorted((vdi / "data").iterdir())
    if harm == "no checksums":
        for path in sums:
            path.unlink()
    elif harm == "broken checksums":
        for path in sums:
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif harm == "broken parent":
        (data[0] / "footer").write_bytes(b"x")
    elif harm == "alias out":
        aliases[0].write_text("../../../../../../../../../etc")
    elif harm == "broken point":
        points[1].write_bytes(b"{")
    elif harm == "huge point":
        with points[1].open("r+b") as file:
            file.truncate(1 << 30)
    elif harm == "deep point":
        points[1].write_bytes(b'{"vhds":' + b"[" * 1_000_000)
    elif harm == "paths out":
        row = json.loads(points[1].read_bytes())
        row["vhds"] = dict.fromkeys(row["vhds"], "../../../../../etc/passwd")
        points[1].write_text(json.dumps(row))
    else:
        (data[0] / "header").unlink()
    was = files(root)
    guest.write(0, noise(10))
    (disk,) = (await back_up(workers, target, guest, Order("vm"))).disks
    assert set(was) - {"xo-vm-backups"} <= set(files(root))  # nothing goes where anything is broken
    (vm / "cache.json.gz").unlink(missing_ok=True)
    for path in points:
        path.unlink()
    # By itself, or upon a parent that is whole: the strict decoder reads it.
    assert [*all_points(root).values()] == [{"disk": guest.content}], (harm, disk.mode)
    target.close()


def test_a_member_with_two_children_is_no_parent(tmp_path: Path) -> None:
    root = make_remote(tmp_path / "r")
    target = opened(root)
    lineage = read_lineage(target.remote, "xo-vm-backups/none")
    assert lineage.members == {}
    assert lineage.find(UUID) is None
    target.close()
