"""Who gets in: by uid, address and certificate; what the others are told, and what is written."""

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from authority import Authority, Certificates, Pair
from configured import ME, Service
from serving import eventually
from wire import Wire, info_data, meta_data

from protocol.constants import Command, CommandFlag, Dialect, Errno, Option, Reply, TransmissionFlag

DATA = bytes(range(256)) * 256
Start = Callable[..., Service]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Service] = []

    def begin(text: str, *, uris: int = 1, where: str = "") -> Service:
        started.append(Service.start(tmp_path, text, uris=uris, where=where))
        return started[-1]

    yield begin
    for service in started:
        service.server.stop()


def export(image: Path, name: str, more: str = "") -> str:
    return f'[[export]]\nname = "{name}"\nsource = "{image}"\n{more}\n'


def test_hidden_from_a_wrong_uid_and_open_to_the_right_one(start: Start, image: Path) -> None:
    theirs = export(image, "theirs", f"allow = [{{uid = {ME + 1}}}]")
    ours = export(image, "ours", f"allow = [{{uid = {ME}}}]")
    service = start(theirs + ours, uris=2)
    wire = service.server.connect()
    wire.greet()
    assert service.names(wire) == ["ours"]
    wire.use(Dialect.STRUCTURED)
    assert service.refusal(wire, "theirs") == service.refusal(wire, "absent") == Reply.ERR_UNKNOWN
    asked = meta_data("theirs", ["base:allocation"])
    assert wire.verdict(Option.SET_META_CONTEXT, asked) == Reply.ERR_UNKNOWN
    wire.go("ours")
    assert wire.read(100, 1000) == DATA[100:1100]
    wire.disconnect()
    assert service.audited("refuse", export="theirs", uid=ME, reason="not allowed")
    assert service.audited("refuse", export="absent", uid=ME, reason="no such export")
    assert service.audited("attach", export="ours", uid=ME, access="ro")
    assert service.audited("detach", export="ours", reason="left", reads=1)
    (gone,) = [each for each in service.audit() if each["event"] == "detach"]
    assert (gone["received"], gone["sent"]) == (2 * 28, 20 + 8 + 1000)


def test_the_texts_do_not_tell_hidden_from_absent(start: Start, image: Path) -> None:
    service = start(export(image, "aa", "allow = []") + export(image, "z"), uris=2)
    wire = service.server.connect()
    wire.greet()
    texts = []
    for name in ("aa", "bb"):
        (reply,) = wire.ask(Option.INFO, len(name).to_bytes(4) + name.encode() + bytes(2))
        texts.append(reply.data.replace(name.encode(), b"*"))
    assert texts[0] == texts[1]


def test_one_that_is_not_hidden_is_refused_by_policy(start: Start, image: Path) -> None:
    service = start(export(image, "seen", "hidden = false\nallow = []"))
    wire = service.server.connect()
    wire.greet()
    assert service.names(wire) == ["seen"]
    assert service.refusal(wire, "seen") == Reply.ERR_POLICY
    wire.use(Dialect.STRUCTURED)
    asked = meta_data("seen", ["base:allocation"])
    assert wire.verdict(Option.SET_META_CONTEXT, asked) == Reply.ERR_POLICY
    assert wire.verdict(Option.ABORT) == Reply.ACK


def test_old_clients_are_hung_up_on(start: Start, image: Path) -> None:
    service = start(export(image, "", "allow = []"))
    wire = service.server.connect()
    wire.greet()
    wire.send(b"IHAVEOPT" + (1).to_bytes(4) + bytes(4))
    assert wire.is_closed()


@pytest.mark.parametrize("dialect", list(Dialect))
def test_readers_and_writers_of_one_disk(start: Start, image: Path, dialect: Dialect) -> None:
    """By address and by socket, of which one may write."""
    rules = f'allow = [{{uid = {ME}}}, {{address = "127.0.0.0/8", access = "ro"}}]'
    where = f'["unix:{image.parent}/nbd", "127.0.0.1:0"]'
    service = start(export(image, "d", f"write = true\n{rules}"), uris=2, where=where)
    writer = service.server.connect(0).enter("d", dialect)
    reader = service.server.connect(1).enter("d", dialect)
    assert TransmissionFlag.READ_ONLY not in writer.flags
    assert TransmissionFlag.READ_ONLY in reader.flags
    assert not reader.flags & (TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES)
    writer.write(0, b"w" * 512)
    assert reader.read(0, 1024) == b"w" * 512 + DATA[512:1024]
    for _ in range(2):
        assert reader.call(Command.WRITE, 0, payload=b"r" * 512).error == Errno.EPERM
        assert reader.call(Command.TRIM, 0, 512).error == Errno.EPERM
        assert reader.call(Command.WRITE_ZEROES, 0, 512).error == Errno.EPERM
    assert reader.call(Command.WRITE, 0, flags=CommandFlag.FUA, payload=b"r").error == Errno.EPERM
    assert reader.read(0, 512) == b"w" * 512
    writer.disconnect()
    reader.disconnect()
    assert image.read_bytes()[:512] == b"w" * 512
    assert service.audited("detach", export="d", address="127.0.0.1", access="ro")
    assert service.audited("detach", export="d", uid=ME, access="rw", writes=1)
    assert len(service.ask("clients")) == 0


