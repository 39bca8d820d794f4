"""``nbdsrv migrate``: a running VM leaves our export for the storage it is to live on.

::

    nbdsrv migrate qemu:/run/qmp.sock#vda /vm/web.qcow2     blockdev-mirror, pivot
    nbdsrv migrate qemu:/run/qmp.sock#vda                   block-stream into the image on top
"""

import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import click

from nbdsrv.cli.quantities import parse_rate
from nbdsrv.cli.stopping import run
from nbdsrv.cli.words import human
from nbdsrv.copying.progress import progress
from nbdsrv.copying.target import Place, parse_target
from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import Source, parse_source
from nbdsrv.source.qemu_address import parse_qemu
from nbdsrv.source.qemu_move import Moved, MoveTarget, QemuMove
from nbdsrv.source.qmp import QmpClient, open_qmp

__all__ = ["migrate"]


@dataclass(frozen=True, slots=True)
class Order:
    """What the command line asked for; without a target, or to cancel, ``target`` is None."""

    source: Source
    target: MoveTarget | None
    rate: int
    cancel: bool
    quiet: bool


@click.command(short_help="Move the disk of a running VM elsewhere.")
@click.argument("source", metavar="qemu:SOCKET#DISK")
@click.argument("target", required=False)
@click.option("--to", metavar="FORMAT", help="qcow2 or raw.  [default: by TARGET's extension]")
@click.option("--rate", metavar="RATE", help="Bytes a second at most, for instance 50M.")
@click.option("--direct", is_flag=True, help="QEMU opens TARGET past the page cache (cache=none).")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.option("--cancel", is_flag=True, help="End a move that a killed run has left in QEMU.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def migrate(
    source: str,
    target: str | None,
    *,
    to: str | None,
    rate: str | None,
    direct: bool,
    force: bool,
    cancel: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Move a disk of a running VM to TARGET, a new qcow2 or raw file or a block device.

    The VM runs on; at the end it uses TARGET and nothing else. Until then, after an error and
    after a signal, it is on its old disk and TARGET is removed again. SOURCE names the VM's QMP
    socket and the disk.

    Without TARGET the disk's own image, a qcow2 whose backing image is an export of ours, is
    filled up from it.
    """
    order = Order(
        _vm(source),
        None if target is None else _target(target, to, direct=direct, force=force),
        parse_rate("--rate", rate) if rate else 0,
        cancel,
        quiet,
    )
    if cancel and target is not None:
        raise ConfigError("--cancel ends a move, whatever it was going to; leave TARGET out")
    if target is None and (to or direct or force):
        raise ConfigError("--to, --direct and --force are about TARGET; there is none")
    began = time.monotonic()
    if cancel:
        found = run(_cancel(order))
        if not quiet:
            click.echo("cancelled; the VM is on its old disk" if found else "nothing to cancel")
        return
    stays = "the VM goes on where it was" + (f"; {target} was removed" if target else "")
    moved = run(_migrate(order), stays)
    _report(order, moved, time.monotonic() - began, as_json=as_json)


def _vm(text: str) -> Source:
    source = parse_source(text)
    if source.scheme == "libvirt":
        raise ConfigError(
            f"{text}: for libvirt's domains use `virsh blockcopy --pivot`, which"
            " keeps the domain's definition in step"
        )
    if source.scheme != "qemu" or source.partition is not None:
        raise ConfigError(f"{text}: expected qemu:SOCKET#DISK, a disk of a running QEMU")
    return source


def _target(text: str, to: str | None, *, direct: bool, force: bool) -> MoveTarget:
    """Looks whether it is there.

    Raises:
        ConfigError: QEMU cannot run off it, or it must not be overwritten.
    """
    target = parse_target(text, to)
    if target.place not in {Place.FILE, Place.DEVICE}:
        raise ConfigError(f"{text}: the VM moves to a file or a block device of this host")
    if target.format not in {"qcow2", "raw"}:
        raise ConfigError(f"{text}: a VM runs off qcow2 or raw; not off {target.format}")
    path = os.path.abspath(target.location)
    device = target.place is Place.DEVICE
    if device and not force:
        raise ConfigError(f"{text}: all that is on this device is overwritten; --force does it")
    if not device and os.path.lexists(path) and not force:
        raise ConfigError(f"{text} is there already; choose another name, or --force")
    if not os.path.isdir(os.path.dirname(path)):
        raise ConfigError(f"{text}: there is no directory {os.path.dirname(path)}")
    return MoveTarget(path, target.format, device, direct)


@asynccontextmanager
async def _monitor(source: Source) -> AsyncIterator[QmpClient]:
    at = parse_qemu(source.location).monitor
    client = await open_qmp(f"qemu:{at}", path=at.path, host=at.host, port=at.port)
    try:
        yield client
    finally:
        await client.close()


async def _migrate(order: Order) -> Moved:
    with progress(order.source.selector or "migrate", quiet=order.quiet) as advance:
        async with _monitor(order.source) as client:
            move = QemuMove(client, order.source.selector, order.rate)
            if order.target is None:
                return await move.stream(advance)
            return await move.to(order.target, advance)


async def _cancel(order: Order) -> bool:
    async with _monitor(order.source) as client:
        return await QemuMove(client, order.source.selector).cancel()


def _report(order: Order, moved: Moved, duration: float, *, as_json: bool) -> None:
    target = order.target
    if as_json:
        facts = {
            "device": moved.device,
            "mode": moved.mode,
            "source": moved.source,
            "target": target.path if target else None,
            "format": target.format if target else None,
            "size": moved.size,
            "copied_bytes": moved.copied,
            "resumed": moved.resumed,
            "nodes_kept": moved.kept,
            "duration_s": round(duration, 3),
        }
        click.echo(json.dumps(facts))
    elif not order.quiet:
        where = f"is on {target.path} now" if target else "needs its backing image no more"
        how = f"{human(moved.copied)} copied in {duration:.1f} s"
        click.echo(f"{moved.device}: {where}; {how}")
        if moved.kept:
            click.echo(f"still open in QEMU, for somebody uses them: {', '.join(moved.kept)}")
