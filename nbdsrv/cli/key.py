"""``nbdsrv key``: which passphrases open a repository."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import click

from nbdsrv.errors import ConfigError, RepositoryError
from nbdsrv.export.grammar import Kind, Source, parse_source
from nbdsrv.repository.native.config import RepositoryConfig
from nbdsrv.repository.native.keys import add_slot, open_slot, remove_slot, slots
from nbdsrv.repository.native.layout import CONFIG
from nbdsrv.repository.native.vault import MAX_CONFIG
from nbdsrv.repository.opening import NATIVE
from nbdsrv.repository.passphrase import passphrase_of
from nbdsrv.store.opening import open_store
from nbdsrv.store.store import ObjectMissing, Store

__all__ = ["key"]

NEW = "NBDSRV_NEW_PASSPHRASE"
MAX_LABEL = 200


class _Aliases(click.Group):
    """``rotate`` is another word for ``change``."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, "change" if cmd_name == "rotate" else cmd_name)


@click.group(cls=_Aliases, short_help="The passphrases of an encrypted repository.")
def key() -> None:
    """List, add, remove and change the passphrases of an encrypted REPOSITORY.

    Each opens it on its own, in a key slot of its own. The passphrase that is valid now comes from
    NBDSRV_PASSPHRASE or the file NBDSRV_PASSPHRASE_FILE names, a new one from
    NBDSRV_NEW_PASSPHRASE or NBDSRV_NEW_PASSPHRASE_FILE.
    """


def _label(_: click.Context, __: click.Parameter, text: str) -> str:
    if len(text) > MAX_LABEL or not (text.isprintable() or not text):
        raise click.BadParameter(f"a label has at most {MAX_LABEL} printable characters")
    return text


@key.command()
@click.argument("repository")
@click.option("--json", "as_json", is_flag=True, help="Print the slots as JSON.")
def ls(repository: str, *, as_json: bool) -> None:
    """List the key slots. Needs no passphrase."""
    with _opened(repository) as (store, _):
        found = slots(store)
    rows = [
        {
            "slot": name,
            "label": slot.label if slot is not None else "",
            "created": slot.created if slot is not None else None,
            "kdf": slot.kdf if slot is not None else None,
            "usable": slot is not None,
        }
        for name, slot in found.items()
    ]
    if as_json:
        click.echo(json.dumps({"repository": repository, "slots": rows}))
        return
    for name, slot in found.items():
        if slot is None:
            click.echo(f"{name}  cannot be read, or is of a newer nbdsrv")
        else:
            label = slot.label if slot.label.isprintable() else ascii(slot.label)
            click.echo(f"{name}  {_day(slot.created)}  {label}".rstrip())


@key.command()
@click.argument("repository")
@click.option("--label", default="", callback=_label, help="Whose passphrase it is.")
def add(repository: str, *, label: str) -> None:
    """Let another passphrase open the repository too."""
    with _opened(repository) as (store, config):
        _, master = open_slot(store, config, passphrase_of())
        name = add_slot(store, config, master, _new(), label)
    click.echo(name)


@key.command()
@click.argument("repository")
@click.argument("slot")
def rm(repository: str, slot: str) -> None:
    """Remove a key slot: its passphrase opens the repository no longer.

    The passphrase in NBDSRV_PASSPHRASE must be one that stays, so that nobody is locked out.
    """
    with _opened(repository) as (store, config):
        if slot not in slots(store):
            raise RepositoryError(f"{store.name}: no key slot {slot}; `nbdsrv key ls` shows them")
        opened, _ = open_slot(store, config, passphrase_of())
        if opened == slot:
            raise ConfigError(
                f"{store.name}: {slot} is the key slot of the passphrase that was given; give one"
                " that stays, or use `nbdsrv key change`"
            )
        remove_slot(store, slot)


@key.command()
@click.argument("repository")
@click.option(
    "--label",
    default=None,
    callback=lambda c, p, t: t if t is None else _label(c, p, t),
    help="Whose passphrase it is.  [default: as it was]",
)
def change(repository: str, *, label: str | None) -> None:
    """Put a new passphrase in the place of the one that is valid now (also: rotate)."""
    with _opened(repository) as (store, config):
        old, master = open_slot(store, config, passphrase_of())
        before = slots(store).get(old)
        if label is None:
            label = before.label if before is not None else ""
        # The new one first: whatever happens, one of them opens it.
        name = add_slot(store, config, master, _new(), label)
        remove_slot(store, old)
    click.echo(name)


def _new() -> str:
    try:
        return passphrase_of(variable=NEW)
    except ConfigError as error:
        raise ConfigError(f"no new passphrase; set {NEW} or {NEW}_FILE ({error})") from error


@contextmanager
def _opened(text: str) -> Iterator[tuple[Store, bytes]]:
    """The store of an encrypted repository, and its configuration as it is stored."""
    source = _repository(text)
    store = open_store(source.scheme, source.location)
    try:
        try:
            data = store.get(CONFIG, MAX_CONFIG)
        except ObjectMissing as error:
            raise RepositoryError(f"{store.name}: no repository there") from error
        config = RepositoryConfig.parse(data, f"{store.name}/{CONFIG}")
        if config.cipher is None:
            raise RepositoryError(f"{store.name}: is not encrypted, so it has no keys")
        yield store, data
    finally:
        store.close()


def _repository(text: str) -> Source:
    source = parse_source(text)
    if source.kind is not Kind.REPOSITORY or source.scheme not in NATIVE:
        raise ConfigError(f"{text}: not one of nbdsrv's repositories (repo:/path)")
    if source.selector or source.partition is not None:
        raise ConfigError(f"{text}: keys are those of a whole repository; leave out the rest")
    return source


def _day(created: float) -> str:
    try:
        return datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return "-"
