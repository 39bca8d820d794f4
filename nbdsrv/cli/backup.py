"""``nbdsrv backup``: disks, or running VMs, into repositories."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from nbdsrv.cli.backup_print import print_outcome
from nbdsrv.cli.init import repository_source
from nbdsrv.cli.point_options import point_options, storage_of
from nbdsrv.cli.quantities import parse_rate
from nbdsrv.cli.stopping import run
from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import Kind, Source, parse_source

if TYPE_CHECKING:
    from nbdsrv.backup.origin import Origin

    Origins = dict[str, Origin]

__all__ = ["backup"]


@click.command(short_help="Disks or running VMs as restore points.")
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option(
    "--disk",
    "named",
    multiple=True,
    metavar="NAME=SOURCE",
    help="A disk under a name of its own; repeatable.",
)
@click.option(
    "--to",
    "repositories",
    multiple=True,
    required=True,
    metavar="REPOSITORY",
    help="Where to; repeatable, and several are filled by reading once.",
)
@click.option(
    "--group",
    metavar="NAME",
    help="The VM's name, the group of its points.  [default: the first disk's VM, or its name]",
)
@point_options()
@click.option("--rate", metavar="SIZE/s", help="Read no faster, for instance 100M/s.")
@click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    metavar="N",
    help="VMs that are backed up at once.",
)
@click.option(
    "--connections",
    type=click.IntRange(1, 64),
    metavar="N",
    help="To one NBD server at most, of all disks together.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only say what would be read of each disk, and why. A VM is frozen for a moment for that.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what has been done as JSON.")
@click.option("--quiet", is_flag=True, help="Show no progress and print nothing.")
def backup(
    sources: Sequence[str],
    named: Sequence[str],
    repositories: Sequence[str],
    group: str | None,
    since: str,
    changed: str,
    recheck: float,
    level: int,
    layout: str | None,
    packing: str | None,
    rate: str | None,
    jobs: int,
    connections: int | None,
    labels: Sequence[str],
    *,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Back up SOURCEs: disk images as one restore point, running VMs as one each.

    Images and NBD exports are the disks of one VM. A disk is called by its file's name unless
    --disk says otherwise. Running VMs (qemu:, libvirt:, xapi:) are frozen, and of each is read
    what has changed since the checkpoint that the repositories have a point of. Exit code 3: a
    VM or a repository of several has failed, or a changed block was found where none was said
    to be.
    """
    from nbdsrv.backup.engine import Order
    from nbdsrv.cli.backup_run import Job, Outcome, back_up

    disks, machines, origins = _parsed(sources, named)
    if len(_vms(machines)) > 1 and group:
        raise ConfigError(f"--group {group}: of several VMs each has a group of its own name")
    if since == "full" and changed:
        raise ConfigError("--changed tells what to add to a point; --since full builds upon none")
    if machines and changed:
        raise ConfigError("--changed is for nbd: sources; a hypervisor tells what has changed")
    order = Order(
        group=group or _group(disks, origins),
        since=since,
        changed=changed,
        recheck=recheck,
        level=level,
        labels=_labels(disks, origins) | dict(_pair("--label", text) for text in labels),
        created=_created(disks, origins),
    )
    targets = [repository_source(text, "--to", written=True) for text in repositories]
    job = Job(
        disks=disks,
        machines=_vms(machines),
        repositories=targets,
        storage=storage_of(layout, packing, targets),
        order=order,
        rate=parse_rate("--rate", rate) if rate else None,
        jobs=jobs,
        budget=connections or 0,
        dry_run=dry_run,
        quiet=quiet,
    )
    outcome: Outcome = back_up(job)
    print_outcome(outcome, as_json=as_json, quiet=quiet)
    return outcome.code


def _parsed(
    sources: Sequence[str], named: Sequence[str]
) -> "tuple[dict[str, Source], list[Source], Origins]":
    """Disks by name, or running VMs; and which of the disks are others' restore points."""
    parsed = [parse_source(text) for text in sources]
    machines = [source for source in parsed if source.kind is Kind.HYPERVISOR]
    if not machines:
        origins = _origins([*parsed, *(parse_source(_pair("--disk", each)[1]) for each in named)])
        return _disks(parsed, named, origins), [], origins
    if len(machines) < len(parsed) or named:
        other = next((each.text for each in parsed if each not in machines), None)
        what = other if other is not None else f"--disk {named[0]}"
        text = f"{what}: cannot be a disk of a point together with {machines[0].text}"
        raise ConfigError(f"{text}, which is a VM of its own; use two commands")
    for source in machines:
        if source.partition is not None:
            raise ConfigError(f"{source.text}: a running VM is backed up by whole disks, not ~pN")
    return {}, machines, {}


def _origins(sources: Sequence[Source]) -> "Origins":
    """What those are that are points of other tools' repositories, by their text."""
    from nbdsrv.backup.origin import is_foreign, origins
    from nbdsrv.cli.running import running_workers

    foreign = [source for source in sources if is_foreign(source)]

    async def found() -> "Origins":
        async with running_workers() as workers:
            return await origins(foreign, workers)

    return run(found()) if foreign else {}


def _group(disks: Mapping[str, Source], origins: "Origins") -> str:
    """As the VM of the first disk is called, or as that disk."""
    for name, source in disks.items():
        origin = origins.get(source.text)
        return origin.group if origin is not None else name
    return ""


def _created(disks: Mapping[str, Source], origins: "Origins") -> float | None:
    """When it was that all disks were like that."""
    times = {each.created for source in disks.values() if (each := origins.get(source.text))}
    return times.pop() if len(times) == 1 and len(origins) == len(disks) else None


def _labels(disks: Mapping[str, Source], origins: "Origins") -> dict[str, str]:
    """Those of a migrated point, if it is all of one point, under the names it has there."""
    found = [(name, origins.get(source.text)) for name, source in disks.items()]
    if not found or any(each is None or each.disk != name for name, each in found):
        return {}
    first, *others = [each.labels for _, each in found if each is not None]
    return dict(first) if all(each == first for each in others) else {}


def _vms(machines: Sequence[Source]) -> list[list[Source]]:
    """SOURCEs of the same VM together: ``qemu:/a#vda qemu:/a#vdb``."""
    from nbdsrv.source.opening import machine_of

    vms: dict[str, list[Source]] = {}
    for source in machines:
        vms.setdefault(machine_of(source)[0], []).append(source)
    return list(vms.values())


def _disks(
    sources: Sequence[Source], named: Sequence[str], origins: "Origins"
) -> dict[str, Source]:
    from nbdsrv.backup.naming import disk_name

    pairs: list[tuple[str, Source]] = []
    for source in sources:
        origin = origins.get(source.text)
        pairs.append((origin.disk if origin is not None else disk_name(source), source))
    for text in named:
        name, given = _pair("--disk", text)
        source = parse_source(given)
        if source.kind is Kind.HYPERVISOR:
            raise ConfigError(f"--disk {text}: the disks of a running VM have names of their own")
        pairs.append((name, source))
    if not pairs:
        raise ConfigError("nothing to back up; give a SOURCE, for instance disk.qcow2")
    disks = dict(pairs)
    if len(disks) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two disks are named {twice!r}; use --disk NAME=SOURCE")
    return disks


def _pair(option: str, text: str) -> tuple[str, str]:
    key, mark, value = text.partition("=")
    if not mark or not key or not value:
        raise ConfigError(
            f"{option} {text}: expected {'NAME=SOURCE' if 'disk' in option else 'K=V'}"
        )
    return key, value
