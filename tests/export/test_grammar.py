"""SOURCE: every form of the grammar, and nothing but ConfigError for the rest."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import Kind, Source, parse_source

IMAGE, NBD, REPOSITORY, HYPERVISOR = Kind.IMAGE, Kind.NBD, Kind.REPOSITORY, Kind.HYPERVISOR

FORMS: list[tuple[str, Kind, str, str, str, int | None]] = [
    # text, kind, scheme, location, selector, partition
    ("disk.qcow2", IMAGE, "", "disk.qcow2", "", None),
    ("/path/disk.vmdk", IMAGE, "", "/path/disk.vmdk", "", None),
    ("qcow2:/path", IMAGE, "qcow2", "/path", "", None),
    ("raw:/path", IMAGE, "raw", "/path", "", None),
    ("vhd:/path", IMAGE, "vhd", "/path", "", None),
    ("vhdx:/path", IMAGE, "vhdx", "/path", "", None),
    ("vmdk:/path", IMAGE, "vmdk", "/path", "", None),
    ("vdi:/path", IMAGE, "vdi", "/path", "", None),
    ("nbd://host/disk", NBD, "nbd", "nbd://host/disk", "", None),
    ("nbds://host:1/", NBD, "nbds", "nbds://host:1/", "", None),
    ("nbd+unix:///d?socket=/s", NBD, "nbd+unix", "nbd+unix:///d?socket=/s", "", None),
    ("nbds+unix:///?socket=/s", NBD, "nbds+unix", "nbds+unix:///?socket=/s", "", None),
    ("NBD+Unix:///?socket=/s", NBD, "nbd+unix", "NBD+Unix:///?socket=/s", "", None),
    ("nbd+vsock://2/disk", NBD, "nbd+vsock", "nbd+vsock://2/disk", "", None),
    ("repo:/path", REPOSITORY, "repo", "/path", "", None),
    ("repo+s3://bucket/prefix", REPOSITORY, "repo+s3", "//bucket/prefix", "", None),
    ("xo:/path", REPOSITORY, "xo", "/path", "", None),
    ("pbs:/path", REPOSITORY, "pbs", "/path", "", None),
    ("virtnbdbackup:/path", REPOSITORY, "virtnbdbackup", "/path", "", None),
    ("casync:/path/index.caibx", REPOSITORY, "casync", "/path/index.caibx", "", None),
    ("benji:/path", REPOSITORY, "benji", "/path", "", None),
    ("restic:/path", REPOSITORY, "restic", "/path", "", None),
    ("borg:/path", REPOSITORY, "borg", "/path", "", None),
    ("repo:/p#vm/sda@latest", REPOSITORY, "repo", "/p", "vm/sda@latest", None),
    ("repo:/p#vm", REPOSITORY, "repo", "/p", "vm", None),
    ("repo:/p#", REPOSITORY, "repo", "/p", "", None),
    ("xo:/p#a/b@2024-02-29~p2", REPOSITORY, "xo", "/p", "a/b@2024-02-29", 2),
    ("qemu:/run/qmp.sock#drive0", HYPERVISOR, "qemu", "/run/qmp.sock", "drive0", None),
    ("libvirt:qemu:///system#vm/vda", HYPERVISOR, "libvirt", "qemu:///system", "vm/vda", None),
    ("xapi://root@host#vm/0", HYPERVISOR, "xapi", "//root@host", "vm/0", None),
    ("disk.img~p1", IMAGE, "", "disk.img", "", 1),
    ("raw:/dev/sda~p128", IMAGE, "raw", "/dev/sda", "", 128),
    ("nbd://host/disk~p3", NBD, "nbd", "nbd://host/disk", "", 3),
    # A file may be called almost anything.
    ("disk~p", IMAGE, "", "disk~p", "", None),
    ("disk~px", IMAGE, "", "disk~px", "", None),
    ("disk~p1.img", IMAGE, "", "disk~p1.img", "", None),
    ("disk#1.img", IMAGE, "", "disk#1.img", "", None),
    ("strange:name", IMAGE, "", "strange:name", "", None),
    ("C:name", IMAGE, "", "C:name", "", None),
    ("NBD:name", IMAGE, "", "NBD:name", "", None),
    ("nbd+vsock:name", IMAGE, "", "nbd+vsock:name", "", None),
    ("./qcow2:disk", IMAGE, "", "./qcow2:disk", "", None),
    ("raw:qcow2:disk", IMAGE, "raw", "qcow2:disk", "", None),
    ("raw:a#b", IMAGE, "raw", "a#b", "", None),
    ("two\nlines", IMAGE, "", "two\nlines", "", None),
    ("disk~p1~p2", IMAGE, "", "disk~p1", "", 2),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[0])
def test_every_form(form: tuple[str, Kind, str, str, str, int | None]) -> None:
    assert parse_source(form[0]) == Source(*form)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("~p1", "empty"),
        ("disk~p0", "1 to 128"),
        ("disk~p129", "1 to 128"),
        ("disk~p99999999999999999999", "1 to 128"),
        ("raw:", "nothing behind raw:"),
        ("qcow2:", "nothing behind qcow2:"),
        ("repo:", "nothing behind repo:"),
        ("repo:#vm", "nothing behind repo:"),
        ("libvirt:", "nothing behind libvirt:"),
        ("raw:~p1", "nothing behind raw:"),
    ],
)
def test_refusals_say_why(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_source(text)


def test_a_partition_number_of_any_length_is_refused() -> None:
    with pytest.raises(ConfigError):
        parse_source("disk~p" + "1" * 5000)


SCHEMES = ["raw", "qcow2", "nbd", "nbd+unix", "repo", "repo+s3", "xo", "qemu", "libvirt", "xapi"]
pieces = st.sampled_from([*SCHEMES, ":", "//", "#", "~p", "~p1", "0", "/", "@", "disk", "\n", ""])


@given(st.text() | st.lists(pieces, max_size=8).map("".join))
@example("~p")
@example(":")
@example("nbd:")
def test_any_text_is_a_source_or_a_config_error(text: str) -> None:
    try:
        source = parse_source(text)
    except ConfigError:
        return
    assert source.text == text
    assert source.location
    assert source.location in text
    assert source.selector in text
    assert source.partition is None or 1 <= source.partition <= 128
    assert source.kind is IMAGE or source.scheme
