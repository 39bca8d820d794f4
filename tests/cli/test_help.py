"""What ``--help`` says: every command in a line of its own, every option in words."""

from collections.abc import Iterator

import click
import pytest

from nbdsrv.cli import cli


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{path}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")


COMMANDS = dict(commands(cli))


def test_no_command_is_described_by_half_a_sentence() -> None:
    with click.Context(cli, max_content_width=80) as context:
        text = cli.get_help(context)
    assert len(COMMANDS) > 20
    assert "...\n" not in text.partition("Commands:")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_for(name: str) -> None:
    for option in COMMANDS[name].params:
        if isinstance(option, click.Option):
            words = (option.help or "").partition("[default")[0]
            assert words.strip(), f"{name} {option.opts[0]}"
            record = option.get_help_record(click.Context(COMMANDS[name]))
            assert record is not None
            assert "RANGE" not in record[0], f"{name} {record[0]}"
