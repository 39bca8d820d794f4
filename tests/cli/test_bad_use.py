"""Bad use: one line on standard error that says what and where, exit code 1 or 2, no traceback.

Exit code 2 is for what the user wrote, 1 for what the world is like.
"""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from authority import Certificates
from cryptography.hazmat.primitives import serialization

from nbdsrv.export.grammar import NATIVE, REPOSITORIES
from tests.cli.program import hidden_from, nbdsrv, refusal

FAILED, USAGE = 1, 2
COMMANDS = ("serve", "info", "map")


# --- sources -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_file(tmp_path: Path, command: str) -> None:
    path = tmp_path / "nothing.img"
    assert refusal(FAILED, command, path) == f"nbdsrv: {path}: No such file or directory\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_directory(tmp_path: Path, command: str) -> None:
    said = refusal(FAILED, command, tmp_path)
    assert f"{tmp_path}: is a directory" in said
    assert f"repo:{tmp_path}" in said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("ndb://localhost/x", "no SOURCE begins with 'ndb:'; did you mean nbd"),
        ("nbd//localhost", "no SOURCE begins with 'nbd//'; did you mean nbd"),
        ("qcow3:disk.img", "did you mean qcow: or qcow2:?"),
        ("http://host/disk.img", "docs/usage.md"),
        ("vpc:disk.img", "did you mean vhd:?"),
    ],
)
def test_a_kind_of_source_that_there_is_not(command: str, source: str, words: str) -> None:
    said = refusal(USAGE, command, source)
    assert said.startswith(f"nbdsrv: {source}: no such file")
    assert words in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("backup", "disk.img"), "Missing option '--to'; see `nbdsrv backup --help`"),
        (("help",), "No such command 'help'; see `nbdsrv --help`"),
        (("key", "show"), "No such command 'show'; see `nbdsrv key --help`"),
        (("serve", "--writ"), "No such option '--writ'. Did you mean '--write'?"),
    ],
)
def test_where_there_is_more_help(arguments: tuple[str, ...], said: str) -> None:
    assert refusal(USAGE, *arguments) == f"nbdsrv: {said}\n"


