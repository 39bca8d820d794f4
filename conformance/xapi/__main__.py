"""``python -m conformance.xapi``: the simulator as a process.

Prints one line of JSON once everything listens: addresses, ports, certificates, and where the
control socket is.
"""

import datetime as dt
import hashlib
import ipaddress
import json
import os
import ssl
import sys
import threading
from pathlib import Path

import click
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from conformance.xapi.control import Control
from conformance.xapi.nbd import NbdServer
from conformance.xapi.pool import Host, Pool, new_ref
from conformance.xapi.web import Web


def _host(directory: Path, number: int) -> Host:
    """A host with a certificate it has signed itself, as they come."""
    address = f"127.0.0.{number + 1}"
    subject = address
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    now = dt.datetime.now(dt.UTC)
    alternative = x509.SubjectAlternativeName(
        [x509.DNSName(subject), x509.IPAddress(ipaddress.ip_address(address))]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(alternative, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
    path = directory / f"host{number}.key"
    form, secret = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, secret))
    Path(f"{path}.crt").write_text(pem)
    return Host(new_ref(), address, pem, str(path), subject)


@click.command()
@click.option("--directory", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--hosts", type=click.IntRange(1, 8), default=1)
@click.option("--insecure-nbd", is_flag=True, help="No TLS for NBD.")
@click.option("--user", default="root")
@click.option("--password", default="secret")
@click.option("--lifetime", type=float, default=600.0, help="Seconds.")
def main(
    directory: Path, hosts: int, user: str, password: str, lifetime: float, *, insecure_nbd: bool
) -> None:
    """Simulate a pool until standard input ends."""
    made = [_host(directory, number) for number in range(hosts)]
    pool = Pool(made, user, password)
    pool.trouble.insecure_nbd = insecure_nbd
    for host in made:  # the first chooses a port, the others have the same on their addresses
        pool.web_port = int(Web(pool, host, pool.web_port).server_address[1])
        pool.nbd_port = NbdServer(pool, host, pool.nbd_port).port
    control = str(directory / "control")
    Control(pool, control)
    prints = [
        hashlib.sha256(ssl.PEM_cert_to_DER_cert(host.certificate)).hexdigest() for host in made
    ]
    ready = {
        "addresses": [host.address for host in made],
        "port": pool.web_port,
        "nbd_port": pool.nbd_port,
        "fingerprints": prints,
        "certificates": [f"{host.key}.crt" for host in made],
        "control": control,
    }
    print(json.dumps(ready), flush=True)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    threading.Event().wait(lifetime)


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
