"""Names of disks that nobody has named."""

import pytest

from nbdsrv.backup.naming import disk_name
from nbdsrv.export.grammar import parse_source


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/vms/web.qcow2", "web"),
        ("qcow2:/vms/web.one.qcow2@snapshot", "web.one"),
        ("/vms/appliance.ova#disk1.vmdk", "appliance"),
        ("/vms/web.raw~p2", "web-p2"),
        ("/dev/sda", "sda"),
        ("nbd://host/vm1/sda", "sda"),
        ("nbd://host/vm1/sda@01M8ACN04Q71XGX9DENYQBE3YK", "sda"),
        ("nbd://host", "disk"),
        ("nbd+unix:///sda?socket=/run/s", "sda"),
        ("repo:/path#vm1/sda@latest", "sda"),
        ("repo:/path#vm1/sda", "sda"),
        ("repo:/path#@latest", "disk"),
        ("repo:/path", "disk"),
    ],
)
def test_a_name(text: str, name: str) -> None:
    assert disk_name(parse_source(text)) == name
