"""The command line: parse, call, print. Everything else is elsewhere."""

import logging
import os
import sys
from importlib import import_module

import click

from nbdsrv import __version__
from nbdsrv.cli.stopping import STOP, Stopped, say
from nbdsrv.cli.streams import OutputError, abandon, prepare_streams
from nbdsrv.errors import ConfigError, NbdsrvError
from nbdsrv.store.answers import some_left_behind

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
    prepare_streams()  # before anything is opened, also a pipe
    STOP.install()
    if logging.lastResort is not None:  # the warnings of commands that keep no log
        logging.lastResort.setFormatter(logging.Formatter("nbdsrv: %(message)s"))
    try:
        code = _run()
        sys.stdout.flush()
    except Stopped as stopped:
        abandon(sys.stdout)  # maybe that is what it waited for
        if not say(str(stopped)):
            abandon(sys.stderr)
        code = stopped.code
    except OutputError as error:
        abandon(sys.stdout)
        code = _fail(str(error), 1)
    except BrokenPipeError:
        abandon(sys.stdout)  # its reader left; so may we
        code = 1
    STOP.retire()
    if some_left_behind():
        _leave(code)
    sys.exit(code)


def _run() -> int:
    try:
        code: int | None = cli.main(prog_name="nbdsrv", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        return _fail(_with_hint(error), 2)
    except ConfigError as error:
        return _fail(str(error), 2)
    except OutputError:
        raise
    except NbdsrvError as error:
        return _fail(str(error), 1)
    except FileNotFoundError:  # relative paths are made absolute in many places
        if _has_working_directory():
            raise
        return _fail("the working directory has been removed; change into another one", 1)
    return code or 0


def _leave(code: int) -> None:
    """Without what Python does at its end: a thread that is in a library then may abort it all."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass  # nobody takes it
    os._exit(code)


def _with_hint(error: click.ClickException) -> str:
    """What is wrong with the command line and, unless that is said already, who knows better."""
    said = error.format_message()
    context = getattr(error, "ctx", None)
    if context is None or not said.endswith("."):  # it asks: did you mean ...?
        return said
    return f"{said[:-1]}; see `{context.command_path} --help`"


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _fail(text: str, code: int) -> int:
    line = " ".join(text.split())
    try:
        click.echo(f"nbdsrv: {line}", err=True)
    except OSError:  # the log it goes to is on a full disk; the exit code still tells
        abandon(sys.stderr)
    return code
