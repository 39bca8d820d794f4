"""What the kernel's client is made to do with our exports.

The guest's side of each check is a job in ``init``; here is what its answers have to be, and
what our file has to look like afterwards.
"""

import hashlib
from pathlib import Path

from conformance.certificates import Authority
from conformance.context import Context
from conformance.image import MIB, Span
from conformance.kernel.guest import NEEDS, Guest
from conformance.outcome import CheckFailedError
from conformance.registry import Part, check, expect

PASSING = 24 * MIB
"""The file that the guest writes, deletes and trims."""


@check("Linux kernel", "attach -C 2, checksum", needs=NEEDS, part=Part.KERNEL)
def attach(context: Context) -> None:
    """nbd-client -C 2 on a read-only export: size, content, no write."""
    image = context.image(size=64 * MIB)
    server = context.serve(exports={"ro": image}, listen=("tcp",))
    results = Guest(context).run("attach", server.port, "ro")
    wanted = {
        "size": str(image.size),
        "readonly": "1",
        "sha256": image.digest(),
        "written": "no",
        "errors": "0",
    }
    expect(wanted, {key: results.get(key) for key in wanted}, "the guest's results")


@check("Linux kernel", "ext4, fstrim, fsck", needs=(*NEEDS, "e2fsck", "debugfs"), part=Part.KERNEL)
def ext4(context: Context) -> None:
    """mkfs, mount, write, trim, unmount, detach, attach again; then fsck of our file."""
    image = context.image(size=96 * MIB, spans=(Span(0, 96 * MIB),))
    server = context.serve(exports={"rw": image}, listen=("tcp",), write=True)
    results = Guest(context).run("ext4", server.port, "rw")
    server.stop()
    numbers = "".join(f"{number}\n" for number in range(1, 200_001)).encode()
    wanted = {
        "readonly": "0",
        "fua": "1",
        "cache": "write back",
        "numbers": hashlib.sha256(numbers).hexdigest(),
        "numbers_again": hashlib.sha256(numbers).hexdigest(),
        "random_again": results.get("random", "no digest"),
        "errors": "0",
    }
    expect(wanted, {key: results.get(key) for key in wanted}, "the guest's results")
    expect(True, int(results["discard"]) > 0, "the kernel may discard")
    context.run("e2fsck", "-f", "-n", image.path)
    for path, key in (("/dir/numbers", "numbers"), ("/dir/deeper/random", "random")):
        expect(results[key], _digest_inside(context, image.path, path), f"sha256 of {path}")
    # The image was full; of it, fstrim leaves what ext4 uses: the files and its own records.
    if image.allocated() > image.size - PASSING:
        raise CheckFailedError(f"after fstrim {image.allocated()} bytes are still allocated")


@check("Linux kernel", "attach over TLS", needs=(*NEEDS, "openssl"), part=Part.KERNEL)
def attach_tls(context: Context) -> None:
    """nbd-client -x: its proxy speaks TLS, the kernel a socket pair."""
    image = context.image(size=32 * MIB)
    authority = Authority(context.directory / "pki")
    server = context.serve(exports={"ro": image}, listen=("tcp",), tls=authority.server())
    guest = Guest(context)
    guest.add(authority.certificate, "ca-cert.pem")
    results = guest.run("tls", server.port, "ro")
    wanted = {"size": str(image.size), "sha256": image.digest()}
    expect(wanted, {key: results.get(key) for key in wanted}, "the guest's results")


def _digest_inside(context: Context, image: Path, path: str) -> str:
    """SHA-256 of a file inside an ext4 image, read by debugfs without mounting it."""
    copy = context.directory / "dumped"
    context.run("debugfs", "-R", f"dump {path} {copy}", image)
    return hashlib.sha256(copy.read_bytes()).hexdigest()
