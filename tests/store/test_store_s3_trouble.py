"""What can go wrong with a bucket, and what is said about it."""

import errno
import re
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from authority import Certificates

from nbdsrv.errors import ConfigError
from nbdsrv.store.s3 import S3Store
from nbdsrv.store.s3_options import S3Options
from nbdsrv.store.store import ObjectMissing, Store, StoreError
from tests.store.rude_service import HANG, HANG_UP, Request, answer, rude_service

QUICK = S3Options(
    access_key="somebody",
    secret_key="secret",
    connect_timeout_s=1,
    stall_timeout_s=0.3,
    timeout_s=0.5,
    patience_s=5,
    retries=2,
    pause_s=0.01,
)


def at(endpoint: str) -> S3Store:
    return S3Store("bucket", "prefix", replace(QUICK, endpoint=endpoint))


def acts(store: Store) -> dict[str, Callable[[], object]]:
    return {
        "put_new": lambda: store.put_new("a", b"x"),
        "put": lambda: store.put("a", b"x"),
        "get": lambda: store.get("a"),
        "get_range": lambda: store.get_range("a", 0, 1),
        "list": lambda: list(store.list("")),
        "delete": lambda: store.delete("a"),
        "get_ranges": lambda: store.get_ranges("a", [(0, 1), (9 << 20, 1)]),
    }


def xml(code: str) -> bytes:
    return f"<?xml version='1.0'?>\n<Error><Code>{code}</Code></Error>".encode()


@pytest.mark.parametrize(
    ("status", "code", "number", "text"),
    [
        (403, "AccessDenied", errno.EACCES, "check AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", errno.EACCES, "check AWS_ACCESS_KEY_ID"),
        (403, "RequestTimeTooSkewed", errno.EACCES, "clock"),
        (403, "QuotaExceeded", errno.ENOSPC, "full"),
        (401, "", errno.EACCES, "check AWS_ACCESS_KEY_ID"),
        (400, "ExpiredToken", errno.EACCES, "AWS_SESSION_TOKEN"),
        (400, "AuthorizationHeaderMalformed", errno.EREMOTE, "AWS_REGION"),
        (301, "PermanentRedirect", errno.EREMOTE, "AWS_REGION"),
        (400, "Whatever", errno.EIO, "400 Whatever"),
        (404, "NoSuchBucket", errno.ENOENT, "s3://bucket: no such bucket"),
        (409, "OperationAborted", errno.EBUSY, "try again"),
        (500, "InternalError", errno.EIO, "500 InternalError"),
        (501, "NotImplemented", errno.ENOTSUP, "lacks"),
        (503, "SlowDown", errno.EIO, "503 SlowDown"),
        (507, "", errno.ENOSPC, "full"),
    ],
)
def test_refusals(status: int, code: str, number: int, text: str) -> None:
    with rude_service(lambda _: answer(status, xml(code))) as rude:
        store = at(rude.endpoint)
        for name, act in acts(store).items():
            rude.requests.clear()
            with pytest.raises(StoreError) as caught:
                act()
            assert caught.value.errno == number, name
            said = str(caught.value)
            assert text in said
            assert "s3://bucket" in said
            assert "\n" not in said
            assert len(said) < 250
            assert not isinstance(caught.value, ObjectMissing)
            if status == 500 and name != "get_ranges":
                assert len(rude.requests) == 1 + QUICK.retries


def test_a_missing_object_is_not_a_missing_bucket() -> None:
    with rude_service(lambda _: answer(404, xml("NoSuchKey"))) as rude:
        store = at(rude.endpoint)
        for act in (acts(store)[name] for name in ("get", "get_range")):
            with pytest.raises(ObjectMissing, match="s3://bucket/prefix/a: no such object"):
                act()
        store.delete("a")


def test_a_missing_bucket_of_a_real_service(options: S3Options) -> None:
    store = S3Store("nowhere-to-be-found", "", options)
    for name, act in acts(store).items():
        with pytest.raises(StoreError, match="no such bucket") as caught:
            act()
        assert not isinstance(caught.value, ObjectMissing), name


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for act in acts(at(f"http://127.0.0.1:{port}")).values():
        with pytest.raises(StoreError, match="refused; is the service running") as caught:
            act()
        assert caught.value.errno == errno.ECONNREFUSED


