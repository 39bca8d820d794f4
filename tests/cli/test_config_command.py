"""``serve --config``, ``status`` and ``reload`` as an operator types them."""

import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from tests.cli.program import nbdsrv, refusal, serving


def config(tmp_path: Path, disk: Path, more: str = "") -> Path:
    path = tmp_path / "nbdsrv.toml"
    path.write_text(
        f'listen = ["unix:{tmp_path}/nbd"]\n[admin]\nsocket = "{tmp_path}/admin"\n'
        f'[[export]]\nname = "vm1"\nsource = "{disk}"\n{more}'
    )
    return path


def test_served_seen_reloaded_and_left(tmp_path: Path, disk: Path) -> None:
    where = ("--socket", tmp_path / "admin")
    with serving("--config", config(tmp_path, disk)) as served:
        (uri,) = served.uris
        assert (uri.socket, uri.export) == (str(tmp_path / "nbd"), "")
        document = json.loads(nbdsrv("status", "--json", *where).stdout)
        assert [each["name"] for each in document["exports"]] == ["vm1"]
        assert document["server"]["pid"] == served.process.pid
        shown = nbdsrv("status", *where)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "vm1" in shown.stdout
        assert "\x1b" not in shown.stdout
        more = f'[[export]]\nname = "vm2"\nsource = "{disk}"\n'
        config(tmp_path, disk, more)
        done = nbdsrv("reload", *where)
        assert (done.stdout, done.returncode) == ("added vm2\n", 0)
        done = nbdsrv("reload", *where)
        assert (done.stdout, done.returncode) == ("nothing has changed\n", 0)
        path = config(tmp_path, disk, "colour = 1\n")
        assert f"{path}:7: export.vm1.colour: unknown key" in refusal(2, "reload", *where)
        assert refusal(1, "status", "--drop", "9", *where) == "nbdsrv: there is no client 9\n"
        code, said = served.stop()
        assert code == 0
        assert "reload.done added=['vm2']" in said
        assert "reload.failed reason=" in said
        assert "everything stays as it was" in said
    assert not (tmp_path / "admin").exists()
    assert not (tmp_path / "nbd").exists()


def test_the_command_line_wins_and_adds(tmp_path: Path, disk: Path) -> None:
    path = config(tmp_path, disk)
    other = ("--listen", f"unix:{tmp_path}/other", "--admin-socket", tmp_path / "admin2")
    with serving("--config", path, "--export", f"mine={disk}", *other, uris=2) as served:
        assert {(uri.socket, uri.export) for uri in served.uris} == {
            (str(tmp_path / "other"), "vm1"),
            (str(tmp_path / "other"), "mine"),
        }
        config(tmp_path, disk, f'[[export]]\nname = "vm2"\nsource = "{disk}"\n')
        done = nbdsrv("reload", "--json", "--socket", tmp_path / "admin2")
        assert json.loads(done.stdout)["added"] == ["vm2"]
        document = json.loads(nbdsrv("status", "--json", "--socket", tmp_path / "admin2").stdout)
        assert [each["name"] for each in document["exports"]] == ["vm1", "vm2", "mine"]
        assert not (tmp_path / "admin").exists()
        assert served.stop()[0] == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("acess = 1\n", ":7: export.vm1.acess: unknown key; there are name,"),
        ("write = 1\n", ":7: export.vm1.write: expected true or false, got int"),
        ('[[export]]\nname = "vm1"\nsource = "x"\n', ":8: export.vm1.name: this name is taken"),
        ('[[export]]\nname = "b"\nsource = "/no.img"\n', ":9: export.b.source: /no.img: No such"),
        ('[metrics]\nlisten = "nowhere"\n:', ":9, column 1: "),
        ('[metrics]\nlisten = "nowhere"\n', ":8: metrics.listen: expected HOST:PORT"),
    ],
)
@pytest.mark.parametrize("check", [(), ("--check",)])
def test_mistakes_are_lines_and_exit_code_2(
    tmp_path: Path, disk: Path, check: tuple[str, ...], more: str, said: str
) -> None:
    path = config(tmp_path, disk, more)
    assert f"nbdsrv: {path}{said}" in refusal(2, "serve", "--config", path, *check)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--metrics", "here:there", "expected HOST:PORT\n"),
        ("--metrics", "127.0.0.1", "expected HOST:PORT\n"),
        ("--metrics", "unix:/sock", "expected HOST:PORT\n"),
        ("--listen", "a:b:1", "write IPv6 addresses in brackets, [::1]:10809\n"),
        ("--listen", f"unix:/{'x' * 107}", "a socket's path has 107 bytes at most, this one"),
        ("--admin-socket", f"/{'x' * 107}", "a socket's path has 107 bytes at most"),
        ("--socket-mode", "999", "expected octal digits\n"),
    ],
)
@pytest.mark.parametrize("check", [(), ("--check",)])
def test_a_place_that_cannot_be_is_told_before_anything_is_opened(
    option: str, value: str, said: str, check: tuple[str, ...]
) -> None:
    refused = refusal(2, "serve", "/no.img", option, value, *check)
    assert refused.startswith(f"nbdsrv: {option} {value}: {said}")


