"""The configuration file: read, understood, and checked as far as one can without serving.

::

    FILE ── tomllib ── Settings ── checked: names, rules, addresses, files ──> ConfigFile
               │           │                │
               └───────────┴────────────────┴──> ConfigError: FILE:LINE: export.vm1.acess: why

Paths in it are taken from the working directory, as on the command line.
"""

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec

from nbdsrv.errors import ConfigError
from nbdsrv.export.access import EVERYBODY, Access, Grant, Rule, parse_subject
from nbdsrv.export.exports import is_name
from nbdsrv.export.grammar import Kind, Source, parse_source
from nbdsrv.net.tls import server_context
from nbdsrv.ops.endpoints import Endpoint, overlapping, parse_endpoint, parse_socket, parse_tcp
from nbdsrv.ops.settings import ExportTable, RepositoryTable, RuleTable, Settings
from nbdsrv.ops.toml_lines import Path, key_lines
from nbdsrv.repository.passphrase import VARIABLE, passphrase_of

__all__ = ["ConfigFile", "load_config"]

MAX_FILE = 4 << 20
"""Bytes of a configuration: ten thousand exports."""
_GRANTS = {"rw": Grant.WRITE, "ro": Grant.READ, "none": Grant.NONE}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A configuration in which no mistake was found.

    Attributes:
        path: as it was given.
        settings: what it says.
    """

    path: str
    settings: Settings
    _lines: Mapping[Path, int]
    _raw: Mapping[str, Any]

    def error(self, where: Path, reason: str) -> ConfigError:
        """A mistake found later, with its place."""
        return _mistake(self.path, self._lines, self._raw, where, reason)

    def access(self, table: ExportTable | RepositoryTable) -> Access:
        """Who may use an export, or what a repository holds."""
        allow = self.settings.allow if table.allow is None else table.allow
        if allow is None:
            return EVERYBODY
        return Access(tuple(map(_rule, allow)), table.hidden)


def load_config(path: str) -> ConfigFile:
    """Read a configuration file. Blocking: it may also ask for the addresses of host names.

    Raises:
        ConfigError: it cannot be read, is no TOML, or says something impossible. Where there are
            several mistakes, the first that was found.
    """
    text = _read(path)
    try:
        raw = tomllib.loads(text)
        lines = key_lines(text)
    except tomllib.TOMLDecodeError as error:
        raise _no_toml(path, text, str(error)) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: values are nested too deep") from error
    reading = _Reading(path, raw, lines)
    settings = reading.settings()
    reading.check(settings)
    return ConfigFile(path, settings, reading.lines, raw)


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path!r}: no file can have this name") from error
    if len(data) > MAX_FILE:
        raise ConfigError(f"{path}: longer than {MAX_FILE >> 20} MiB; is it a configuration?")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8") from error


def _no_toml(path: str, text: str, reason: str) -> ConfigError:
    place = r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)"
    match = re.fullmatch(place, reason, re.DOTALL)
    if match is None:
        return ConfigError(f"{path}: {reason}")
    line = match[2] or str(max(1, len(text.splitlines())))
    column = f", column {match[3]}" if match[3] else ""
    return ConfigError(f"{path}:{line}{column}: {match[1]}")


def _mistake(
    file: str, lines: Mapping[Path, int], raw: Mapping[str, Any], where: Path, reason: str
) -> ConfigError:
    known = where
    while known and known not in lines:
        known = known[:-1]
    line = f":{lines[known]}" if known else ""
    said = _said(raw, where)
    return ConfigError(f"{file}{line}: {said}{': ' if said else ''}{reason}")


def _said(raw: Mapping[str, Any], where: Path) -> str:
    """``export.vm1.allow[0].uid``: exports by name, for positions mean little to people."""
    words = ""
    for number, part in enumerate(where):
        if isinstance(part, int):
            name = None
            if number == 1 and where[0] == "export":
                name = _name_of(raw, part)
            words += f"[{part}]" if name is None else f".{name}"
        else:
            words += f".{part if part.isprintable() else ascii(part)}"
    return words.removeprefix(".")


def _name_of(raw: Mapping[str, Any], position: int) -> str | None:
    try:
        name = raw["export"][position]["name"]
    except (LookupError, TypeError):
        return None
    fit = isinstance(name, str) and name and len(name) <= 100 and name.isprintable()
    return name if fit else None


def _rule(table: RuleTable) -> Rule:
    network = None
    if table.address is not None:
        network = ipaddress.ip_network(table.address)
    subject = None if table.subject is None else parse_subject(table.subject)
    return Rule(subject, network, table.uid, table.gid, _GRANTS[table.access])


class _Reading:
    """One file on its way to ``Settings``.

    Attributes:
        lines: where each key stands.
    """

    def __init__(self, path: str, raw: dict[str, Any], lines: Mapping[Path, int]) -> None:
        self._path = path
        self._raw = raw
        self.lines = lines

    def mistake(self, where: Path, reason: str) -> ConfigError:
        return _mistake(self._path, self.lines, self._raw, where, reason)

    # --- form ------------------------------------------------------

    def settings(self) -> Settings:
        """Types and keys."""
        rest = {key: value for key, value in self._raw.items() if key not in _APART}
        settings = self._convert((), rest, Settings)
        repositories = self._table("repository", dict)
        exports = self._table("export", list)
        return msgspec.structs.replace(
            settings,
            repository={
                name: self._convert(("repository", name), each, RepositoryTable)
                for name, each in repositories.items()
            },
            export=tuple(
                self._convert(("export", n), each, ExportTable) for n, each in enumerate(exports)
            ),
        )

    def _table(self, key: str, kind: type[T]) -> T:
        value = self._raw.get(key, kind())
        if not isinstance(value, kind):
            form = "[[export]]" if kind is list else "[repository.NAME]"
            raise self.mistake((key,), f"expected tables, {form}")
        return value

    def _convert(self, base: Path, value: object, kind: type[T]) -> T:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            reason, _, place = str(error).partition(" - at ")
            where = base + _steps(place.strip("`"))
            unknown = re.search("unknown field `(.*)`", reason, re.DOTALL)
            missing = re.search("missing required field `(.*)`", reason, re.DOTALL)
            if unknown is not None:
                said = _unknown(unknown[1], _fields_at(kind, where[len(base) :]))
                raise self.mistake((*where, unknown[1]), said) from error
            if missing is not None:
                raise self.mistake(where, f"{missing[1]} is missing") from error
            raise self.mistake(where, _in_toml(reason)) from error

    # --- meaning ------------------------------------------------------

    def check(self, settings: Settings) -> None:
        """What the form does not tell."""
        self._check_rules(settings, (), settings.allow)
        names: dict[str, int] = {}
        for n, export in enumerate(settings.export):
            self._check_export(settings, ("export", n), export)
            if (other := names.setdefault(export.name, n)) != n:
                line = self.lines.get(("export", other, "name"))
                said = f"this name is taken by the export in line {line}"
                raise self.mistake(("export", n, "name"), said)
        prefixes: dict[str, str] = {}
        for name, repository in settings.repository.items():
            self._check_repository(settings, ("repository", name), repository)
            prefix = f"{name}/" if repository.prefix is None else repository.prefix
            if (taken := prefixes.setdefault(prefix, name)) != name:
                said = f"repository.{taken} has {prefix!r} too: of points of one name one is hidden"
                raise self.mistake(("repository", name), said)
        self._check_places(settings)
        self._check_tls(settings)

    def _check_rules(
        self, settings: Settings, base: Path, allow: Iterable[RuleTable] | None
    ) -> None:
        asked = settings.tls is not None and settings.tls.ca is not None
        for n, table in enumerate(allow or ()):
            where = (*base, "allow", n)
            try:
                if table.address is not None:
                    ipaddress.ip_network(table.address)
            except ValueError as error:
                raise self.mistake((*where, "address"), f"no address range: {error}") from error
            try:
                if table.subject is not None:
                    parse_subject(table.subject)
            except ConfigError as error:
                raise self.mistake((*where, "subject"), str(error)) from error
            if table.subject is not None and not asked:
                said = "without tls.ca no client shows a certificate: this rule matches nobody"
                raise self.mistake((*where, "subject"), said)
            on_socket = table.uid is not None or table.gid is not None
            if on_socket and table.address is not None:
                said = "no client has both an address and a uid or gid: this rule matches nobody"
                raise self.mistake((*where, "address"), said)

    def _check_export(self, settings: Settings, where: Path, export: ExportTable) -> None:
        self._check_rules(settings, where, export.allow)
        if not is_name(export.name):
            raise self.mistake((*where, "name"), "no export can have this name")
        source = self._source((*where, "source"), export.source)
        stored = source.kind in {Kind.REPOSITORY, Kind.HYPERVISOR}
        if export.write and stored and export.overlay is None:
            said = "what is stored there is only read; writes need an overlay"
            raise self.mistake((*where, "write"), said)
        self._check_tls_only(settings, where, tls_only=export.tls_only)

    def _check_repository(
        self, settings: Settings, where: Path, repository: RepositoryTable
    ) -> None:
        self._check_rules(settings, where, repository.allow)
        source = self._source((*where, "location"), repository.location)
        if source.kind is not Kind.REPOSITORY or source.partition is not None:
            said = "no repository; expected for instance repo:/srv/backup"
            raise self.mistake((*where, "location"), said)
        if repository.passphrase_file is not None:
            look = partial(passphrase_of, {f"{VARIABLE}_FILE": repository.passphrase_file})
            self._try((*where, "passphrase_file"), look)
        self._check_tls_only(settings, where, tls_only=repository.tls_only)

    def _source(self, where: Path, text: str) -> Source:
        return self._try(where, partial(parse_source, text))

    def _try(self, where: Path, look: Callable[[], T]) -> T:
        try:
            return look()
        except ConfigError as error:
            raise self.mistake(where, str(error)) from error

    def _check_tls_only(self, settings: Settings, where: Path, *, tls_only: bool) -> None:
        if tls_only and settings.tls is None:
            raise self.mistake((*where, "tls_only"), "there is no [tls] to serve it with")
        if tls_only and settings.tls is not None and settings.tls.mode == "off":
            raise self.mistake((*where, "tls_only"), "tls.mode is off")

    def _check_places(self, settings: Settings) -> None:
        """Nothing is listened on twice."""
        taken: list[tuple[Path, Endpoint]] = []
        for n, text in enumerate(settings.listen or ()):
            place = self._try(("listen", n), partial(parse_endpoint, text))
            self._check_free(taken, ("listen", n), place)
        if settings.listen is not None and not settings.listen:
            raise self.mistake(("listen",), "nothing to listen on; leave it out for the default")
        if settings.admin is not None:
            where = ("admin", "socket")
            place = self._try(where, partial(parse_socket, settings.admin.socket))
            self._check_free(taken, where, place)
        if settings.metrics is not None:
            where = ("metrics", "listen")
            place = self._try(where, partial(parse_tcp, settings.metrics.listen))
            self._check_free(taken, where, place)

    def _check_free(self, taken: list[tuple[Path, Endpoint]], where: Path, place: Endpoint) -> None:
        for other, there in taken:
            if overlapping(place, there):
                line = self.lines.get(other, self.lines.get(other[:1]))
                said = f"overlaps with {_said(self._raw, other)} in line {line}"
                raise self.mistake(where, said)
        taken.append((where, place))

    def _check_tls(self, settings: Settings) -> None:
        tls = settings.tls
        if tls is None:
            return
        for key in ("cert", "key", "ca"):
            path = getattr(tls, key)
            if path is None:
                continue
            try:
                with open(path, "rb"):
                    pass
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise self.mistake(("tls", key), f"{path}: {reason}") from error
        self._try(("tls",), partial(server_context, tls.cert, tls.key, tls.ca))


_APART = frozenset({"repository", "export"})


def _steps(place: str) -> Path:
    """``$.allow[0].uid`` as msgspec writes it, in parts."""
    found = re.finditer(r"\.([A-Za-z0-9_]+)|\[(\d+)\]", place)
    return tuple(each[1] if each[1] is not None else int(each[2]) for each in found)


def _fields_at(kind: type[object], steps: Path) -> list[str]:
    """The keys a table may have that lies that many steps below ``kind``."""
    if steps and steps[-1] != "allow" and isinstance(steps[-1], int):
        return list(RuleTable.__struct_fields__)
    if steps:
        value = getattr(Settings, "__annotations__", {}).get(steps[-1])
        for each in (value, *getattr(value, "__args__", ())):
            if fields := getattr(each, "__struct_fields__", None):
                return list(fields)
    return list(getattr(kind, "__struct_fields__", ()))


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, 0.6)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    return f"unknown key; there are {', '.join(known)}"


def _in_toml(reason: str) -> str:
    """Msgspec speaks of JSON."""
    text = reason.replace("`", "").replace(" | null", "")
    for json, toml in (("object", "table"), ("str", "string"), ("bool", "true or false")):
        text = re.sub(rf"\b{json}\b", toml, text)
    text = re.sub(r"^(Expected \S+) matching regex '\^0\?\[0-7\]\{3\}\$'$", _OCTAL, text)
    return text[:1].lower() + text[1:]


_OCTAL = "expected three octal digits"
