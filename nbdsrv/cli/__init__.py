"""The command line: parse, call, print. Everything else is elsewhere."""

import sys

import click

from nbdsrv import __version__
from nbdsrv.cli.compare import compare
from nbdsrv.cli.copy import copy
from nbdsrv.cli.image import info, map_
from nbdsrv.cli.serve import serve
from nbdsrv.errors import ConfigError, NbdsrvError

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nbdsrv")
def cli() -> None:
    """Serve disks over NBD, for backup and instant restore of virtual machines.

    SOURCE is an image (disk.img, vhd:/path/disk.vhd) or an NBD URI; see docs/usage.md.
    """


cli.add_command(serve)
cli.add_command(info)
cli.add_command(map_)
cli.add_command(copy)
cli.add_command(compare)


def main() -> None:
    """Run; every error is one line on standard error and an exit code."""
    try:
        code = cli.main(prog_name="nbdsrv", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 2
    except click.ClickException as error:
        code = _fail(error.format_message(), 2)
    except ConfigError as error:
        code = _fail(str(error), 2)
    except NbdsrvError as error:
        code = _fail(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left; so may we
        code = 1
    sys.exit(code)


def _fail(text: str, code: int) -> int:
    line = " ".join(text.split())
    click.echo(f"nbdsrv: {line}", err=True)
    return code