def test_rules_are_asked_in_order(start: Start, image: Path) -> None:
    none_first = export(image, "d", f'allow = [{{uid = {ME}, access = "none"}}, {{}}]')
    service = start(none_first)
    wire = service.server.connect()
    wire.greet()
    assert service.refusal(wire, "d") == Reply.ERR_UNKNOWN


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Pair, Pair]:
    authority = Authority(tmp_path_factory.mktemp("ca"), "subjects")
    return authority, authority.client("web1"), authority.client("web2")


def secured(service: Service, authority: Authority, pair: Pair | None) -> Wire:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority.certificate)
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key)
    wire = service.server.connect()
    wire.greet()
    wire.starttls(context)
    return wire


def test_certificates_by_their_subjects(
    start: Start,
    image: Path,
    web: tuple[Authority, Pair, Pair],
    certificates: Certificates,
) -> None:
    authority, web1, web2 = web
    server = authority.server()
    tls = f'[tls]\ncert="{server.certificate}"\nkey="{server.key}"\nca="{authority.certificate}"\n'
    rules = 'allow = [{subject = "CN=web1"}, {subject = "CN=web2", access = "none"}]'
    service = start("\n" + tls + export(image, "d", rules), where='["127.0.0.1:0"]')
    wire = secured(service, authority, web1)
    assert service.names(wire) == ["d"]
    wire.go("d")
    (client,) = service.ask("clients")
    assert (client["subject"], client["tls"], client["address"]) == (
        "CN=web1",
        "TLSv1.3",
        "127.0.0.1",
    )
    wire.disconnect()
    other = secured(service, authority, web2)
    assert service.names(other) == []
    assert service.refusal(other, "d") == Reply.ERR_UNKNOWN
    assert service.audited("refuse", subject="CN=web2", export="d", reason="not allowed")
    with pytest.raises((ssl.SSLError, ConnectionError, EOFError)):
        secured(service, authority, certificates.stranger).ask(Option.LIST)  # TLS 1.3: only now
    assert eventually(lambda: any("verify" in reason.lower() for reason in reasons(service)))


def reasons(service: Service) -> list[str]:
    """Of refusals that were not about an export."""
    return [each["reason"] for each in service.audit() if "export" not in each]


def test_a_client_that_tries_many_names_does_not_fill_the_audit_file(
    start: Start, image: Path
) -> None:
    service = start(export(image, "d"))
    wire = service.server.connect()
    wire.greet()
    for number in range(100):
        assert service.refusal(wire, f"guess\n{number}") == Reply.ERR_UNKNOWN
    refusals = [each for each in service.audit() if each["event"] == "refuse"]
    assert [each["export"] for each in refusals] == [f"guess\n{number}" for number in range(16)]


def test_nothing_beyond_loopback_without_being_asked(tmp_path: Path, image: Path) -> None:
    text = f'[[export]]\nname = "d"\nsource = "{image}"\n'
    (tmp_path / "c.toml").write_text(text)
    from nbdsrv.cli.serve_order import Order, understand
    from nbdsrv.cli.serving import DEFAULT_LISTEN, Serving
    from nbdsrv.ops.doors import Doors

    serving = Serving((), None, None, None, None, (), "600", 1, 1.0, 1.0, 64)
    order = Order(
        serving, frozenset(), (), (), write=False, cache=1, config=str(tmp_path / "c.toml")
    )
    wanted = understand(order)
    assert (wanted.admin_socket, wanted.metrics) == (None, None)
    assert Doors(service=True).places(wanted.serving.listen, DEFAULT_LISTEN, 0o600) == [
        ("127.0.0.1:10809", 0)
    ]


def test_one_that_cannot_be_opened_is_unknown_and_not_forbidden(start: Start, image: Path) -> None:
    """A store that is down, a file that is gone: POLICY and PLATFORM would be read as "never"."""
    service = start(export(image, "gone"))
    image.unlink()
    wire = service.server.connect()
    wire.greet()
    wire.use(Dialect.STRUCTURED)
    (reply,) = wire.ask(Option.GO, info_data("gone"))
    assert reply.reply == Reply.ERR_UNKNOWN
    assert reply.data == b"export 'gone' cannot be opened: No such file or directory"
    asked = meta_data("gone", ["base:allocation"])
    assert wire.verdict(Option.SET_META_CONTEXT, asked) == Reply.ERR_UNKNOWN
    assert service.refusal(wire, "gone") == Reply.ERR_UNKNOWN
    image.write_bytes(DATA)
    wire.go("gone")
    assert wire.read(0, 512) == DATA[:512]
    (refused,) = [each for each in service.audit() if each["event"] == "refuse"]
    assert refused["reason"].startswith("cannot be opened: ")
