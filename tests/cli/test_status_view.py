"""What ``nbdsrv status`` draws, on terminals of any width."""

from typing import Any

import pytest
from rich.console import Console

from nbdsrv.cli.status_view import plain, render

WAITS = {"p50": 8e-5, "p99": 2e-4}


def document(name: str = "vm1/sda@latest") -> dict[str, Any]:
    lately = {
        "reads_per_s": 3000.0,
        "writes_per_s": 20.0,
        "others_per_s": 1.0,
        "sent_per_s": 12e6,
        "received_per_s": 1e5,
        "waits": {"read": WAITS, "write": WAITS},
    }
    busy = {"name": name, "kind": "export", "state": "served", "clients": 1, "write": True}
    return {
        "server": {
            "version": "1.0",
            "pid": 1,
            "uptime_s": 9.0,
            "listening": ["127.0.0.1:10809"],
            "tls": "off",
            "connections": dict.fromkeys(
                ("attached", "limit", "handshakes", "accepted", "refused"), 1
            ),
            "memory": {"resident": 1, "lent": 1, "budget": 1},
            "cache": {"held": 1, "limit": 1, "hits": 1, "misses": 1},
            "descriptors": 9,
            "loop_lag": WAITS,
            "reloads": {"error": None},
        },
        "exports": [
            {**busy, "sent": 1 << 30, "lately": lately},
            {"name": "idle", "kind": "collection", "state": "served", "clients": 0},
        ],
        "clients": [],
    }


@pytest.mark.parametrize(
    ("width", "headings"),
    [
        (80, ["EXPORT", "STATE", "CLIENTS", "READ/S", "WRITE/S", "SENT/S"]),
        (100, ["SENT/S", "READ p99", "WRITE p99"]),
        (160, ["OTHER/S", "RECEIVED/S", "TOTAL SENT", "READ p50", "p99", "WRITE p50"]),
    ],
)
def test_names_are_whole_and_figures_give_way(width: int, headings: list[str]) -> None:
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(render(document(), width))
    lines = capture.get().splitlines()
    (heading,) = [line for line in lines if line.startswith("EXPORT")]
    assert [each for each in headings if each not in heading] == []
    assert [line.split()[0] for line in lines if "served" in line] == ["vm1/sda@latest", "idle"]
    (busy,) = [line for line in lines if "served rw" in line]
    assert busy.split()[4:6] == ["3000", "20"]
    assert "\N{HORIZONTAL ELLIPSIS}" not in heading + busy


def test_a_name_cannot_move_the_cursor() -> None:
    assert "\x1b" not in plain(document("\x1b[2Jgone\n"))
