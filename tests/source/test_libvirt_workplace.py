"""The directory of a backup: who may be in it, and who was."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.libvirt_workplace import Workplace, abandoned, base_of, is_occupied
from nbdsrv.ulid import new_ulid

UUID = "14541ad1-5d73-4f65-8bed-d9ab543eb1ab"


@pytest.fixture
def base():
    """Short, as a socket's path has to be."""
    with tempfile.TemporaryDirectory(prefix="lv") as path:
        yield Path(path)


def made_by_another(base: Path, *, dies: bool) -> tuple[str, "subprocess.Popen[str]"]:
    """A directory of a process that lives, or has been killed."""
    token = new_ulid()
    code = (
        "import sys, time; from nbdsrv.source.libvirt_workplace import Workplace;"
        f"place = Workplace.make({str(base)!r}, {token!r}, {UUID!r}, None);"
        "place.note_frozen(); print('made', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        (sys.executable, "-c", code),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"
    if dies:
        process.kill()
        process.wait()
        process.stdout.close()
    return token, process


def test_a_place_is_private_and_goes_with_everything_in_it(base):
    place = Workplace.make(str(base), new_ulid(), UUID, None)
    assert os.stat(place.path).st_mode & 0o777 == 0o711
    assert os.stat(Path(place.socket).parent).st_mode & 0o777 == 0o700
    Path(place.scratch("vda")).write_bytes(b"x")
    assert base_of(place.socket) == str(base)
    place.remove()
    assert list(base.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory to another user")
def test_qemu_owns_its_part_only(base):
    place = Workplace.make(str(base), new_ulid(), UUID, (12345, 54321))
    inside = os.stat(Path(place.socket).parent)
    assert (inside.st_uid, inside.st_gid) == (12345, 54321)
    assert os.stat(place.path).st_uid == 0
    place.remove()


def test_a_living_process_keeps_its_place(base):
    token, process = made_by_another(base, dies=False)
    try:
        assert is_occupied(str(base), token)
        with abandoned(str(base), UUID) as places:
            assert places == []
    finally:
        process.kill()
        process.communicate()


def test_what_a_dead_process_left_is_found_once(base):
    token, _ = made_by_another(base, dies=True)
    assert not is_occupied(str(base), token)
    with abandoned(str(base), UUID) as places:
        assert [token] == [place.token for place in places]
        assert places[0].is_frozen
        with abandoned(str(base), UUID) as others:
            assert others == []
        places[0].clear()
    with abandoned(str(base), UUID) as places:
        assert places[0].is_empty
        places[0].remove()
    with abandoned(str(base), UUID) as places:
        assert places == []


def test_other_domains_are_left_alone(base):
    token, _ = made_by_another(base, dies=True)
    with abandoned(str(base), "another") as places:
        assert places == []
    assert (base / f"nbdsrv-libvirt-{token}").is_dir()


def test_what_others_put_there_is_not_believed(base):
    (base / "elsewhere").mkdir()
    (base / f"nbdsrv-libvirt-{new_ulid()}").symlink_to(base / "elsewhere")
    (base / "nbdsrv-libvirt-x").mkdir()
    linked = base / f"nbdsrv-libvirt-{new_ulid()}"
    linked.mkdir()
    (linked / "lock").symlink_to(base / "elsewhere" / "victim")
    with abandoned(str(base), UUID) as places:
        assert places == []
    assert list((base / "elsewhere").iterdir()) == []


def test_a_path_too_long_for_a_socket_is_said(base):
    with pytest.raises(SourceError, match="too long a path"):
        Workplace.make(str(base / ("x" * 100)), new_ulid(), UUID, None)


def test_a_base_that_is_not_there_is_said(base):
    with pytest.raises(SourceError, match="No such file"):
        Workplace.make(str(base / "none"), new_ulid(), UUID, None)


def test_room_is_asked_for_as_far_as_it_can_be_needed(base):
    place = Workplace.make(str(base), new_ulid(), UUID, None)
    place.check_room(1)
    place.free = lambda: 1 << 20
    with pytest.raises(SourceError, match="1 MiB are free, and 512 needed"):
        place.check_room(1 << 40)
    place.remove()
