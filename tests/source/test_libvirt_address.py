"""``libvirt:URI#DOMAIN/TARGET`` and our parameters in it."""

import pytest

from nbdsrv.errors import ConfigError
from nbdsrv.source.libvirt_address import LibvirtAddress, parse_libvirt


@pytest.mark.parametrize(
    ("location", "selector", "expected"),
    [
        ("qemu:///system", "web", LibvirtAddress("qemu:///system", "web")),
        ("qemu:///system", "web/vda", LibvirtAddress("qemu:///system", "web", "vda")),
        (
            "qemu:///system?socket=/run/a&scratch=/srv/my%20scratch&agent=off",
            "web",
            LibvirtAddress(
                "qemu:///system?socket=/run/a", "web", scratch="/srv/my scratch", agent="off"
            ),
        ),
        (
            "qemu+ssh://root@host/system?keyfile=/k&listen=[fd00::1]:10809-10811&tls=/pki",
            "web",
            LibvirtAddress(
                "qemu+ssh://root@host/system?keyfile=/k",
                "web",
                remote=True,
                host="fd00::1",
                ports=(10809, 10810, 10811),
                tls="/pki",
            ),
        ),
    ],
)
def test_addresses(location, selector, expected):
    assert expected == parse_libvirt(location, selector)


@pytest.mark.parametrize(
    ("location", "selector", "saying"),
    [
        ("system", "web", "not a URI of libvirt"),
        ("qemu:///system", "", "name the domain"),
        ("qemu:///system", "web/", "name the domain"),
        ("qemu:///system?agent=maybe", "web", "agent=maybe is none of"),
        ("qemu:///system?scratch=tmp", "web", "not an absolute path"),
        ("qemu:///system?scratch=", "web", "scratch= with a value"),
        ("qemu:///system?agent=off&agent=off", "web", "one agent="),
        ("qemu+ssh://host/system", "web", "add ?listen="),
        ("qemu:///system?tls=/pki", "web", "goes with listen="),
        ("qemu:///system?listen=10809", "web", "is not ADDRESS:PORT"),
        ("qemu:///system?listen=a:2-1", "web", "ascending"),
        ("qemu:///system?listen=a:1-60000", "web", "at most"),
        ("qemu:///system?listen=a:99999", "web", "port 99999"),
        ("qemu:///system?listen=a:0", "web", "port 0"),
    ],
)
def test_what_makes_no_sense_is_said(location, selector, saying):
    with pytest.raises(ConfigError, match=saying.replace("?", r"\?")):
        parse_libvirt(location, selector)
