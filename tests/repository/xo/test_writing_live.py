"""Running VMs into Xen Orchestra repositories: checkpoints, records, and two kinds at once."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nbdsrv.backup.engine import Order
from nbdsrv.backup.live import LiveBackup, LiveReport
from nbdsrv.disk.workers import Workers
from nbdsrv.repository.destination import Destination, Occasion
from nbdsrv.repository.native.destination import NativeDestination
from nbdsrv.repository.xo.writer_points import XoPoint
from nbdsrv.repository.xo.writer_records import JOB, machine_of, vm_of_group
from tests.backup.machine import TrackedVm, as_machine
from tests.repository.native.read_back import fresh_vault, noise
from tests.repository.xo.independent import Decoder, all_points
from tests.repository.xo.written import MIB, make_remote, opened

VM = "b0a7e4c2-5d1f-4c8e-9a53-0000000000aa"
VDI = "cccccccc-0000-4000-8000-000000000003"
SNAPSHOT = "eeeeeeee-0000-4000-8000-000000000001"


async def back_up(
    workers: Workers, targets: list[Destination], vm: TrackedVm, order: Order | None = None
) -> LiveReport:
    work = LiveBackup(targets, workers, order or Order(""))
    return await work.run(as_machine(vm))


def modes(report: LiveReport) -> list[str]:
    return [disk.mode for disk in report.report.disks]


async def test_both_kinds_build_upon_the_same_checkpoint(tmp_path: Path, workers: Workers) -> None:
    dice = random.Random(2)
    root, vault = make_remote(tmp_path / "r"), fresh_vault()
    vm = TrackedVm("web", {"vda": bytearray(noise(5 * MIB)), "vdb": bytearray(3 * MIB)})
    expected = []
    for number in range(4):
        target = opened(root)
        targets = [NativeDestination(vault), target]
        report = await back_up(workers, targets, vm)
        assert modes(report) == ["incremental" if number else "full"] * 4
        expected.append({name: bytes(content) for name, content in vm.content.items()})
        points = [target.point(key) for key in target.stored("web")]
        cbt = points[-1].disks[0].cbt
        assert cbt is not None
        assert vm.moments[cbt["id"]]["vda"] == expected[-1]["vda"]
        target.close()
        for name, content in vm.content.items():
            vm.write(name, dice.randrange(len(content)), dice.randbytes(5000))
    assert [*all_points(root).values()] == expected
    (metadata,) = {vbd["userdevice"] for vbd in _latest(root)["vbds"].values()} - {"0"}
    assert metadata == "1"


async def test_one_that_missed_a_backup_catches_up(tmp_path: Path, workers: Workers) -> None:
    """Then changes are told since the older point; the disk lies upon the latest all the same."""
    first, second = make_remote(tmp_path / "a"), make_remote(tmp_path / "b")
    vm = TrackedVm("web", {"vda": bytearray(noise(7 * MIB))})
    targets: list[Destination] = [opened(first), opened(second)]
    await back_up(workers, targets, vm)
    vm.write("vda", 0, noise(100))
    await back_up(workers, targets[:1], vm)
    vm.write("vda", 5 * MIB, noise(100))
    report = await back_up(workers, targets, vm)
    assert modes(report) == ["incremental", "incremental"]
    for root in (first, second):
        assert [*all_points(root).values()][-1] == {"vda": vm.content["vda"]}
    for target in targets:
        target.close()


def _latest(root: Path) -> dict[str, Any]:
    points = Decoder(root).points()
    return points[max(points)]


def xapi_occasion() -> Occasion:
    vm = {"uuid": VM, "name_label": "research-vm", "memory_static_max": 1 << 32, "tags": ["a"]}
    disks = {"xvda": {"vdi": VDI, "snapshot": SNAPSHOT, "name": "root", "userdevice": "0"}}
    cards = [{"device": "0", "MAC": "aa:bb:cc:dd:ee:ff", "MTU": 1500, "network": "Pool-wide"}]
    blobs = {
        "hypervisor": "xapi",
        "vm": json.dumps(vm),
        "disks.json": json.dumps(disks),
        "cards": json.dumps(cards),
    }
    return Occasion("research-vm", blobs=blobs)


async def test_the_records_of_xapi_are_kept(tmp_path: Path, workers: Workers) -> None:
    root = make_remote(tmp_path / "r")
    target = opened(root)
    parent: XoPoint | None = None
    for _ in range(2):
        writer = await target.begin(workers, xapi_occasion(), parent)
        disk = await writer.disk("xvda", 4 * MIB)
        disk.facts.update(cbt={"kind": "xapi", "id": SNAPSHOT})
        assert await disk.wanted() == []
        await disk.data(0, bytearray(noise(2 * MIB)), 2 * MIB)
        await writer.commit({})
        parent = target.point(target.stored("research-vm")[-1])
    assert {path.parent.name for path in root.glob("xo-vm-backups/*/*.json")} == {VM}
    (vdi,) = root.glob(f"xo-vm-backups/{VM}/vdis/{JOB}/*")
    assert vdi.name == VDI
    first, second = Decoder(root).points().values()
    assert [row["uuid"] for row in first["vdis"].values()] == [SNAPSHOT]
    assert [row["uuid"] for row in second["vdis"].values()] != [SNAPSHOT]  # ids are unique there
    assert second["vm"]["memory_static_max"] == 1 << 32
    assert second["vm"]["tags"] == ["a"]
    assert second["vmSnapshot"]["suspend_VDI"] == "OpaqueRef:NULL"
    (card,) = second["vifs"].values()
    assert (card["MAC"], card["$network$name_label"]) == ("aa:bb:cc:dd:ee:ff", "Pool-wide")
    assert [row["name_label"] for row in second["vdis"].values()] == ["root"]
    target.close()


@pytest.mark.parametrize(
    "blobs",
    [
        {},
        {"hypervisor": "xapi", "vm": "["},
        {"hypervisor": "xapi", "vm": json.dumps({"uuid": "../../../etc"})},
        {"hypervisor": "xapi", "vm": json.dumps({"uuid": 7}), "disks.json": "[]"},
        {"hypervisor": "libvirt", "domain_xml": "<memory unit='x'>" + "9" * 99},
    ],
)
def test_what_is_no_record_is_a_plain_vm(blobs: dict[str, str]) -> None:
    machine = machine_of(Occasion("web", blobs=blobs))
    assert machine.uuid == vm_of_group("web")
    assert machine.vdi("sda") != machine.vdi("sdb")


def test_memory_and_processors_of_libvirt() -> None:
    text = "<domain><memory unit='MiB'>512</memory><vcpu placement='static'>3</vcpu></domain>"
    record = machine_of(Occasion("web", blobs={"hypervisor": "libvirt", "domain_xml": text})).record
    assert record["memory_static_max"] == 512 << 20
    assert record["VCPUs_max"] == 3
