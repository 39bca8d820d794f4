"""The parts of the QEMU source that need no QEMU: addresses, disks, checkpoints, the directory."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from nbdsrv.errors import ConfigError
from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.qemu_address import Place, parse_qemu
from nbdsrv.source.qemu_checkpoints import Base, choose_bases, new_checkpoint, superseded
from nbdsrv.source.qemu_disks import Bitmap, VmDisk, chosen_disks, disks_of, is_checkpoint
from nbdsrv.source.qemu_scratch import Scratch

# --- addresses ---------------------------------------------------------------------------------


def test_addresses() -> None:
    address = parse_qemu("/run/vm1/qmp.sock?agent=/run/a.sock&scratch=/srv/x&nbd=localhost:10809")
    assert address.monitor == Place(path="/run/vm1/qmp.sock")
    assert (address.agent, address.scratch) == ("/run/a.sock", "/srv/x")
    assert address.nbd == Place(host="localhost", port=10809)
    assert parse_qemu("[::1]:4444").monitor == Place(host="::1", port=4444)
    assert parse_qemu("./qmp").scratch == "/var/tmp"


@pytest.mark.parametrize(
    ("location", "complaint"),
    [
        ("", "path of a socket, or HOST:PORT"),
        ("qmp.sock", "path of a socket, or HOST:PORT"),
        ("example.com:4444", "QEMU must run on this host"),
        ("localhost:0", "port 0"),
        ("localhost:99999", "port 99999"),
        ("/" + "x" * 200, "socket"),
        ("/qmp?agnet=x", "unknown parameter 'agnet'; there are agent, scratch and nbd"),
        ("/qmp?agent=", "nothing behind agent="),
        ("/qmp?agent", "expected .key=value"),
        ("/qmp?nbd=nowhere", "nbd: expected the path of a socket, or HOST:PORT"),
    ],
)
def test_addresses_that_make_no_sense(location: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_qemu(location)


# --- disks -------------------------------------------------------------------------------------


def device(
    drive: str = "",
    qdev: str = "",
    node: str = "#block1",
    *,
    removable: bool = False,
    **more: object,
) -> dict:
    inserted = {"node-name": node, "drv": "raw", "ro": False, "file": "/x", **more}
    inserted["image"] = {"virtual-size": 1 << 20}
    return {"device": drive, "qdev": qdev, "removable": removable, "inserted": inserted}


def test_what_disks_are_called_and_which_are_taken() -> None:
    answer = [
        device(qdev="/machine/peripheral/virtio-disk0/virtio-backend", node="libvirt-1-format"),
        device("virtio0", "/machine/peripheral-anon/device[3]/virtio-backend"),
        device("", "/machine/peripheral-anon/device[4]", node="mine"),
        device("ide1-cd0", removable=True),
        device("pflash1", "/machine/system.flash1"),
        device("ro0", ro=True),
        {"device": "floppy0", "removable": True},
    ]
    disks = disks_of(answer, "vm")
    names = ["virtio-disk0", "virtio0", "mine", "ide1-cd0", "pflash1", "ro0"]
    assert [disk.name for disk in disks] == names
    assert [disk.name for disk in chosen_disks(disks, (), "vm")] == names[:3]
    assert [disk.name for disk in chosen_disks(disks, ["ro0", "ro0", "mine"], "vm")] == [
        "ro0",
        "mine",
    ]
    with pytest.raises(SourceError, match="no disk that can be written to"):
        chosen_disks(disks[3:], (), "vm")
    with pytest.raises(SourceError, match="two disks are called 'virtio0'"):
        disks_of([answer[1], answer[1]], "vm")


@pytest.mark.parametrize(
    ("driver", "details", "keeps"),
    [
        ("qcow2", {"compat": "1.1"}, True),
        ("qcow2", {"compat": "0.10"}, False),
        ("qcow2", {"compat": "1.1", "data-file-raw": True}, False),
        ("throttle", {}, False),
    ],
)
def test_which_images_keep_bitmaps(driver: str, details: dict, keeps: bool) -> None:
    answer = device("a", drv=driver)
    answer["inserted"]["image"]["format-specific"] = {"type": driver, "data": details}
    assert disks_of([answer], "vm")[0].keeps == keeps


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [None],
        [{"inserted": {"image": {}}, "device": ""}],
        [{"inserted": 1, "device": ""}],
        [{**device("a"), "inserted": {**device("a")["inserted"], "image": {"virtual-size": -1}}}],
        [
            {
                **device("a"),
                "inserted": {**device("a")["inserted"], "dirty-bitmaps": [{"name": "x"}]},
            }
        ],
    ],
)
def test_answers_that_make_no_sense(answer: object) -> None:
    with pytest.raises(SourceError, match="makes no sense"):
        disks_of(answer, "vm")


# --- checkpoints -------------------------------------------------------------------------------

GOOD = Bitmap("", recording=True, persistent=True, inconsistent=False, busy=False)


def names(count: int) -> list[str]:
    """From old to new."""
    found = [new_checkpoint()]
    while len(found) < count:
        found.append(new_checkpoint(found[-1]))
    return found


def disk(name: str, *checkpoints: str, **flaws: object) -> VmDisk:
    first = disks_of([device(name)], "vm")[0]
    bitmaps = {each: replace(GOOD, name=each, **flaws) for each in checkpoints}
    return replace(first, driver="qcow2", keeps=True, bitmaps={**bitmaps, "libvirt-1": GOOD})


def test_names_sort_by_time_even_if_the_clock_is_set_back() -> None:
    found = names(50)
    assert found == sorted(found)
    assert all(map(is_checkpoint, found))
    assert new_checkpoint("nbdsrv-7" + "0" * 25) > "nbdsrv-7" + "0" * 25
    assert not any(map(is_checkpoint, ("nbdsrv-since-" + found[0][7:], "nbdsrv-0", "libvirt-1")))


def test_the_best_that_all_disks_have() -> None:
    a, b, c = names(3)
    pair = [disk("x", a, b, c), disk("y", a, b)]
    assert choose_bases(pair, {"x": [c, b, a], "y": [c, b, a]}) == {"x": Base(b), "y": Base(b)}
    assert choose_bases(pair, {"x": [a, b], "y": [a, b]}) == {"x": Base(a), "y": Base(a)}
    # No common one: each its own. A disk without any does not hold the others back.
    apart = choose_bases([disk("x", c), disk("y", a), disk("z")], {"x": [c], "y": [a], "z": [c]})
    assert (apart["x"], apart["y"]) == (Base(c), Base(a))
    assert apart["z"].reason.startswith(f"checkpoint {c} is gone: the image was replaced")


def test_reasons() -> None:
    (a,) = names(1)
    assert choose_bases([disk("x", a)], {})["x"].reason == "no checkpoint of this disk is known"
    for flaw, words in (
        ({"inconsistent": True}, "is inconsistent: QEMU ended without saving it"),
        ({"recording": False}, "has been disabled by somebody else"),
        ({"busy": True}, "is in use by somebody else"),
    ):
        base = choose_bases([disk("x", a, **flaw)], {"x": [a]})["x"]
        assert base == Base(reason=f"checkpoint {a} {words}")
    raw = replace(disk("x"), keeps=False, driver="raw")
    assert "a raw disk keeps none" in choose_bases([raw], {"x": [a]})["x"].reason
    # Somebody else's bitmap is never built upon.
    assert choose_bases([disk("x", a)], {"x": ["libvirt-1"]})["x"].checkpoint == ""


def test_what_a_new_checkpoint_makes_superfluous() -> None:
    a, b, c, d = names(4)
    image = disk("x", a, b, c, d)
    assert superseded(image, Base(c), [c, a]) == [a]  # b and d may be another repository's
    assert superseded(image, Base(c), [c, b, a], needed=[a]) == [b]
    assert superseded(image, Base(reason="full"), [b, a]) == []
    assert superseded(image, Base(d), [], limit=3) == [a, b]
    assert superseded(disk("x", a, b, inconsistent=True), Base(), []) == [a, b]
    assert superseded(disk("x", a, b, busy=True), Base(b), [b, a]) == []


# --- the directory -----------------------------------------------------------------------------


def test_a_private_directory(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path), "/run/qmp.sock")
    scratch.open(None)
    assert stat.S_IMODE(os.stat(scratch.path).st_mode) == 0o700
    with pytest.raises(SourceError, match="another backup of this VM is running"):
        Scratch(str(tmp_path), "/run/qmp.sock").open(None)
    Path(scratch.fleece(0)).touch()
    Path(scratch.socket).touch()
    Path(scratch.path, "something").touch()
    assert scratch.sweep() == [scratch.fleece(0)]
    assert scratch.sweep_socket() == [scratch.socket]
    scratch.close()
    assert os.listdir(scratch.path) == ["something"]
    again = Scratch(str(tmp_path), "/run/qmp.sock")
    again.open(None)
    os.unlink(os.path.join(again.path, "something"))
    again.close()
    assert os.listdir(tmp_path) == []


def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path), "vm")
    os.mkdir(scratch.path)
    os.chmod(scratch.path, 0o755)
    with pytest.raises(SourceError, match="not private to us"):
        scratch.open(None)
    os.rmdir(scratch.path)
    os.symlink(tmp_path, scratch.path)
    with pytest.raises(SourceError):
        scratch.open(None)
    with pytest.raises(SourceError, match="No such file"):
        Scratch(str(tmp_path / "none"), "vm").open(None)
    with pytest.raises(SourceError, match="too long for a socket"):
        Scratch(str(tmp_path / ("x" * 100)), "vm").open(None)


def test_a_link_in_it_is_not_followed(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path), "vm")
    scratch.open(None)
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    os.symlink(other, scratch.marker)
    assert scratch.is_marked()
    with pytest.raises(SourceError, match="frozen: "):
        scratch.mark_frozen("/run/qga.sock")
    assert scratch.frozen_by() == ""
    scratch.mark_thawed()
    scratch.mark_frozen("/run/qga.sock")
    assert scratch.is_marked()
    assert scratch.frozen_by() == "/run/qga.sock"
    scratch.mark_thawed()
    scratch.close()
    assert other.read_bytes() == b"precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_gives_the_directory_to_the_user_qemu_runs_as(tmp_path: Path) -> None:
    for _ in range(2):
        scratch = Scratch(str(tmp_path), "vm")
        scratch.open((65534, 65534))
        assert os.stat(scratch.path).st_uid == 65534
        os.close(os.open(scratch.path, os.O_RDONLY))
        scratch._fd, fd = None, scratch._fd
        os.close(fd)
