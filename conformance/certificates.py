"""Certificates made at run time with openssl: a CA, our server's pair, clients' pairs.

A client directory has the three files that libnbd, nbdkit and QEMU look for::

    ca-cert.pem  client-cert.pem  client-key.pem
"""

import shutil
from pathlib import Path

from conformance import process
from conformance.server import Tls

__all__ = ["Authority"]

_CONFIG = """\
[req]
distinguished_name = name
prompt = no
[name]
CN = {name}
[ca]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature,keyEncipherment
extendedKeyUsage = serverAuth
subjectAltName = DNS:{host},IP:127.0.0.1,IP:::1
[client]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature,keyEncipherment
extendedKeyUsage = clientAuth
"""


class Authority:
    """A certificate authority with one server and any number of clients."""

    def __init__(self, directory: Path, host: str = "localhost") -> None:
        directory.mkdir()
        self._directory = directory
        self._host = host
        self._make("ca", "conformance CA", "ca")
        self._make("server", host, "server")
        self.certificate = directory / "ca-cert.pem"
        self.server_certificate = directory / "server-cert.pem"

    def server(
        self,
        *,
        demand_client: bool = False,
        mode: str = "required",
        only_for: tuple[str, ...] = (),
    ) -> Tls:
        """What our server is started with."""
        return Tls(
            certificate=self.server_certificate,
            key=self._directory / "server-key.pem",
            client_ca=self.certificate if demand_client else None,
            mode=mode,
            only_for=only_for,
        )

    def client(self, *, trust: "Authority | None" = None, with_pair: bool = False) -> Path:
        """A new client directory.

        Args:
            trust: whose server certificates this client accepts (this CA's by default).
            with_pair: give it a certificate of this CA, too.
        """
        name = f"client{len(list(self._directory.glob('client*/')))}"
        home = self._directory / name
        home.mkdir()
        shutil.copy((trust or self).certificate, home / "ca-cert.pem")
        if with_pair:
            self._make(name, name, "client")
            for kind in ("cert", "key"):
                (self._directory / f"{name}-{kind}.pem").rename(home / f"client-{kind}.pem")
        return home

    def _make(self, stem: str, name: str, section: str) -> None:
        here = self._directory
        (here / "openssl.cnf").write_text(_CONFIG.format(name=name, host=self._host))
        new_key = ("-newkey", "rsa:2048", "-nodes", "-keyout", f"{stem}-key.pem")
        common = ("-config", "openssl.cnf", *new_key)
        if section == "ca":
            self_signed = ("-x509", "-days", "2", "-extensions", "ca")
            self._openssl("req", *self_signed, *common, "-out", "ca-cert.pem")
            return
        self._openssl("req", "-new", *common, "-out", f"{stem}.csr")
        signer = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial")
        extensions = ("-extfile", "openssl.cnf", "-extensions", section)
        words = ("x509", "-req", "-days", "2", "-in", f"{stem}.csr", *signer, *extensions)
        self._openssl(*words, "-out", f"{stem}-cert.pem")

    def _openssl(self, *words: str) -> None:
        process.run(("openssl", *words), directory=self._directory)
