"""One throw-away certificate authority and server certificate, made by openssl.

::

    DIR/server/ca-cert.pem server-cert.pem server-key.pem    nbdkit and qemu-nbd read these names
    DIR/home/.pki/libnbd/ca-cert.pem                         and libnbd this one, under $HOME

fio does not allow its URI to name a certificate directory (libnbd's ``allow_local_file``), so
the clients find the authority where libnbd looks by itself: below $HOME, unless they run as
root. ``load`` therefore runs TLS clients with that $HOME, and as nobody when it is root.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass

from conformance.benchmark.report import BenchmarkError

__all__ = ["Certificates", "issue"]

OPENSSL_TIMEOUT_S = 30
KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "7"]


@dataclass(frozen=True, slots=True)
class Certificates:
    """Where they are: the server's directory, and the $HOME for clients."""

    directory: str
    home: str

    @property
    def certificate(self) -> str:
        return os.path.join(self.directory, "server-cert.pem")

    @property
    def key(self) -> str:
        return os.path.join(self.directory, "server-key.pem")


def issue(directory: str) -> Certificates:
    """Make an authority and a P-256 certificate for 127.0.0.1 below ``directory``."""
    server = os.path.join(directory, "server")
    trust = os.path.join(directory, "home", ".pki", "libnbd")
    os.makedirs(server)
    os.makedirs(trust)
    authority, authority_key = (os.path.join(server, n) for n in ("ca-cert.pem", "ca-key.pem"))
    made = Certificates(server, os.path.join(directory, "home"))
    _openssl("-subj", "/CN=benchmark authority", "-keyout", authority_key, "-out", authority)
    _openssl(
        *("-subj", "/CN=127.0.0.1", "-CA", authority, "-CAkey", authority_key),
        *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
        *("-addext", "basicConstraints=critical,CA:FALSE"),
        *("-addext", "extendedKeyUsage=serverAuth"),
        *("-keyout", made.key, "-out", made.certificate),
    )
    os.unlink(authority_key)
    shutil.copy(authority, trust)
    return made


def _openssl(*arguments: str) -> None:
    command = ["openssl", "req", "-x509", *KEY, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=OPENSSL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchmarkError(f"openssl: {error}") from error
    if done.returncode:
        raise BenchmarkError(f"openssl req failed: {done.stderr.strip()[-300:]}")
