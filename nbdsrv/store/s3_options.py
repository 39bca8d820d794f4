"""How to reach an S3 service: what the environment says, under the names every S3 tool uses.

======================================  ====================================================
AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL   the service, if it is not Amazon's; also AWS_ENDPOINT
AWS_ALLOW_HTTP                          plain HTTP to other hosts than this one, too
AWS_CA_BUNDLE, SSL_CERT_FILE            who signs the service's certificate, beside the usual
AWS_ACCESS_KEY_ID, ..._SECRET_...       these, AWS_SESSION_TOKEN, AWS_REGION,
                                        AWS_DEFAULT_REGION, AWS_VIRTUAL_HOSTED_STYLE_REQUEST
                                        and what Amazon's machines and containers set are
                                        read by obstore itself where an option is left empty
======================================  ====================================================
"""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from nbdsrv.errors import ConfigError

__all__ = ["S3Options"]

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
_YES = frozenset({"1", "true", "yes", "on"})


@dataclass(frozen=True, slots=True)
class S3Options:
    """Where the service is, who asks, and how patiently.

    Attributes:
        endpoint: URL of the service; "" for Amazon's.
        region: "" for what the environment says, or us-east-1.
        access_key: "" for what the environment says.
        secret_key: its other half.
        session_token: of temporary credentials.
        virtual_hosted: does ``endpoint`` name the bucket? None: as the environment says.
        allow_http: plain HTTP to any host.
        ca_bundle: path of a PEM file, or "".
        connect_timeout_s: seconds for one connection.
        stall_timeout_s: seconds without a byte of an answer that is being read.
        timeout_s: seconds for one request with everything in it; a put of 32 MiB must fit.
        patience_s: seconds after the first request of a call in which it may be repeated.
        retries: how often it is repeated, with growing pauses of ``pause_s`` to 50 times that.
        pause_s: seconds before the first of them.
    """

    endpoint: str = ""
    region: str = ""
    access_key: str = ""
    secret_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    virtual_hosted: bool | None = None
    allow_http: bool = False
    ca_bundle: str = ""
    connect_timeout_s: float = 10
    stall_timeout_s: float = 60
    timeout_s: float = 300
    patience_s: float = 600
    retries: int = 8
    pause_s: float = 0.1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "S3Options":
        """What the environment says.

        Raises:
            ConfigError: half of a key, or a service of one's own and no credentials for it. On
                Amazon's machines they need not be in the environment; elsewhere asking for them
                takes long and ends in an obscure error.
        """
        get = environment.get
        endpoint = next((environment[name] for name in _ENDPOINTS if get(name)), "")
        if endpoint and not any(get(name) for name in _CREDENTIALS):
            raise ConfigError(
                f"AWS_ENDPOINT_URL={endpoint}: no credentials for it; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )
        if get("AWS_ACCESS_KEY_ID") and not get("AWS_SECRET_ACCESS_KEY"):
            raise ConfigError("AWS_ACCESS_KEY_ID is set; set AWS_SECRET_ACCESS_KEY too")
        return cls(
            endpoint=endpoint,
            allow_http=get("AWS_ALLOW_HTTP", "").lower() in _YES,
            ca_bundle=get("AWS_CA_BUNDLE") or get("SSL_CERT_FILE", ""),
        )

    def check(self) -> None:
        """Is the endpoint one, and safe to talk to?

        Raises:
            ConfigError: it is no http(s) URL, or plain HTTP to another host.
        """
        if not self.endpoint:
            return
        try:
            parts = urlsplit(self.endpoint)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in {"http", "https"} or not _plain(self.endpoint):
            raise ConfigError(
                f"AWS_ENDPOINT_URL={self.endpoint}: not a URL like https://s3.example.com"
            )
        if parts.scheme == "http" and not self.allow_http and not _is_loopback(host):
            raise ConfigError(
                f"AWS_ENDPOINT_URL={self.endpoint}: plain HTTP would show everything to the "
                "network; use https://, or set AWS_ALLOW_HTTP=true"
            )

    def certificates(self) -> bytes:
        """What ``ca_bundle`` holds.

        Raises:
            ConfigError: it cannot be read, or holds none.
        """
        try:
            with open(self.ca_bundle, "rb") as file:
                found = file.read()
        except OSError as error:
            raise ConfigError(f"AWS_CA_BUNDLE={self.ca_bundle}: {error.strerror}") from error
        if b"-----BEGIN CERTIFICATE" not in found:
            raise ConfigError(f"AWS_CA_BUNDLE={self.ca_bundle}: no certificates (PEM) in it")
        return found


def _plain(url: str) -> bool:
    """Obstore panics at a URL it cannot use: only characters that certainly may be in one."""
    return url.isascii() and url.isprintable() and not set(url) & set(' <>"{}|\\^`')


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
