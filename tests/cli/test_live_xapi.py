"""``nbdsrv backup xapi://...`` as a user types it, to the simulated pool."""

import json
from pathlib import Path
from typing import Any

from tests.cli.program import nbdsrv
from tests.source.xapi_pool import add_vm, pool


def back_up(*words: str, env: dict[str, str]) -> list[dict[str, Any]]:
    done = nbdsrv("backup", *words, "--json", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_full_and_incremental(tmp_path: Path) -> None:
    repository = f"repo:{tmp_path / 'repository'}"
    assert nbdsrv("init", repository, "--chunk-size", "64K").returncode == 0
    with pool(tmp_path) as simulator:
        live, _ = add_vm(simulator, "xvda", "xvdb")
        env = dict(simulator.environment)
        vm = f"xapi://root@{simulator.addresses[0]}:{simulator.port}#web"
        rows = back_up(vm, "--to", repository, env=env)
        assert [(row["group"], row["disk"], row["mode"]) for row in rows] == [
            ("web", "xvda", "full"),
            ("web", "xvdb", "full"),
        ]
        simulator.write(live, 65_536, b"changed")
        rows = back_up(vm, "--to", repository, "--dry-run", env=env)
        assert [(row["mode"], row["changed_bytes"]) for row in rows] == [
            ("incremental", 65_536),
            ("incremental", 0),
        ]
        rows = back_up(vm, "--to", repository, env=env)
        assert [(row["mode"], row["read_bytes"]) for row in rows] == [
            ("incremental", 65_536),
            ("incremental", 0),
        ]
        out = tmp_path / "out.img"
        assert nbdsrv("restore", f"{repository}#web/xvda", out).returncode == 0
        assert out.read_bytes() == simulator.content(live)
        copied = tmp_path / "copy.img"
        done = nbdsrv("copy", f"{vm}/xvda", copied, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert copied.read_bytes() == out.read_bytes()
