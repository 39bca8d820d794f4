"""repo: and repo+s3:, and the environment that says how to reach a bucket."""

import subprocess
import sys
from pathlib import Path

import pytest

from nbdsrv.errors import ConfigError
from nbdsrv.store.directory import DirectoryStore
from nbdsrv.store.opening import open_store
from nbdsrv.store.s3_options import S3Options
from tests.store.buckets import Service

ROOT = Path(__file__).parents[2]


def set_up(monkeypatch: pytest.MonkeyPatch, service: Service) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", service.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def test_a_directory(tmp_path: Path) -> None:
    store = open_store("repo", str(tmp_path))
    assert isinstance(store, DirectoryStore)
    assert store.put_new("a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    assert store.name == str(tmp_path)
    assert not store.distant


@pytest.mark.parametrize(
    ("location", "key"), [("", "a"), ("/", "a"), ("/deep/er", "deep/er/a"), ("/x/", "x/a")]
)
def test_a_bucket(
    monkeypatch: pytest.MonkeyPatch, service: Service, bucket: str, location: str, key: str
) -> None:
    set_up(monkeypatch, service)
    store = open_store("repo+s3", f"//{bucket}{location}")
    assert store.put_new("a", b"x")
    assert not store.put_new("a", b"x")
    assert service.keys(bucket) == [key]
    assert store.name == f"s3://{bucket}{location}".rstrip("/")
    assert store.distant


@pytest.mark.parametrize(
    ("scheme", "location"),
    [
        ("repo", ""),
        ("repo", "a\0b"),
        ("repo+s3", ""),
        ("repo+s3", "bucket/prefix"),
        ("repo+s3", "//"),
        ("repo+s3", "///prefix"),
        ("repo+s3", "//b ucket/prefix"),
        ("repo+s3", "//user@bucket/prefix"),
        ("repo+s3", "//bucket/a//b"),
        ("repo+s3", "//bucket/../b"),
        ("repo+s3", "//bucket/.hidden"),
        ("repo+s3", "//bucket/ä"),
        ("repo+s3", "//bucket/" + "a" * 301),
        ("restic", "/path"),
    ],
)
def test_what_cannot_be(scheme: str, location: str) -> None:
    with pytest.raises(ConfigError):
        open_store(scheme, location)


def test_a_service_of_ones_own_needs_credentials(
    monkeypatch: pytest.MonkeyPatch, service: Service
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", service.endpoint)
    with pytest.raises(ConfigError, match="set AWS_ACCESS_KEY_ID"):
        open_store("repo+s3", "//bucket/prefix")


def test_what_the_environment_says() -> None:
    options = S3Options.from_environment(
        {
            "AWS_ENDPOINT_URL_S3": "https://s3.example.com",
            "AWS_ENDPOINT_URL": "https://other.example.com",
            "AWS_ALLOW_HTTP": "TRUE",
            "SSL_CERT_FILE": "/certificates.pem",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }
    )
    assert options.endpoint == "https://s3.example.com"
    assert options.allow_http
    assert options.ca_bundle == "/certificates.pem"
    assert S3Options.from_environment({}) == S3Options()


def test_half_a_key() -> None:
    with pytest.raises(ConfigError, match="set AWS_SECRET_ACCESS_KEY too"):
        S3Options.from_environment({"AWS_ACCESS_KEY_ID": "somebody"})


def test_secrets_are_not_shown() -> None:
    assert "hidden" not in repr(S3Options(secret_key="hidden", session_token="hidden"))


def test_certificates_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match="No such file"):
        open_store("repo+s3", "//bucket")
    (tmp_path / "none.pem").write_text("not a certificate")
    with pytest.raises(ConfigError, match="no certificates"):
        open_store("repo+s3", "//bucket")


def test_obstore_is_not_needed_until_it_is() -> None:
    code = """
import sys
sys.modules["obstore"] = None  # as if it were not installed
from nbdsrv.errors import ConfigError
from nbdsrv.store.opening import open_store
open_store("repo", "/tmp")
try:
    open_store("repo+s3", "//bucket/prefix")
except ConfigError as error:
    assert "pip install 'nbdsrv[s3]'" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)
