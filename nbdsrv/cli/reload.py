"""``nbdsrv reload``: have a running server read its configuration file again."""

import json

import click

from nbdsrv.ops.admin_client import AdminClient, find_socket

__all__ = ["reload"]

PATIENCE_S = 300.0
"""Seconds for opening everything that is new: repositories may be far away."""


@click.command(short_help="Have a server read its configuration again.")
@click.option("--socket", metavar="PATH", help="The server's admin socket.")
@click.option("--json", "as_json", is_flag=True, help="Print what has changed as JSON.")
def reload(*, socket: str | None, as_json: bool) -> None:
    """Have a running server read its configuration file again.

    Clients keep what they have: exports that are gone stay theirs until they leave. If the file
    has a mistake nothing changes; it is printed, and the exit code is 2.
    """
    with AdminClient(find_socket(socket), PATIENCE_S) as client:
        done = client.ask("reload")
    if as_json:
        click.echo(json.dumps(done))
        return
    lines = [f"{kind} {name}" for kind in ("added", "removed", "changed") for name in done[kind]]
    if done["leaving"]:
        lines.append(f"{done['leaving']} clients still use what is no longer served")
    click.echo("\n".join(lines) or "nothing has changed")
