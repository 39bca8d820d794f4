"""NBD URIs against uri.md, RFC 3986 and what libnbd prints."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.constants import NBD_PORT
from protocol.uri import Uri, UriError, parse

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=300)
HOSTS = st.one_of(
    st.from_regex(r"[a-z0-9_.][a-z0-9_.-]{0,60}", fullmatch=True),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.just("fe80::1%eth0"),
    st.just("bücher.example"),
)
SOCKETS = st.builds(
    lambda path, abstract: ("\0" if abstract else "") + os.fsdecode(path),
    st.binary(min_size=1, max_size=90).filter(lambda path: b"\0" not in path),
    st.booleans(),
)
EXTRA = st.dictionaries(
    st.from_regex(r"x-[a-zA-Z&=% é-]{0,20}", fullmatch=True), st.text(max_size=40), max_size=3
).map(
    lambda extra: tuple(
        (key, value)
        for key, value in extra.items()
        if "\0" not in value and not re.search("[\ud800-\udfff]", value)
    )
)
TLS = {
    "tls": st.booleans(),
    "username": st.none() | NAMES,
    "tls_type": st.sampled_from([None, "anon", "x509", "psk"]),
    "tls_hostname": st.none() | HOSTS,
    "tls_verify_peer": st.sampled_from([None, True, False]),
    "extra": EXTRA,
}
URIS = st.one_of(
    st.builds(Uri, host=HOSTS, port=st.integers(1, 65535), export=NAMES, **TLS),
    st.builds(Uri, socket=SOCKETS, export=NAMES, **TLS),
)


@given(URIS)
def test_a_printed_uri_reads_back_as_the_same_uri(uri):
    text = str(uri)
    assert uri == parse(text)
    assert text == str(parse(text))
    assert text.isascii()
    assert text.isprintable()


@given(st.text(max_size=80) | st.text("nbd+unix:/?#[]@%0aA&=.;socketlsx-", max_size=60))
def test_any_text_is_a_uri_or_a_uri_error(text):
    for candidate in (text, "nbd://" + text, "nbd+unix:///?socket=" + text):
        try:
            uri = parse(candidate)
        except UriError:
            continue
        assert uri == parse(str(uri))


# The table of uri.md, "NBD URI export name", and its own abstract socket.
@pytest.mark.parametrize(
    ("text", "export"),
    [
        ("nbd://example.com/disk", "disk"),
        ("nbd+unix:///disk?socket=sock", "disk"),
        ("nbd://example.com/", ""),
        ("nbd://example.com", ""),
        ("nbd://example.com//disk", "/disk"),
        ("nbd://example.com/hello%20world", "hello world"),
        ("nbd://example.com/a/../b/./c", "a/../b/./c"),
        ("nbd://example.com/a+b%2Bc", "a+b+c"),
        ("nbd+unix:///?socket=%00/abstract", ""),
    ],
)
def test_export_name_is_the_path_less_one_slash(text, export):
    assert export == parse(text).export


# What libnbd 1.14's nbd_get_uri prints for these connections (it does not encode the socket).
@pytest.mark.parametrize(
    ("uri", "text"),
    [
        (Uri(host="127.0.0.1", port=10917), "nbd://127.0.0.1:10917/"),
        (Uri(host="::1", port=10917, export="x"), "nbd://[::1]:10917/x"),
        (Uri(host="localhost", username="u"), "nbd://u@localhost:10809/"),
        (Uri(socket="/run/nbd.sock", export="//a"), "nbd+unix://///a?socket=/run/nbd.sock"),
        (Uri(socket="/run/nbd.sock", tls=True), "nbds+unix:///?socket=/run/nbd.sock"),
        (Uri(socket="/a b&c"), "nbd+unix:///?socket=/a%20b%26c"),
        (Uri(socket="\0nbd"), "nbd+unix:///?socket=%00nbd"),
        (
            Uri(socket="/s", export="a b/é:;@&=+$,!*'()~?#%[]\"<>|`^{}\\x"),
            (
                "nbd+unix:///a%20b/%C3%A9%3A;@&=+$,!*'()~%3F%23%25%5B%5D%22%3C%3E%7C%60%5E%7B%7D"
                "%5Cx?socket=/s"
            ),
        ),
    ],
)
def test_printed_form_is_libnbds(uri, text):
    assert text == str(uri)


def test_every_part_is_read():
    text = (
        "nbds://al%40ice@[fe80::1%25eth0]:1234/disk%2Froot?tls-type=x509&tls-hostname=h.example"
        "&tls-verify-peer=0&x-trace=a%26b"
    )
    expected = Uri(
        tls=True,
        host="fe80::1%eth0",
        port=1234,
        export="disk/root",
        username="al@ice",
        tls_type="x509",
        tls_hostname="h.example",
        tls_verify_peer=False,
        extra=(("x-trace", "a&b"),),
    )
    assert expected == parse(text)


def test_defaults():
    assert Uri(host="localhost", port=NBD_PORT) == parse("nbd://")
    assert Uri(host="localhost", export="x") == parse("NBD:///x")
    assert Uri(host="h") == parse("nbd://h:/")
    assert Uri(host="h", tls=True) == parse("nbds+tcp://h")
    assert Uri(socket="/run/\udcff") == parse("nbd+unix:///?socket=/run/%FF")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("http://h/", "scheme 'http'"),
        ("nbd+ssh://h/", "scheme"),
        ("nbd+vsock://3/", "scheme"),
        ("disk.img", "not a URI"),
        ("nbd:unix:/path:exportname=x", "'//' is missing"),
        ("nbd://h/a b", "percent-encoded"),
        ("nbd://h/é", "percent-encoded"),
        ("nbd://h/a\nb", "percent-encoded"),
        ("nbd://h/100%", "percent-encoded"),
        ("nbd://h/%zz", "percent-encoded"),
        ("nbd://h/x#p1", "fragment"),
        ("nbd://h/%00", "NUL"),
        ("nbd://h/a%00b", "NUL"),
        ("nbd://h/%FF", "UTF-8"),
        ("nbd://h/" + "a" * 4097, "4097 bytes"),
        ("nbd://h/" + "%C3%A9" * 2049, "4098 bytes"),
        ("nbd://h/" + "a" * 70000, "longer than"),
        # CVE-2025-14946
        ("nbd://-oProxyCommand=x/", "starts with '-'"),
        ("nbd://%2DoProxyCommand=x/", "starts with '-'"),
        ("nbd://u@-h/", "starts with '-'"),
        ("nbd+unix:///?socket=s&tls-hostname=-h", "starts with '-'"),
        ("nbd://h%20x/", "not a host"),
        ("nbd://h%2Fx/", "not a host"),
        ("nbd://h%00/", "NUL"),
        ("nbd://" + "h" * 256 + "/", "256 bytes"),
        ("nbd://::1/", "brackets"),
        ("nbd://[::1/", "brackets"),
        ("nbd://[::g]/", "not an IPv6"),
        ("nbd://[localhost]/", "not an IPv6"),
        ("nbd://[]/", "not an IPv6"),
        ("nbd://h:0/", "between 1 and 65535"),
        ("nbd://h:65536/", "between 1 and 65535"),
        ("nbd://h:" + "9" * 5000 + "/", "between 1 and 65535"),
        ("nbd://h:-1/", "not [user@]host"),
        ("nbd://u:secret@h/", "password"),
        ("nbd+unix:///x", "socket=PATH is missing"),
        ("nbd+unix:///x?socket=", "empty"),
        ("nbd+unix:///x?socket=%00", "empty"),
        ("nbd+unix:///x?socket=a%00b", "NUL"),
        ("nbd+unix:///x?socket=" + "s" * 108, "108 bytes"),
        ("nbd+unix://run/nbd.sock?socket=s", "neither host nor port"),
        ("nbd+unix://:1/?socket=s", "neither host nor port"),
        ("nbd://h/?socket=s", "belongs to nbd+unix"),
        ("nbd://h/?sokcet=s", "unknown parameter 'sokcet'"),
        ("nbd://h/?tls-psk-file=/etc/shadow", "names files of this machine"),
        ("nbd://h/?tls-certificates=/etc", "names files of this machine"),
        ("nbd://h/?tls-type=none", "tls-type=none"),
        ("nbd://h/?tls-verify-peer=2", "tls-verify-peer"),
        ("nbd://h/?tls-hostname=", "empty"),
        ("nbd://h/?tls-type", "no value"),
        ("nbd://h/?tls-type=psk&tls-type=psk", "twice"),
        ("nbd://h/?x-a=1&x-a=2", "twice"),
        ("nbd://h/?x-a=%00", "NUL"),
    ],
)
def test_refused_with_a_reason(text, why):
    with pytest.raises(UriError, match=re.escape(why)):
        parse(text)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"host": "h", "port": 0},
        {"host": "h", "export": "\0"},
        {"host": "h", "export": "\ud800"},
        {"socket": "\ud800"},
        {"socket": "s", "host": "h"},
        {"socket": "s", "port": 1},
        {"host": "h", "extra": (("socket", "s"),)},
        {"host": "h", "extra": (("x-a", "1"), ("x-a", "2"))},
        {"host": "h", "extra": tuple((f"x-{n}", "é" * 2000) for n in range(9))},
    ],
)
def test_the_constructor_checks_as_much(parts):
    with pytest.raises(UriError):
        Uri(**parts)
