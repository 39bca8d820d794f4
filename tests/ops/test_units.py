"""The units in systemd/: what they take away is nothing that what they run needs."""

from pathlib import Path

import pytest

from nbdsrv.source import libvirt_address, qemu_address

UNITS = Path(__file__).parents[2] / "systemd"


@pytest.mark.parametrize("default", [libvirt_address.DEFAULT_SCRATCH, qemu_address.DEFAULT_SCRATCH])
def test_the_scratch_directory_of_a_backup_is_where_the_hypervisor_sees_it(default: str) -> None:
    """PrivateTmp=yes gives the unit a /var/tmp of its own, which no QEMU can enter."""
    lines = (UNITS / "nbdsrv-backup@.service").read_text().splitlines()
    assert default == "/var/tmp"
    assert not [line for line in lines if line.startswith("PrivateTmp=") and "no" not in line]