def test_check_tells_what_is_there(tmp_path: Path, disk: Path) -> None:
    path = config(tmp_path, disk)
    done = nbdsrv("serve", "--check", "--config", path)
    said = f"{path}: 1 export, 0 repositories and VMs; no mistake found\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    assert not (tmp_path / "nbd").exists()


def test_an_empty_file_serves_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("")
    said = refusal(2, "serve", "--config", tmp_path / "c.toml")
    assert "nothing to serve; add an [[export]]" in said


def test_a_reload_without_a_configuration(tmp_path: Path, disk: Path) -> None:
    where = ("--listen", f"unix:{tmp_path}/nbd", "--admin-socket", tmp_path / "admin")
    with serving(disk, *where) as served:
        assert "started without --config" in refusal(1, "reload", "--socket", tmp_path / "admin")
        served.process.send_signal(signal.SIGHUP)
        assert "disk.img" in nbdsrv("status", "--socket", tmp_path / "admin").stdout
        assert served.stop() == (0, "")


@pytest.mark.parametrize("verb", ["status", "reload"])
def test_no_server(tmp_path: Path, verb: str) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    said = refusal(2, verb, env=env)
    assert f"{tmp_path}/nbdsrv/admin.sock" in said
    assert "No such file" in refusal(1, verb, "--socket", tmp_path / "none")


def test_metrics_and_json_logs(tmp_path: Path, disk: Path) -> None:
    if shutil.which("nbdinfo") is None:
        pytest.skip("nbdinfo is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ("--listen", f"unix:{tmp_path}/nbd", "--log-format", "json", "-v")
    with serving(disk, *where, "--metrics", f"127.0.0.1:{port}") as served:
        command = ["nbdinfo", "--size", str(served.uris[0])]
        subprocess.run(command, check=True, timeout=20, capture_output=True)
        sample = 'nbdsrv_attached_total{export="disk.img"} 1.0'
        deadline = time.monotonic() + 10
        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                assert page.headers["Content-Type"].startswith("text/plain")
                text = page.read().decode()
            if sample in text or time.monotonic() > deadline:
                break
        assert sample in text
        assert 'nbdsrv_request_seconds_bucket{export="disk.img",kind="read",le="+Inf"}' in text
        code, said = served.stop()
    assert code == 0
    events = [json.loads(line) for line in said.splitlines()]
    attached = [each for each in events if each["event"] == "audit.attach"]
    assert [each["export"] for each in attached] == ["disk.img"]


def test_metrics_where_somebody_listens(tmp_path: Path, disk: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = ("serve", disk, "--listen", f"unix:{tmp_path}/nbd", "--metrics", where)
        assert f"metrics: cannot listen on {where}: Address already" in refusal(1, *arguments)
    assert not (tmp_path / "nbd").exists()


def test_stdio_and_a_configuration(tmp_path: Path, disk: Path) -> None:
    path = config(tmp_path, disk)
    assert "does not go with --config" in refusal(2, "serve", "--config", path, "--listen", "stdio")
