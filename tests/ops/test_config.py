"""Configuration files: what is understood, and where each mistake is said to be."""

import ipaddress
import tomllib
from pathlib import Path

import pytest
from authority import Certificates
from hypothesis import given
from hypothesis import strategies as st

from nbdsrv.errors import ConfigError
from nbdsrv.export.access import EVERYBODY, Access, Grant, Rule, parse_subject
from nbdsrv.ops.config import ConfigFile, load_config
from nbdsrv.ops.settings import Settings

EXPORT = '[[export]]\nname = "vm1"\nsource = "disk.img"\n'


def load(tmp_path: Path, text: str | bytes) -> ConfigFile:
    path = tmp_path / "nbdsrv.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(str(path))


def mistake(tmp_path: Path, text: str | bytes) -> str:
    """What is said of it, without the directory."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(str(tmp_path))
    return said.removeprefix(f"{tmp_path}/nbdsrv.toml")


MISTAKES = [
    # unknown keys
    ("lisen = []\n", ":1: lisen: unknown key; did you mean listen?"),
    (EXPORT + "acess = 1\n", ":4: export.vm1.acess: unknown key; there are name, source"),
    (EXPORT + "overlays = 'x'\n", ":4: export.vm1.overlays: unknown key; did you mean overlay?"),
    (
        EXPORT + "allow = [\n{uid = 1},\n{adress = 'x'}]\n",
        ":6: export.vm1.allow[1].adress: unknown key; did you mean address?",
    ),
    (
        "[limits]\nconections = 1\n",
        ":2: limits.conections: unknown key; did you mean connections?",
    ),
    (
        '[repository.main]\nlocation = "repo:/r"\nprefx = ""\n',
        ":3: repository.main.prefx: unknown key; did you mean prefix?",
    ),
    ("[metric]\nlisten = 'x'\n", ":1: metric: unknown key; did you mean metrics?"),
    # wrong types and values
    ("listen = 3\n", ":1: listen: expected array, got int"),
    ("[limits]\nconnections = 'many'\n", ":2: limits.connections: expected int, got string"),
    ("\n[limits]\nconnections = 0\n", ":3: limits.connections: expected int >= 1"),
    ("[limits]\nhandshake_timeout = nan\n", ":2: limits.handshake_timeout: expected float >="),
    ('[[export]]\nname = "a"\n', ":1: export.a: source is missing"),
    ('[[export]]\nsource = "a"\n', ":1: export[0]: name is missing"),
    ("export = 3\n", ":1: export: expected tables, [[export]]"),
    ("export = [3]\n", ":1: export[0]: expected table, got int"),
    ("[[repository]]\n", ":1: repository: expected tables, [repository.NAME]"),
    ("socket_mode = '999'\n", ":1: socket_mode: expected three octal digits"),
    (EXPORT + "write = 'yes'\n", ":4: export.vm1.write: expected true or false, got string"),
    (EXPORT + "allow = [{uid = -1}]\n", ":4: export.vm1.allow[0].uid: expected int >= 0"),
    (EXPORT + "allow = [{access = 'w'}]\n", ":4: export.vm1.allow[0].access: invalid enum"),
    (EXPORT + "\n[tls]\ncert = 'x'\n", ":5: tls: key is missing"),
    # no TOML
    ("a = \n", ":1, column 5: "),
    ("a = 1\na = 2\n", ":2, column "),
    ("[", ":1: "),
    (b"a = 1\n\nb = '\xff'\n", ":3: not UTF-8"),
    ("a = " + "[" * 5000, ": values are nested too deep"),
    # rules
    (
        EXPORT + 'allow = [{address = "10.0.0.1/8"}]\n',
        ":4: export.vm1.allow[0].address: no address range: 10.0.0.1/8 has host bits set",
    ),
    (
        EXPORT + 'allow = [{subject = "web1"}]\n',
        ":4: export.vm1.allow[0].subject: 'web1' is no subject; expected for instance CN=web1",
    ),
    (
        EXPORT + 'allow = [{address = "::/0", gid = 1}]\n',
        ":4: export.vm1.allow[0].address: no client has both",
    ),
    ('allow = [{subject = "+"}]\n', ":1: allow[0].subject: '+' is no subject"),
    (
        EXPORT + 'allow = [{subject = "CN=web1", access = "none"}, {}]\n',
        ":4: export.vm1.allow[0].subject: without tls.ca no client shows a certificate: this rule",
    ),
    # names, sources
    (EXPORT + EXPORT, ":5: export.vm1.name: this name is taken by the export in line 2"),
    (EXPORT.replace("vm1", "a\\u0000b"), ":2: export[0].name: no export can have this name"),
    (EXPORT.replace("disk.img", "vhd:"), ":3: export.vm1.source: vhd:: nothing behind vhd:"),
    (
        EXPORT.replace("disk.img", "repo:/r#a/b") + "write = true\n",
        ":4: export.vm1.write: what is stored there is only read; writes need an overlay",
    ),
    (
        '[repository.main]\nlocation = "disk.img"\n',
        ":2: repository.main.location: no repository; expected for instance repo:/srv/backup",
    ),
    (
        '[repository.main]\nlocation = "repo:/r"\npassphrase_file = "/nowhere"\n',
        ":3: repository.main.passphrase_file: NBDSRV_PASSPHRASE_FILE /nowhere:",
    ),
    (
        (
            '[repository.main]\nlocation = "repo:/r"\n'
            '[repository.other]\nlocation = "repo:/s"\nprefix = "main/"\n'
        ),
        ":3: repository.other: repository.main has 'main/' too",
    ),
    # listeners
    ('listen = ["a:b"]\n', ":1: listen[0]: expected HOST:PORT, unix:PATH or systemd"),
    (f'[admin]\nsocket = "/{"x" * 107}"\n', ":2: admin.socket: a socket's path has 107 bytes"),
    (f'listen = ["unix:/{"x" * 107}"]\n', ":1: listen[0]: a socket's path has 107 bytes"),
    ('listen = ["unix:"]\n', ":1: listen[0]: a socket needs a path"),
    ('listen = ["stdio"]\n', ":1: listen[0]: stdio serves one client"),
    ("listen = []\n", ":1: listen: nothing to listen on"),
    (
        'listen = [\n"127.0.0.1:1",\n"0.0.0.0:1"]\n',
        ":3: listen[1]: overlaps with listen[0] in line 2",
    ),
    ('listen = ["localhost:7", "127.0.0.1:7"]\n', ":1: listen[1]: overlaps with listen[0]"),
    ('listen = [":7", "[::1]:7"]\n', ":1: listen[1]: overlaps with listen[0]"),
    ('listen = ["unix:/a/b", "unix:/a/./b"]\n', ":1: listen[1]: overlaps with listen[0]"),
    ('listen = ["systemd", "systemd"]\n', ":1: listen[1]: overlaps with listen[0]"),
    (
        'listen = ["unix:/s"]\n[admin]\nsocket = "/s"\n',
        ":3: admin.socket: overlaps with listen[0] in line 1",
    ),
    (
        'listen = ["127.0.0.1:9"]\n[metrics]\nlisten = ":9"\n',
        ":3: metrics.listen: overlaps with listen[0] in line 1",
    ),
    # TLS
    (
        "[tls]\ncert = '/nowhere'\nkey = 'x'\n",
        ":2: tls.cert: /nowhere: No such file or directory",
    ),
    (EXPORT + "tls_only = true\n", ":4: export.vm1.tls_only: there is no [tls]"),
]


@pytest.mark.parametrize(("text", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_each_mistake_has_its_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert mistake(tmp_path, text).startswith(said)


def test_a_key_of_another_certificate(tmp_path: Path, certificates: Certificates) -> None:
    text = f'\n[tls]\ncert = "{certificates.server.certificate}"\nkey = "{certificates.client.key}"'
    said = mistake(tmp_path, text)
    assert said.startswith(":2: tls: TLS certificate ")
    assert "key values mismatch" in said


@pytest.mark.parametrize("name", ["", "missing.toml", "a\0b"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        load_config(str(tmp_path / name))


def test_a_file_that_never_ends(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="longer than 4 MiB"):
        load_config("/dev/zero")


def test_nothing_is_a_configuration(tmp_path: Path) -> None:
    assert load(tmp_path, "").settings == Settings()


def test_access_lists(tmp_path: Path, certificates: Certificates) -> None:
    pair = certificates.server
    tls = f'cert = "{pair.certificate}"\nkey = "{pair.key}"\nca = "{certificates.ca}"'
    text = """
