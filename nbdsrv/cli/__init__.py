"""The command line: parse, call, print. Everything else is elsewhere."""

import io
import logging
import os
import sys
from contextlib import suppress
from importlib import import_module

import click

from nbdsrv import __version__
from nbdsrv.errors import ConfigError, NbdsrvError

__all__ = ["main"]


_COMMANDS = {
    "serve": "nbdsrv.cli.serve:serve",
    "info": "nbdsrv.cli.image:info",
    "map": "nbdsrv.cli.image:map_",
    "ls": "nbdsrv.cli.points:ls",
    "copy": "nbdsrv.cli.copy:copy",
    "compare": "nbdsrv.cli.compare:compare",
    "init": "nbdsrv.cli.init:init",
    "proxy": "nbdsrv.cli.proxy:proxy",
    "backup": "nbdsrv.cli.backup:backup",
    "restore": "nbdsrv.cli.restore:restore",
    "key": "nbdsrv.cli.key:key",
    "prune": "nbdsrv.cli.prune:prune",
    "gc": "nbdsrv.cli.gc:gc",
    "verify": "nbdsrv.cli.verify:verify",
    "status": "nbdsrv.cli.status:status",
    "reload": "nbdsrv.cli.reload:reload",
    "overlay": "nbdsrv.cli.overlay:overlay",
    "migrate": "nbdsrv.cli.migrate:migrate",
}
"""Command to ``module:function``; imported when it is run, for a server's modules take a while."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nbdsrv")
def cli() -> None:
    """Serve disks over NBD, for backup and instant restore of virtual machines.

    SOURCE is an image (disk.img, vhd:/path/disk.vhd), a restore point of any of the usual tools
    (repo:/backup#vm/disk@latest, xo:/remote#...), an NBD URI or a running VM; see docs/usage.md.
    """


def main() -> None:
    """Run; every error is one line on standard error and an exit code."""
    _occupy_standard_descriptors()
    _buffer_output()
    if logging.lastResort is not None:  # the warnings of commands that keep no log
        logging.lastResort.setFormatter(logging.Formatter("nbdsrv: %(message)s"))
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
    except OSError as error:
        if not _printing(error):
            raise
        code = _fail(f"writing standard output: {error.strerror}", 1)
        with suppress(OSError):
            sys.stdout.close()  # what it still holds would fail once more at the exit
    sys.exit(code)


def _fail(text: str, code: int) -> int:
    line = " ".join(text.split())
    try:
        click.echo(f"nbdsrv: {line}", err=True)
    except OSError:  # nothing is left to say it with
        with suppress(OSError):
            sys.stderr.close()
    return code


def _occupy_standard_descriptors() -> None:
    """Those we were started without (``2>&-``) lead nowhere.

    A disk that is opened must not get their numbers: what is printed would be written into it.
    """
    fd = 0
    while fd <= 2:
        fd = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(fd, fd <= 2)
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _buffer_output() -> None:
    """Print through a buffer also if ``PYTHONUNBUFFERED`` asks for none.

    Without one Python takes a write that went half through for a whole one, and the rest is lost
    without a word. Linux has been seen to end long writes to a pipe early here, with no signal.
    """
    out = sys.stdout
    if isinstance(getattr(out, "buffer", None), io.RawIOBase):
        encoding, errors = out.encoding, out.errors
        sys.stdout = open(1, "w", 1, encoding, errors, closefd=False)  # noqa: SIM115


def _printing(error: OSError) -> bool:
    """Was it raised by what prints?"""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and at.tb_frame.f_code is click.echo.__code__
