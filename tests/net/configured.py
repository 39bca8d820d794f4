"""A server with a configuration file, and what it has written about its clients."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving import ServerProcess, command, eventually
from wire import Wire, info_data

from nbdsrv.ops.admin_client import AdminClient
from protocol.constants import Option, Reply

ME = os.geteuid()


@dataclass
class Service:
    """It is running."""

    directory: Path
    server: ServerProcess

    @classmethod
    def start(cls, directory: Path, text: str, *, uris: int, where: str = "") -> "Service":
        """On a Unix socket unless ``where`` says otherwise; with admin socket and audit file."""
        if not where:
            where = f'["unix:{directory}/nbd"]'
        head = f"""listen = {where}
[admin]
socket = "{directory}/admin"
[audit]
file = "{directory}/audit"
"""
        service = cls(directory, None)  # type: ignore[arg-type]
        service.head = head
        service.write(text)
        arguments = command("--config", directory / "nbdsrv.toml")
        service.server = ServerProcess(arguments, uris=uris)
        return service

    head: str = ""

    def write(self, text: str) -> None:
        """Another configuration; nobody has been told yet."""
        top, _, tables = self.head.partition("[admin]")
        before, mark, exports = text.partition("[[")
        whole = top + before + "[admin]" + tables + mark + exports
        (self.directory / "nbdsrv.toml").write_text(whole)

    def reload(self, text: str) -> Any:
        """Write it and have it taken up."""
        self.write(text)
        return self.ask("reload")

    def ask(self, what: str, **more: int) -> Any:
        """By the admin socket."""
        with AdminClient(str(self.directory / "admin")) as client:
            return client.ask(what, **more)

    def names(self, wire: Wire) -> Sequence[str]:
        """What LIST shows."""
        *found, last = wire.ask(Option.LIST)
        assert last.reply == Reply.ACK
        return [each.data[4 : 4 + int.from_bytes(each.data[:4], "big")].decode() for each in found]

    def refusal(self, wire: Wire, name: str) -> Reply:
        """What GO is answered by."""
        return wire.verdict(Option.GO, info_data(name))

    def audit(self) -> list[dict[str, Any]]:
        """All lines, without times."""
        lines = (self.directory / "audit").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        for event in events:
            assert event.pop("time")
            event.pop("pid", None)
            event.pop("port", None)
            event.pop("gid", None)
        return events

    def audited(self, event: str, **facts: object) -> bool:
        """Is there such a line, now or soon?"""
        wanted = {"event": event} | facts
        return eventually(lambda: any(wanted.items() <= each.items() for each in self.audit()))