allow = [{uid = 7}]
[[export]]
name = "inherits"
source = "a"
[[export]]
name = "own"
source = "a"
hidden = false
allow = [
  {subject = "CN=web1,O=Example", access = "ro"},
  {address = "10.0.0.0/8", access = "none"},
  {},
]
[[export]]
name = "nobody"
source = "a"
allow = []
"""
    config = load(tmp_path, f"{text}[tls]\n{tls}\n")
    inherits, own, nobody = map(config.access, config.settings.export)
    assert inherits == Access((Rule(uid=7),))
    network = ipaddress.ip_network("10.0.0.0/8")
    rules = (
        Rule(subject=parse_subject("O=Example,CN=web1"), grant=Grant.READ),
        Rule(network=network, grant=Grant.NONE),
        Rule(),
    )
    assert own == Access(rules, hidden=False)
    assert nobody == Access(())
    everybody = load(tmp_path, EXPORT)
    assert everybody.access(everybody.settings.export[0]) is EVERYBODY


def test_a_mistake_that_is_found_later_has_a_line_too(tmp_path: Path) -> None:
    config = load(tmp_path, EXPORT)
    said = str(config.error(("export", 0, "source"), "gone"))
    assert said == f"{tmp_path}/nbdsrv.toml:3: export.vm1.source: gone"
    assert ":1: export.vm1.other: x" in str(config.error(("export", 0, "other"), "x"))


VALUES = st.recursive(
    st.booleans() | st.integers(-9, 9) | st.sampled_from(["", "a", "rw", "10.0.0.0/8", "CN=a"]),
    lambda each: st.lists(each, max_size=2),
    max_leaves=3,
)
KEYS = st.sampled_from([*Settings.__struct_fields__, "name", "source", "uid", "cert", "x", "a.b"])


@given(st.lists(st.tuples(st.sampled_from(["", "[%s]\n", "[[%s]]\n", "[%s.x]\n"]), KEYS, VALUES)))
def test_whatever_it_says_it_is_understood_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, object]]
) -> None:
    text = ""
    for header, key, value in rows:
        written = repr(value).replace("True", "true").replace("False", "false")
        text += header.replace("%s", key) + f"{key} = {written}\n"
    directory = tmp_path_factory.getbasetemp()
    said = ""
    try:
        assert isinstance(load(directory, text).settings, Settings)
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 2000
    if said and is_toml(text):
        assert said.startswith(f"{directory}/nbdsrv.toml:")


def is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True
