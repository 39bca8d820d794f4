"""``nbdsrv init``: a new repository."""

import click

from nbdsrv.cli.quantities import parse_size
from nbdsrv.cli.words import human
from nbdsrv.errors import ConfigError
from nbdsrv.export.grammar import Kind, Source, parse_source

__all__ = ["init", "repository_source"]


def repository_source(text: str, what: str, *, written: bool = False) -> Source:
    """A whole repository; ``what`` takes it, for the message.

    Args:
        text: as it was given.
        what: command or option.
        written: is any good that backups go to? Otherwise only one of ours.

    Raises:
        ConfigError: it is none.
    """
    from nbdsrv.repository.opening import NATIVE, WRITTEN

    source = parse_source(text)
    schemes = WRITTEN if written else NATIVE
    if source.kind is not Kind.REPOSITORY or source.scheme not in schemes:
        hint = "repo:/path or repo+s3://bucket/prefix" + (" or xo:/path" if written else "")
        raise ConfigError(f"{text}: {what} takes a repository: {hint}")
    if source.selector or source.partition is not None:
        raise ConfigError(f"{text}: {what} takes a whole repository; leave out what follows it")
    return source


@click.command(short_help="Make an empty repository.")
@click.argument("repository")
@click.option(
    "--chunk-size",
    default="256K",
    show_default=True,
    metavar="SIZE",
    help="64K to 4M, a power of two: smaller ones find more that is the same, at more metadata.",
)
@click.option(
    "--hash",
    "hash_",
    type=click.Choice(["blake3", "sha256"]),
    default="blake3",
    show_default=True,
    help="Names all content.",
)
@click.option(
    "--encrypt",
    is_flag=True,
    help="Encrypt everything; NBDSRV_PASSPHRASE or NBDSRV_PASSPHRASE_FILE gives the passphrase.",
)
@click.option("--quiet", is_flag=True, help="Print nothing.")
def init(repository: str, chunk_size: str, hash_: str, *, encrypt: bool, quiet: bool) -> None:
    """Make an empty REPOSITORY: repo:/path or repo+s3://bucket/prefix.

    What is chosen here cannot be changed later.
    """
    from nbdsrv.repository.native.config import RepositoryConfig
    from nbdsrv.repository.native.sealing import CIPHER
    from nbdsrv.repository.native.vault import Vault
    from nbdsrv.repository.passphrase import passphrase_of
    from nbdsrv.store.opening import open_store

    source = repository_source(repository, "init")
    config = RepositoryConfig(
        chunk_size=parse_size("--chunk-size", chunk_size),
        hash=hash_,
        cipher=CIPHER if encrypt else None,
    )
    config.check()
    if encrypt:
        passphrase_of()  # before anything is written
    store = open_store(source.scheme, source.location)
    try:
        Vault.create(store, config, passphrase_of)
    finally:
        store.close()
    if not quiet:
        kind = "encrypted" if encrypt else "not encrypted"
        click.echo(
            f"{repository}: a repository of chunks of {human(config.chunk_size)}, {hash_}, {kind}"
        )
