"""``nbdsrv proxy``: other servers' exports passed on, and what is read of them kept."""

from collections.abc import Sequence
from typing import Any

import click
import uvloop

from nbdsrv.backup.engine import Order
from nbdsrv.cli.backup_print import print_outcome
from nbdsrv.cli.init import repository_source
from nbdsrv.cli.point_options import point_options, storage_of
from nbdsrv.cli.proxy_run import Passing, pass_on, tee_off
from nbdsrv.cli.serving import STDIO, Serving, server_options
from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import Kind, Source, parse_source
from nbdsrv.ops.logs import set_up

__all__ = ["proxy"]

_BACKUP = ("group", "since", "changed", "recheck", "level", "labels")


@click.command(short_help="Pass exports on, and store what is read.")
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.option(
    "--export",
    "exports",
    multiple=True,
    metavar="NAME=SOURCE",
    help="Pass on SOURCE as NAME; repeatable.",
)
@click.option(
    "--tee",
    "repositories",
    multiple=True,
    metavar="REPOSITORY",
    help="Keep what clients read as a restore point there; repeatable, and several are filled by"
    " reading once.",
)
@click.option("--once", is_flag=True, help="End when the last client has left.")
@click.option("--write", is_flag=True, help="Let clients write. Without it all is read-only.")
@click.option(
    "--connections",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    metavar="N",
    help="To each SOURCE, at most.",
)
@click.option("--group", metavar="NAME", help="With --tee: the VM.  [default: the first disk]")
@point_options("With --tee: ")
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print what was stored as JSON.")
@click.option(
    "-v", "--verbose", count=True, help="Log sessions, not only warnings; twice for debugging."
)
def proxy(verbose: int, *, as_json: bool, **options: Any) -> int:
    """Serve other servers' exports, each SOURCE with all that it is there.

    With --tee, what clients read is also stored: one read for a client and any number of
    repositories. The SOURCEs are the disks of one VM and must not change meanwhile: a snapshot, or
    a running VM (qemu:, libvirt:, xapi:), which is frozen for that time and whose checkpoint
    advances as by `nbdsrv backup`. SIGTERM, or --once when the last client has left, ends serving;
    what nobody has read is read then, and a restore point is made. A second SIGTERM makes none.

    Clients never wait for repositories that are slow or fail. Exit code 3: one of several has
    failed, or a changed block was found where none was said to be.
    """
    serving = Serving.taken_from(options)
    if STDIO in serving.listen:
        raise ConfigError("--listen stdio goes with `nbdsrv serve` alone")
    sources, exports = options.pop("sources"), options.pop("exports")
    machine = _machine(sources, exports)
    disks = {} if machine else _disks(sources, exports)
    teed = options.pop("repositories")
    repositories = [repository_source(text, "--tee", written=True) for text in teed]
    storage = storage_of(options.pop("layout"), options.pop("packing"), repositories)
    order = _order({name: options.pop(name) for name in _BACKUP}, disks, teed=bool(repositories))
    passing = Passing(disks, serving, machine=machine, **options)
    set_up(verbose)
    if machine and not repositories:
        raise ConfigError(f"{machine[0].text}: `nbdsrv serve` serves a VM; --tee keeps it as well")
    if not repositories:
        uvloop.run(pass_on(passing))
        return 0
    if passing.write:
        raise ConfigError("--write and --tee: what is backed up must not change")
    outcome = uvloop.run(tee_off(passing, repositories, order, storage))
    print_outcome(outcome, as_json=as_json, quiet=False)
    return outcome.code


def _machine(sources: tuple[str, ...], exports: tuple[str, ...]) -> list[Source]:
    """A running VM, as the SOURCEs that name its disks; none if they name something else."""
    from nbdsrv.source.opening import machine_of

    parsed = [parse_source(text) for text in sources]
    named = [parse_source(text.partition("=")[2] or text) for text in exports]
    machines = [each for each in (*parsed, *named) if each.kind is Kind.HYPERVISOR]
    if not machines:
        return []
    if named or len(machines) < len(parsed) or len({machine_of(each)[0] for each in parsed}) > 1:
        text = f"{machines[0].text}: a running VM is passed on by itself, its disks by their names"
        raise ConfigError(text)
    return machines


def _disks(sources: Sequence[str], exports: Sequence[str]) -> dict[str, Source]:
    from nbdsrv.backup.naming import disk_name

    pairs = [(disk_name(source), source) for source in map(parse_source, sources)]
    for text in exports:
        name, mark, rest = text.partition("=")
        if not mark or not name:
            raise ConfigError(f"--export {text}: expected NAME=SOURCE")
        pairs.append((name, parse_source(rest)))
    if not pairs:
        raise ConfigError("nothing to pass on; give a SOURCE, for instance nbd://host/export")
    disks = dict(pairs)
    if len(disks) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two exports are named {twice!r}; use --export NAME=SOURCE")
    return disks


def _order(options: dict[str, Any], disks: dict[str, Source], *, teed: bool) -> Order:
    if not teed and (options["group"] or options["changed"] or options["labels"]):
        raise ConfigError("--group, --changed and --label go with --tee REPOSITORY")
    labels: dict[str, str] = {}
    for text in options.pop("labels"):
        key, mark, value = text.partition("=")
        if not mark or not key or not value:
            raise ConfigError(f"--label {text}: expected KEY=VALUE")
        labels[key] = value
    if options["since"] == "full" and options["changed"]:
        raise ConfigError("--changed tells what to add to a point; --since full builds upon none")
    group = options.pop("group") or next(iter(disks), "")
    return Order(group=group, labels=labels, **options)