def test_nobody_of_that_name() -> None:
    options = replace(QUICK, endpoint="https://nowhere.invalid", retries=0)
    with pytest.raises(StoreError) as caught:
        S3Store("bucket", "", options).get("a")
    assert caught.value.errno in {errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ETIMEDOUT}


@pytest.mark.parametrize("name", ["put_new", "put", "get", "get_range", "list", "delete"])
def test_silence_ends(name: str) -> None:
    with rude_service(lambda _: HANG) as rude:
        begun = time.monotonic()
        with pytest.raises(StoreError, match="no answer in time") as caught:
            acts(at(rude.endpoint))[name]()
        assert caught.value.errno == errno.ETIMEDOUT
        assert time.monotonic() - begun < 5
        assert len(rude.requests) == 1 + QUICK.retries


def test_hanging_up_is_an_error_in_the_end() -> None:
    with rude_service(lambda _: HANG_UP) as rude:
        for act in acts(at(rude.endpoint)).values():
            with pytest.raises(StoreError) as caught:
                act()
            assert caught.value.errno == errno.EIO


class Flaky:
    """Keeps objects; spoils the answers to its first requests, having done what they asked."""

    def __init__(self, *spoiled: bytes) -> None:
        self.spoiled = list(spoiled)
        self.objects: dict[str, bytes] = {}

    def __call__(self, request: Request) -> bytes:
        said = self._answer(request)
        return self.spoiled.pop(0) if self.spoiled else said

    def _answer(self, request: Request) -> bytes:
        if request.method == "PUT":
            if "if-none-match" in request.headers and request.path in self.objects:
                return answer(412, xml("PreconditionFailed"))
            self.objects[request.path] = request.body
            return answer(200)
        if request.path not in self.objects:
            return answer(404, xml("NoSuchKey"))
        return answer(200, self.objects[request.path])


@pytest.mark.parametrize(
    "spoiled", [HANG, HANG_UP, answer(500), answer(503, xml("SlowDown"))], ids=repr
)
def test_a_create_whose_outcome_got_lost_is_repeated(spoiled: bytes) -> None:
    flaky = Flaky(spoiled)
    with rude_service(flaky) as rude:
        store = at(rude.endpoint)
        assert not store.put_new("a", b"content")  # it is there: by this very call
        assert store.get("a") == b"content"
        assert [request.method for request in rude.requests] == ["PUT", "PUT", "GET"]
        assert {request.headers.get("if-none-match") for request in rude.requests[:2]} == {"*"}
        assert store.put_new("b", b"content")


def test_a_create_in_conflict_with_another_is_repeated() -> None:
    waiting = [answer(409, xml("ConditionalRequestConflict"))] * 2
    with rude_service(lambda _: waiting.pop() if waiting else answer(200)) as rude:
        assert at(rude.endpoint).put_new("a", b"content")
        assert len(rude.requests) == 3


def test_a_read_that_fails_once_is_repeated() -> None:
    flaky = Flaky(HANG, HANG_UP)
    flaky.objects["/bucket/prefix/a"] = b"content"
    with rude_service(flaky) as rude:
        assert at(rude.endpoint).get("a") == b"content"


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (answer(200, b"abcdef"), "ignores Range"),
        (answer(206, b"abc", Content_Range="bytes 0-2/3"), "ends after 3"),
        (answer(206, b"abc", Content_Range="bytes 0-5/6"), "ends after 3"),
        (answer(206, b"abcdef", Content_Range="bytes 3-8/9"), "another part"),
        (answer(206, b"abcdef"), "could not be continued"),
        (answer(206, b"abc", length=6, Content_Range="bytes 0-5/6"), "broke off"),
        (answer(416, xml("InvalidRange")), "ends before that"),
    ],
)
def test_parts_that_are_not_what_was_asked_for(said: bytes, text: str) -> None:
    with rude_service(lambda _: said) as rude:
        store = at(rude.endpoint)
        for act in (
            lambda: store.get_range("a", 0, 6),
            lambda: store.get_ranges("a", [(0, 2), (3, 3)]),
        ):
            with pytest.raises(StoreError, match=text) as caught:
                act()
            assert caught.value.errno == errno.EIO


def test_a_whole_object_that_breaks_off() -> None:
    with rude_service(lambda _: answer(200, b"abc", length=6)) as rude:
        with pytest.raises(StoreError) as caught:
            at(rude.endpoint).get("a")
        assert caught.value.errno == errno.EIO


