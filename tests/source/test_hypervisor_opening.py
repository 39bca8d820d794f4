"""Which VM and which disk a SOURCE names; one freeze at a time."""

from pathlib import Path

import pytest

from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import parse_source
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.opening import machine_of, open_hypervisor
from nbdsrv.source.turn import lock_directory, turn
from tests.disk.threads import running_workers


@pytest.mark.parametrize(
    ("text", "vm", "disk"),
    [
        ("qemu:/run/qmp.sock", "qemu:/run/qmp.sock", ""),
        ("qemu:/run/qmp.sock#vda", "qemu:/run/qmp.sock", "vda"),
        ("libvirt:qemu:///system#web", "libvirt:qemu:///system#web", ""),
        ("libvirt:qemu:///system#web/vda", "libvirt:qemu:///system#web", "vda"),
        ("xapi://root@host#web/xvda", "xapi://root@host#web", "xvda"),
        ("xapi://root@host#a%2Fb/my%20disk", "xapi://root@host#a/b", "my disk"),
    ],
)
def test_what_a_source_names(text: str, vm: str, disk: str) -> None:
    assert machine_of(parse_source(text)) == (vm, disk)


async def test_disks_of_one_vm() -> None:
    async with running_workers() as workers:
        sources = [parse_source(f"qemu:/run/a.sock#{disk}") for disk in ("vdb", "vda", "vdb")]
        machine = open_hypervisor(sources, workers)
        assert (machine.kind, machine.place) == ("qemu", "qemu:/run/a.sock")
        assert machine.disks == ("vdb", "vda")
        all_of_it = [*sources, parse_source("qemu:/run/a.sock")]
        assert open_hypervisor(all_of_it, workers).disks == ()
        with pytest.raises(ConfigError, match="is no running VM"):
            open_hypervisor([parse_source("disk.qcow2")], workers)


def test_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with turn("vm"):
        with pytest.raises(SourceError, match="wait until it has ended"), turn("vm"):
            raise AssertionError("two at a time")
        with turn("another"):
            pass
    with turn("vm"):
        pass
    assert lock_directory() == str(tmp_path / "nbdsrv")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = Path(lock_directory())
    assert path.parent == tmp_path
    assert path.stat().st_mode & 0o777 == 0o700
    path.rmdir()
    path.symlink_to(tmp_path)
    with pytest.raises(SourceError, match="not a directory of this user"):
        lock_directory()
