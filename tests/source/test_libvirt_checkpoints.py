"""Which checkpoint changes are told since, and which go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.source.libvirt_checkpoints import (
    MAX_KEPT,
    Choice,
    choose,
    droppable,
    is_ours,
    token_of,
)
from nbdsrv.source.libvirt_xml import Checkpoint, DomainDisk
from nbdsrv.ulid import new_ulid

A, B, C = (f"nbdsrv-{token}" for token in (f"01HX{i:022d}" for i in (1, 2, 3)))
VDA = DomainDisk("vda", ("/vms/vda.qcow2",), "qcow2")


def made(*names: str, image: str = "/vms/vda.qcow2") -> dict[str, Checkpoint]:
    return {name: Checkpoint(name, 0, {"vda": image}) for name in names}


def test_the_first_known_one_that_is_there_is_chosen():
    assert Choice(B) == choose(VDA, [C, B, A], made(A, B), {})


@pytest.mark.parametrize(
    ("known", "checkpoints", "broken", "reason"),
    [
        ([], made(A), {}, "no repository has a point"),
        ([A], {}, {}, f"libvirt no longer has checkpoint {A}"),
        ([A], made(A), {A: "missing or broken bitmap"}, "cannot be used: missing or broken"),
        ([A], {A: Checkpoint(A, 0, {"vdb": "/x"})}, {}, "does not track vda"),
        ([A], made(A, image="/vms/vdb.qcow2"), {}, "vda is /vms/vda.qcow2 now and was /vms/vdb"),
        (["virtnbdbackup.0"], made("virtnbdbackup.0"), {}, "no longer has"),
        ([B, A], {}, {}, "(and 1 older likewise)"),
    ],
)
def test_every_full_backup_has_its_reason(known, checkpoints, broken, reason):
    choice = choose(VDA, known, checkpoints, broken)
    assert choice.since == ""
    assert reason in choice.reason


def test_a_snapshot_on_top_of_the_image_is_no_other_disk():
    disk = DomainDisk("vda", ("/vms/snapshot.qcow2", "/vms/vda.qcow2"), "qcow2")
    assert Choice(A) == choose(disk, [A], made(A), {})


def test_what_is_superseded_goes_and_what_is_needed_stays():
    checkpoints = [*made(A, B, C, "virtnbdbackup.0", "nightly").values()]
    assert [A, B] == droppable(checkpoints, C, {A, B}, (), ["vda"])
    assert [B] == droppable(checkpoints, C, {A, B}, {A}, ["vda"])


def test_what_a_disk_needs_that_was_not_backed_up_stays():
    both = Checkpoint(A, 0, {"vda": "/a", "vdb": "/b"})
    new = Checkpoint(B, 0, {"vda": "/a"})
    assert [] == droppable([both, new], B, {A}, (), ["vda", "vdb"])
    assert [A] == droppable([both, new], B, {A}, (), ["vda"])  # vdb has been detached


def test_checkpoints_of_other_repositories_stay():
    assert [B] == droppable([*made(A, B, C).values()], C, {B}, (), ["vda"])


def test_of_others_too_many_the_oldest_go():
    names = [f"nbdsrv-01HX{i:022d}" for i in range(40)]
    gone = droppable([*made(*names).values()], names[-1], (), {names[0]}, ["vda"])
    assert len(names) - len(gone) == MAX_KEPT
    assert gone == names[1 : 1 + len(gone)]


def test_nothing_goes_without_a_new_one():
    assert [] == droppable([*made(A, B).values()], C, {A, B}, (), ["vda"])
    assert [] == droppable([*made(A, B).values()], "", {A, B}, (), ["vda"])


@given(st.text(max_size=60))
def test_a_name_of_somebody_else_is_never_ours(name):
    if is_ours(name):
        assert name == f"nbdsrv-{token_of(name)}"


@pytest.mark.parametrize("name", ["virtnbdbackup.0", "nbdsrv-", "nbdsrv-vda", f"{A}x", f"my-{A}"])
def test_names_that_only_look_like_ours(name):
    assert not is_ours(name)


def test_tokens_ascend_also_when_the_clock_steps_back():
    future = "7" + "0" * 25
    assert future < new_ulid(future)
    assert is_ours(f"nbdsrv-{new_ulid()}")
    token = new_ulid()
    assert token < new_ulid(token)


def test_a_path_of_ours_names_its_backup():
    token = A.removeprefix("nbdsrv-")
    assert token == token_of(f"/var/tmp/nbdsrv-libvirt-{token}/qemu/nbd")
    assert token_of("/var/tmp/backup.XYZ.vda") is None
