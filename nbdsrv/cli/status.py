"""``nbdsrv status``: what a running server is doing."""

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict

import click

from nbdsrv.cli.status_view import plain, render
from nbdsrv.cli.stopping import Stopped
from nbdsrv.ops.admin_client import AdminClient, find_socket
from nbdsrv.ops.jobs import running

__all__ = ["status"]


@click.command(short_help="What a running server is doing.")
@click.option("--socket", metavar="PATH", help="The server's admin socket.")
@click.option("--json", "as_json", is_flag=True, help="Everything, once, as JSON.")
@click.option("--once", is_flag=True, help="Once, as plain text; so it is without a terminal.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    metavar="S",
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option(
    "--drop", type=click.IntRange(1), metavar="ID", help="End the connection of this client."
)
def status(
    *, socket: str | None, as_json: bool, once: bool, interval: float, drop: int | None
) -> None:
    """What a running server is doing: exports, clients, throughput, waits.

    On a terminal it goes on until it is interrupted. Backups that run on this host are shown too.
    """
    with AdminClient(find_socket(socket)) as client:
        if drop is not None:
            client.ask("drop-client", id=drop)
            return
        document = _look(client)
        if as_json:
            click.echo(json.dumps(document))
        elif once or not sys.stdout.isatty():
            click.echo(plain(document))
        else:
            _watch(client, document, interval)


def _look(client: AdminClient) -> "dict[str, object]":
    document: dict[str, object] = client.ask("status")
    document["backups"] = [asdict(job) for job in running()]
    return document


def _watch(client: AdminClient, document: "dict[str, object]", interval: float) -> None:
    from rich.live import Live

    with suppress(Stopped), Live(screen=True, auto_refresh=False) as live:
        while True:
            live.update(render(document, live.console.width), refresh=True)
            time.sleep(interval)
            document = _look(client)