def test_a_file_whose_name_looks_like_a_kind(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(disk.parent)
    disk.rename(disk.parent / "old:disk.img")
    done = nbdsrv("info", "old:disk.img")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_device_that_is_not_there_does_not_become_a_file(disk: Path) -> None:
    for target in ("/dev/nosuchdisk", "raw:/dev/nosuchdisk"):
        assert refusal(USAGE, "copy", disk, target) == f"nbdsrv: {target}: no such device\n"
    assert not Path("/dev/nosuchdisk").exists()


def test_serving_a_directory_for_writing(tmp_path: Path) -> None:
    assert "irectory" in refusal(FAILED, "serve", "--write", tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_fifo(tmp_path: Path, command: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "neither a regular file nor a block device" in refusal(
        FAILED, command, tmp_path / "fifo"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_no_permission(disk: Path, command: str) -> None:
    disk.chmod(0)
    said = refusal(FAILED, command, disk, prefix=hidden_from())
    assert said == f"nbdsrv: {disk}: Permission denied\n"


def test_no_permission_to_write(disk: Path) -> None:
    disk.chmod(0o400)
    said = refusal(FAILED, "serve", "--write", disk, prefix=hidden_from())
    assert said == f"nbdsrv: {disk}: Permission denied\n"


@pytest.mark.parametrize(
    ("kind", "magic"), [("luks", b"LUKS\xba\xbe"), ("qed", b"QED\0"), ("vma", b"VMA\0")]
)
def test_a_format_that_is_not_served(tmp_path: Path, kind: str, magic: bytes) -> None:
    path = tmp_path / f"disk.{kind}"
    path.write_bytes(magic + bytes(1 << 20))
    for command in COMMANDS:
        said = refusal(FAILED, command, path)
        assert f"{path}: {kind}" in said
        assert f"raw:{path}" in said


def test_a_format_that_the_file_is_not_in(disk: Path) -> None:
    for kind in ("qcow2", "qcow", "vhd", "vhdx", "vmdk", "vdi", "parallels", "ova", "xva", "gzip"):
        said = refusal(FAILED, "info", f"{kind}:{disk}")
        assert str(disk) in said


def test_a_chain_whose_parent_is_gone(tmp_path: Path) -> None:
    if shutil.which("qemu-img") is None:
        assert os.environ.get("CI") != "true", "CI is expected to have qemu-img"
        pytest.skip("qemu-img is not installed")
    path = tmp_path / "disk.qcow2"
    create = ["qemu-img", "create", "-qu", "-f", "qcow2", "-F", "raw", "-b", "gone.img"]
    subprocess.run([*create, str(path), "1M"], check=True, timeout=30)
    for command in COMMANDS:
        said = refusal(FAILED, command, path)
        assert f"{tmp_path}/gone.img: No such file" in said
        assert str(path) in said


def test_a_kind_of_nbd_uri_that_is_not_supported() -> None:
    for command in ("info", "serve"):
        assert "scheme 'nbd+vsock' is not nbd" in refusal(USAGE, command, "nbd+vsock://2:10809/a")


@pytest.mark.parametrize("kind", sorted(REPOSITORIES - {"repo+s3", "xo+s3"}))
@pytest.mark.parametrize("command", ["info", "ls", "verify", "serve"])
def test_repositories_that_are_not_there(kind: str, command: str, tmp_path: Path) -> None:
    said = refusal(FAILED, command, f"{kind}:{tmp_path}/no/such")
    assert f"{tmp_path}/no/such" in said


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("qemu:/nothing/there#vda", FAILED, "/nothing/there"),
        ("qemu:somewhere", USAGE, "HOST:PORT"),
        ("qemu:/run/qmp.sock?colour=red", USAGE, "'colour'"),
        ("libvirt:nowhere#vm/vda", USAGE, "URI of libvirt"),
        ("xapi://root@127.0.0.1:1#vm/0", USAGE, "NBDSRV_XAPI_PASSWORD"),
        ("xapi:root@host#vm", USAGE, "xapi://USER@HOST#VM"),
    ],
)
def test_virtual_machines_that_are_not_there(
    source: str, code: int, words: str, tmp_path: Path
) -> None:
    assert words in refusal(code, "info", source)
    repository = f"repo:{tmp_path / 'repository'}"
    assert nbdsrv("init", repository).returncode == 0
    assert words in refusal(code, "backup", source, "--to", repository)


def test_virtual_machines_are_backed_up_by_themselves(disk: Path, tmp_path: Path) -> None:
    repository = f"repo:{tmp_path / 'repository'}"
    assert nbdsrv("init", repository).returncode == 0
    to = ("--to", repository)
    assert str(disk) in refusal(USAGE, "backup", "qemu:/a", disk, *to)
    assert "--disk a=b" in refusal(USAGE, "backup", "qemu:/a", "--disk", "a=b", *to)
    assert "names of their own" in refusal(USAGE, "backup", "--disk", "a=qemu:/a", *to)
    assert "--group g" in refusal(USAGE, "backup", "qemu:/a", "qemu:/b", "--group", "g", *to)
    assert "--changed" in refusal(USAGE, "backup", "qemu:/a", "--changed", "x:y", *to)
    assert "not ~pN" in refusal(USAGE, "backup", "qemu:/a#vda~p1", *to)


def test_partitions_that_are_not_there(disk: Path) -> None:
    assert str(disk) in refusal(FAILED, "info", f"{disk}~p1")
    assert "1 to 128" in refusal(USAGE, "info", f"{disk}~p0")


@pytest.mark.parametrize("source", ["nbd://127.0.0.1:1/d", "nbd+unix:///?socket=/nothing/there"])
def test_servers_that_are_not_there(source: str) -> None:
    assert source.partition(":")[0] in refusal(FAILED, "info", source)


@pytest.mark.parametrize("source", ["", "raw:", "repo:", "~p1"])
def test_sources_that_are_none(source: str) -> None:
    for command in COMMANDS:
        refusal(USAGE, command, source)


def test_a_name_with_line_ends_stays_on_one_line(tmp_path: Path) -> None:
    refusal(FAILED, "info", tmp_path / "two\nlines\r\nhere")


def test_a_missing_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    refusal(FAILED, "info", os.fsdecode(os.fsencode(tmp_path) + b"/\xff.img"))


def test_an_export_whose_name_is_not_utf8(tmp_path: Path, disk: Path) -> None:
    name = tmp_path / os.fsdecode(b"\xff.img")
    disk.rename(name)
    assert nbdsrv("info", name).returncode == 0
    refusal(USAGE, "serve", name)


@pytest.mark.parametrize("kind", sorted(REPOSITORIES - NATIVE))
def test_points_of_other_tools_are_not_pruned(kind: str, tmp_path: Path) -> None:
    said = refusal(USAGE, "prune", f"{kind}:{tmp_path}", "--keep-last", "1")
    assert "prune takes a repository: repo:" in said


def test_a_passphrase_file_that_is_not_there(tmp_path: Path) -> None:
    env = {"NBDSRV_PASSPHRASE_FILE": str(tmp_path / "nothing")}
    said = refusal(USAGE, "init", "--encrypt", f"repo:{tmp_path / 'r'}", env=env)
    assert said.endswith(f"NBDSRV_PASSPHRASE_FILE {tmp_path}/nothing: No such file or directory\n")


@pytest.mark.parametrize(
    "words",
    [
        ("ls", "pbs:."),
        ("backup", "DISK", "--to", "xo:."),
        ("serve", "DISK", "--listen", "127.0.0.1:0", "--overlay", "x"),
        ("migrate", "qemu:sock#vda", "new.qcow2"),
    ],
    ids=" ".join,
)
def test_a_working_directory_that_is_gone(
    words: tuple[str, ...], disk: Path, tmp_path: Path
) -> None:
    enter = ("bash", "-c", 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"', str(tmp_path / "d"))
    given = [str(disk) if word == "DISK" else word for word in words]
    assert "working directory" in refusal(FAILED, *given, prefix=enter)


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("--nonsense",),
        ("nonsense",),
        ("serve", "--nonsense"),
        ("serve",),
        ("info",),
        ("info", "a", "b"),
        ("map",),
        ("serve", "d", "--listen"),
        ("serve", "d", "--tls", "perhaps"),
        ("serve", "d", "--max-connections", "0"),
        ("serve", "d", "--max-connections", "many"),
        ("serve", "d", "--handshake-timeout", "-1"),
        ("serve", "d", "--memory", "1"),
    ],
    ids=" ".join,
)
def test_arguments_nobody_knows(arguments: tuple[str, ...], disk: Path) -> None:
    refusal(USAGE, *(str(disk) if word == "d" else word for word in arguments))


def test_a_timeout_that_is_not_a_number(tmp_path: Path, disk: Path) -> None:
    where = ("--listen", f"unix:{tmp_path}/sock")
    refusal(USAGE, "serve", disk, *where, "--handshake-timeout", "nan")


def test_two_exports_with_one_name(tmp_path: Path, disk: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copy(disk, tmp_path / "other" / "disk.img")
    said = refusal(USAGE, "serve", disk, tmp_path / "other" / "disk.img")
    assert "two exports are named 'disk.img'" in said
    refusal(USAGE, "serve", "--export", f"a={disk}", "--export", f"a={disk}")


def test_export_without_a_name(disk: Path) -> None:
    assert "NAME=SOURCE" in refusal(USAGE, "serve", "--export", disk)


def test_export_with_a_name_nobody_could_ask_for(disk: Path) -> None:
    assert "4096" in refusal(USAGE, "serve", "--export", f"{'x' * 4097}={disk}")


def test_a_context_the_disk_does_not_have(disk: Path) -> None:
    said = refusal(USAGE, "map", disk, "--context", "qemu:dirty-bitmap:b0")
    assert "base:allocation" in said


# --- where to listen ---------------------------------------------------------------------------


def test_port_taken(disk: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        said = refusal(FAILED, "serve", disk, "--listen", where)
        assert where in said
        assert "in use" in said
        refusal(FAILED, "serve", disk, env={"NBDSRV_LISTEN": where})


@pytest.mark.parametrize(
    "where", ["127.0.0.1:70000", "127.0.0.1:x", "::1:10809", "unix:", "127.0.0.1:-1"]
)
def test_addresses_that_make_no_sense(disk: Path, where: str) -> None:
    refusal(USAGE, "serve", disk, "--listen", where)


@pytest.mark.parametrize(
    "where", ["..:0", "a" * 70 + ":0", "127.0.0.1:" + "1" * 5000], ids=["dots", "label", "port"]
)
def test_addresses_python_itself_chokes_on(disk: Path, where: str) -> None:
    done = nbdsrv("serve", disk, "--listen", where)
    assert done.returncode in {FAILED, USAGE}
    assert done.stderr.count("\n") == 1


def test_no_such_host(disk: Path) -> None:
    said = refusal(FAILED, "serve", disk, "--listen", "no-such-host.invalid:0")
    assert "no-such-host.invalid" in said


def test_unix_socket_of_another_server(tmp_path: Path, disk: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "sock"))
        sock.listen()
        said = refusal(FAILED, "serve", disk, "--listen", f"unix:{tmp_path}/sock")
    assert "another server" in said


def test_unix_path_that_cannot_be(tmp_path: Path, disk: Path) -> None:
    for path, says in (
        (tmp_path / "nowhere" / "sock", "No such file"),
        (disk, "not a socket"),
    ):
        said = refusal(FAILED, "serve", disk, "--listen", f"unix:{path}")
        assert str(path) in said
        assert says in said


@pytest.mark.parametrize(
    ("where", "words"),
    [("10810", "write :10810, or 127.0.0.1:10810"), ("/run/x.sock", "unix:/path")],
)
def test_half_an_address_to_listen_on(disk: Path, where: str, words: str) -> None:
    assert words in refusal(USAGE, "serve", disk, "--listen", where)


def test_a_dangling_link_in_the_sockets_place(tmp_path: Path, disk: Path) -> None:
    (tmp_path / "sock").symlink_to("nowhere")
    refusal(FAILED, "serve", disk, "--listen", f"unix:{tmp_path}/sock")


def test_the_same_address_twice(tmp_path: Path, disk: Path) -> None:
    where = f"unix:{tmp_path}/sock"
    refusal(FAILED, "serve", disk, "--listen", where, "--listen", where)
    assert not (tmp_path / "sock").exists()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    where = f"127.0.0.1:{port}"
    assert where in refusal(FAILED, "serve", disk, "--listen", where, "--listen", where)


def test_a_socket_beside_a_port_that_is_taken_is_removed(tmp_path: Path, disk: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        both = ("--listen", f"unix:{tmp_path}/sock", "--listen", where)
        refusal(FAILED, "serve", disk, *both)
    assert not (tmp_path / "sock").exists()


@pytest.mark.parametrize(
    "mode",
    ["rw", "8", "", "0x1ff", "-1", "77777"],
)
def test_socket_modes_that_are_none(tmp_path: Path, disk: Path, mode: str) -> None:
    where = f"unix:{tmp_path}/sock"
    said = refusal(USAGE, "serve", disk, "--listen", where, f"--socket-mode={mode}")
    assert "--socket-mode" in said


def test_stdio_with_another_address(tmp_path: Path, disk: Path) -> None:
    where = ("--listen", "stdio", "--listen", f"unix:{tmp_path}/sock")
    assert "stdio" in refusal(USAGE, "serve", disk, *where)


# --- TLS ---------------------------------------------------------------------------------------


def test_tls_files(certificates: Certificates, tmp_path: Path, disk: Path) -> None:
    certificate, key = certificates.server.certificate, certificates.server.key
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_bytes(
        serialization.load_pem_private_key(key.read_bytes(), None).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    (tmp_path / "garbage.pem").write_text("garbage\n")
    nothing = tmp_path / "nothing.pem"
    for files, says in (
        ((certificate, certificates.client.key), "mismatch"),
        ((certificate, tmp_path / "garbage.pem"), "garbage.pem"),
        ((tmp_path / "garbage.pem", key), "garbage.pem"),
        ((certificate, nothing), f"{nothing}: No such file"),
        ((nothing, key), f"{nothing}: No such file"),
        ((certificate, encrypted), "is encrypted"),
        ((certificate, key, nothing), f"{nothing}: No such file"),
        ((certificate, key, tmp_path / "garbage.pem"), "garbage.pem"),
    ):
        options = ("--tls-cert", "--tls-key", "--tls-ca")
        given = [word for pair in zip(options, files, strict=False) for word in pair]
        assert says in refusal(USAGE, "serve", disk, *given)


@pytest.mark.parametrize(
    "options",
    [
        ("--tls", "required"),
        ("--tls", "per-export"),
        ("--tls-cert", "CERT"),
        ("--tls-key", "KEY"),
        ("--tls-ca", "CA"),
        ("--tls-export", "disk.img"),
        ("--tls-cert", "CERT", "--tls-key", "KEY", "--tls-export", "disk.img"),
        ("--tls", "per-export", "--tls-cert", "CERT", "--tls-key", "KEY", "--tls-export", "other"),
    ],
    ids=" ".join,
)
def test_tls_options_that_do_not_go_together(
    certificates: Certificates, disk: Path, options: tuple[str, ...]
) -> None:
    names = {
        "CERT": certificates.server.certificate,
        "KEY": certificates.server.key,
        "CA": certificates.ca,
    }
    said = refusal(USAGE, "serve", disk, *(names.get(word, word) for word in options))
    assert "tls" in said.lower()
