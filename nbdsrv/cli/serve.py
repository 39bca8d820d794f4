"""``nbdsrv serve``: exports over NBD until SIGTERM or SIGINT."""

from typing import Any

import click
import uvloop
from click.core import ParameterSource

from nbdsrv.cli.serve_order import Order
from nbdsrv.cli.serving import STDIO, Serving, server_options
from nbdsrv.cli.stopping import run
from nbdsrv.cli.words import counted
from nbdsrv.disk.blocks import DEFAULT_CACHE
from nbdsrv.errors import ConfigError

__all__ = ["serve"]

_UNSAID = frozenset({ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP})


@click.command(short_help="Make disks available over NBD.")
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option(
    "--export",
    "exports",
    multiple=True,
    metavar="NAME=SOURCE",
    help="Serve SOURCE under NAME; repeatable.",
)
@click.option("--write", is_flag=True, help="Let clients write. Without it all is read-only.")
@click.option(
    "--overlay",
    metavar="DIR",
    type=click.Path(file_okay=False),
    envvar="NBDSRV_OVERLAY",
    help="Let clients write, into overlays in DIR; what is served is only read.",
)
@click.option(
    "--hydrate",
    is_flag=False,
    flag_value="",
    metavar="[RATE]",
    envvar="NBDSRV_HYDRATE",
    help="Copy what is served into the overlays in use, when clients are idle; for instance"
    " --hydrate=50M.",
)
@click.option(
    "--config",
    metavar="FILE",
    envvar="NBDSRV_CONFIG",
    help="Exports, listeners, TLS, limits and access rules; docs/service.md.",
)
@click.option("--check", is_flag=True, help="Say whether that would work; serve nothing.")
@server_options
@click.option(
    "--cache",
    type=click.IntRange(0, 1 << 20),
    default=DEFAULT_CACHE >> 20,
    show_default=True,
    metavar="MIB",
    help="MiB of decoded blocks kept, of compressed images.",
)
@click.option(
    "--admin-socket",
    metavar="PATH",
    envvar="NBDSRV_ADMIN_SOCKET",
    help="Where nbdsrv status and reload ask.  [default: nowhere]",
)
@click.option(
    "--metrics",
    metavar="HOST:PORT",
    envvar="NBDSRV_METRICS",
    help="Where Prometheus asks.  [default: nowhere]",
)
@click.option(
    "--audit-file",
    metavar="FILE",
    envvar="NBDSRV_AUDIT_FILE",
    help="Who attached what goes here instead of to the log.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    envvar="NBDSRV_LOG_FORMAT",
    help="Of the log, on standard error.",
)
@click.option(
    "-v", "--verbose", count=True, help="Log sessions, not only warnings; twice for debugging."
)
def serve(*, check: bool, **options: Any) -> None:
    """Serve each SOURCE over NBD, and what a configuration FILE names.

    A repository (repo:/path) is served whole: every disk of every restore point, as they come and
    go, under GROUP/DISK@POINT and GROUP/DISK@latest. A running VM (qemu:, libvirt:, xapi:) is
    served as it is now, under VM/DISK, until the server stops.

    Prints one NBD URI per export or repository once connections are accepted. SIGTERM finishes
    what is in flight and exits with 0. SIGHUP reads FILE again. Sockets handed over by systemd
    (LISTEN_FDS) are used if nothing says where to listen.
    """
    from nbdsrv.cli.serve_run import check as check_order
    from nbdsrv.cli.serve_run import serve_until_told

    context = click.get_current_context()
    given = {name for name in options if context.get_parameter_source(name) not in _UNSAID}
    serving = Serving.taken_from(options)
    order = Order(serving, frozenset(given), **options)
    if order.config is not None and STDIO in serving.listen:
        raise ConfigError("--listen stdio serves one client and does not go with --config")
    if not check:
        uvloop.run(serve_until_told(order))
        return
    exports, collections = run(check_order(order))
    what = order.config or "the command line"
    stored = counted(collections, "repository or VM")
    if collections != 1:
        stored = f"{collections} repositories and VMs"
    click.echo(f"{what}: {counted(exports, 'export')}, {stored}; no mistake found")