def test_what_is_too_long_is_not_fetched() -> None:
    with rude_service(lambda _: answer(200, b"", length=1 << 40)) as rude:
        with pytest.raises(StoreError, match=f"{1 << 40} bytes, more than 1000") as caught:
            at(rude.endpoint).get("a", 1000)
        assert caught.value.errno == errno.EFBIG
        with pytest.raises(StoreError) as caught:
            at(rude.endpoint).get("a")
        assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("body", [b"", b"no xml", b"<ListBucketResult>"])
def test_a_listing_that_is_none(body: bytes) -> None:
    with rude_service(lambda _: answer(200, body)) as rude:
        with pytest.raises(StoreError) as caught:
            list(at(rude.endpoint).list("packs/"))
        assert caught.value.errno == errno.EIO


def test_a_listing_without_order() -> None:
    row = "<Key>prefix/{}</Key><Size>1</Size><LastModified>2020-01-01T00:00:00Z</LastModified>"
    rows = "".join(f"<Contents>{row.format(key)}</Contents>" for key in "ba")
    page = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
    with rude_service(lambda _: answer(200, page.encode())) as rude:
        listing = at(rude.endpoint).list("")
        assert next(listing).key == "b"
        with pytest.raises(StoreError, match="out of order"):
            next(listing)


def test_neighbours_are_asked_for_at_once() -> None:
    content = bytes(range(256)) * 40_000

    def serve(request: Request) -> bytes:
        first, last = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        return answer(206, part, Content_Range=f"bytes {first}-{last}/{len(content)}")

    with rude_service(serve) as rude:
        store = at(rude.endpoint)
        ranges = [(5_000_000, 10), (100, 50), (900_000, 1000), (9_000_000, 7)]
        found = store.get_ranges("a", ranges)
        store.close()
        assert [bytes(part) for part in found] == [content[at:][:size] for at, size in ranges]
        asked = sorted(request.headers["range"] for request in rude.requests)
        assert asked == ["bytes=100-900999", "bytes=5000000-5000009", "bytes=9000000-9000006"]


@pytest.mark.parametrize(
    "endpoint",
    [
        "s3.example.com",
        "ftp://a",
        "http://",
        "https://a b",
        "https://[",
        "https://a:x",
        "https://ä",
    ],
)
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="not a URL like"):
        at(endpoint)


def test_plain_http_is_for_this_host() -> None:
    for endpoint in ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"):
        at(endpoint)
    for endpoint in ("http://10.0.0.1", "http://localhost.example.com"):
        with pytest.raises(ConfigError, match="AWS_ALLOW_HTTP=true"):
            at(endpoint)
        S3Store("bucket", "", replace(QUICK, endpoint=endpoint, allow_http=True))


def test_a_certificate_of_ones_own_authority(certificates: Certificates) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server.certificate, certificates.server.key)
    with rude_service(lambda _: answer(200, b"content"), context) as rude:
        options = replace(QUICK, endpoint=rude.endpoint)
        store = S3Store("bucket", "", replace(options, ca_bundle=str(certificates.ca)))
        assert store.get("a") == b"content"
        with pytest.raises(StoreError, match="set AWS_CA_BUNDLE") as caught:
            S3Store("bucket", "", options).get("a")
        assert caught.value.errno == errno.EIO


def test_a_listing_of_many_pages() -> None:
    row = "<Key>prefix/{:04}</Key><Size>1</Size><LastModified>2020-01-01T00:00:00Z</LastModified>"

    def page(request: Request) -> bytes:
        found = re.search("continuation-token=([0-9]+)", request.path)
        first = int(found[1]) if found else 0
        rows = "".join(
            f"<Contents>{row.format(number)}</Contents>" for number in range(first, first + 1000)
        )
        more = "true" if first < 2000 else "false"
        token = f"<NextContinuationToken>{first + 1000}</NextContinuationToken>"
        text = f"<IsTruncated>{more}</IsTruncated>{token if more == 'true' else ''}{rows}"
        return answer(200, f"<ListBucketResult>{text}</ListBucketResult>".encode())

    with rude_service(page) as rude:
        rows = list(at(rude.endpoint).list(""))
        assert [row.key for row in rows] == [f"{number:04}" for number in range(3000)]
        assert {row.modified for row in rows} == {1577836800.0}
        assert len(rude.requests) == 3
