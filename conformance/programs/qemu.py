"""qemu-img and qemu-io: QEMU's own NBD client, the one virtual machines run on."""

import json
from collections.abc import Mapping
from pathlib import Path

from conformance.context import Context
from conformance.image import KIB, MIB, Image, Span, file_digest
from conformance.outcome import CheckFailedError
from conformance.registry import check, expect

IMG, IO = ("qemu-img",), ("qemu-io",)


@check("qemu-img", "info", needs=IMG)
def info(context: Context) -> None:
    """The virtual size."""
    image = context.image()
    server = context.serve(image)
    text = context.run("qemu-img", "info", "--output=json", "-f", "raw", server.uri()).stdout
    expect(image.size, json.loads(text)["virtual-size"], "virtual size")


@check("qemu-img", "map", needs=IMG)
def block_map(context: Context) -> None:
    """Data, zero and present of every extent."""
    image = context.image()
    server = context.serve(image)
    text = context.run("qemu-img", "map", "--output=json", "-f", "raw", server.uri()).stdout
    found = [(e["start"], e["length"], e["data"] and not e["zero"]) for e in json.loads(text)]
    expect(image.extents(), found, "map")


@check("qemu-img", "convert to raw", needs=IMG)
def convert_raw(context: Context) -> None:
    """A download: content equal, holes kept."""
    image = context.image(size=64 * MIB)
    server = context.serve(image)
    copy = context.directory / "copy"
    context.run("qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri(), copy)
    expect(image.digest(), file_digest(copy), "sha256 of the download")
    _expect_sparse(copy.stat().st_blocks * 512, image)


@check("qemu-img", "convert to qcow2", needs=IMG)
def convert_qcow2(context: Context) -> None:
    """A download into a compressed qcow2, out of order (-W), 8 at a time."""
    image = context.image()
    server = context.serve(image)
    copy = context.directory / "copy.qcow2"
    options = ("-c", "-W", "-m", "8", "-f", "raw", "-O", "qcow2")
    context.run("qemu-img", "convert", *options, server.uri(), copy)
    context.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image.path, copy)


@check("qemu-img", "convert upload", needs=IMG)
def convert_upload(context: Context) -> None:
    """-n into a writable export full of old content: content equal, zeroes as holes."""
    image = context.image(size=64 * MIB)
    target = context.image("target", 64 * MIB, spans=(Span(0, 64 * MIB),))
    server = context.serve(target, write=True)
    options = ("-n", "-W", "-m", "8", "-f", "raw", "-O", "raw")
    context.run("qemu-img", "convert", *options, image.path, server.uri())
    expect(image.digest(), target.digest(), "sha256 of the upload")
    _expect_sparse(target.allocated(), image)


@check("qemu-img", "compare", needs=IMG)
def compare(context: Context) -> None:
    """Equal is 0; one changed byte is 1."""
    image = context.image()
    server = context.serve(image)
    other = context.image("other")
    words = ("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri(), other.path)
    context.run(*words)
    with other.path.open("r+b") as file:
        file.seek(9 * MIB)
        file.write(bytes(1) if image.read(9 * MIB, 1) != bytes(1) else b"\1")
    context.run(*words, code=1)


@check("qemu-img", "odd size", needs=IMG)
def odd_size(context: Context) -> None:
    """QEMU rounds up to a sector and pads with zeroes; the rest is the image's last bytes."""
    image = context.image(size=16 * MIB + 64 * KIB + 333)
    server = context.serve(image)
    copy = context.directory / "copy"
    context.run("qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri(), copy)
    wanted = image.read() + bytes(-image.size % 512)
    expect(len(wanted), copy.stat().st_size, "size of the copy")
    expect(True, wanted == copy.read_bytes(), "the copy is the image, padded")


@check("qemu-img", "named export", needs=IMG)
def named_export(context: Context) -> None:
    """A name with a space and a slash, by QEMU's own option syntax, over TCP."""
    first, second = context.image("a"), context.image("b", spans=(Span(MIB, MIB),))
    server = context.serve(exports={"x": first, "vm one/disk 2": second}, listen=("tcp",))
    options = {
        "driver": "raw",
        "file": {
            "driver": "nbd",
            "server": {"type": "inet", "host": server.host, "port": str(server.port)},
            "export": "vm one/disk 2",
        },
    }
    context.run("qemu-img", "compare", "-F", "raw", f"json:{json.dumps(options)}", second.path)


@check("qemu-img", "allocation depth", needs=IMG)
def allocation_depth(context: Context) -> None:
    """x-dirty-bitmap=qemu:allocation-depth, as QEMU maps a foreign context into its map."""
    image = context.image()
    server = context.serve(image)
    options = {
        "driver": "nbd",
        "server": {"type": "unix", "path": str(server.socket)},
        "x-dirty-bitmap": "qemu:allocation-depth",
    }
    words = ("qemu-img", "map", "--output=json", "--image-opts", _image_options(options))
    found = json.loads(context.run(*words).stdout)
    # QEMU shows the context's status as "data": true where it is 0 (not allocated).
    extents = [(e["start"], e["length"], not e["data"]) for e in found]
    expect(image.extents(), extents, "map of the allocation depth")


def _image_options(options: Mapping[str, object], prefix: str = "") -> str:
    words = []
    for key, value in options.items():
        if isinstance(value, Mapping):
            words.append(_image_options(value, f"{prefix}{key}."))
        else:
            words.append(f"{prefix}{key}={value}")
    return ",".join(words)


def _expect_sparse(allocated: int, image: Image) -> None:
    data = sum(length for _, length, is_data in image.extents() if is_data)
    if allocated > data + MIB:
        raise CheckFailedError(f"the copy occupies {allocated} bytes for {data} bytes of data")


def _qemu_io(context: Context, uri: str, *commands: str, options: tuple[str, ...] = ()) -> str:
    words = [word for command in commands for word in ("-c", command)]
    text = context.run("qemu-io", "-f", "raw", *options, *words, uri).stdout
    for complaint in ("failed", "error", "Error"):
        if complaint in text:
            raise CheckFailedError(f"qemu-io: {text.strip()}")
    return text


def _expect_bytes(image: Image, offset: int, wanted: bytes) -> None:
    expect(True, image.read(offset, len(wanted)) == wanted, f"bytes on disk at {offset}")


@check("qemu-io", "write and read", needs=IO)
def write_and_read(context: Context) -> None:
    """Patterns written and read back, aligned and not, then seen in the file."""
    image = context.image()
    server = context.serve(image, write=True)
    _qemu_io(
        context,
        server.uri(),
        "write -P 0x5a 64k 192k",
        "write -P 0xa5 1000 77",
        "writev -P 0x11 1M 4k 8k 16k",
        "read -P 0x5a 64k 192k",
        "read -P 0xa5 1000 77",
        "readv -P 0x11 1M 4k 8k 16k",
        "read -P 0 10M 512k",
        "flush",
    )
    _expect_bytes(image, 64 * KIB, b"\x5a" * 192 * KIB)
    _expect_bytes(image, 1000, b"\xa5" * 77)
    _expect_bytes(image, MIB, b"\x11" * 28 * KIB)


@check("qemu-io", "FUA", needs=IO)
def force_unit_access(context: Context) -> None:
    """write -f is sent as FUA where it is offered."""
    image = context.image()
    server = context.serve(image, write=True)
    _qemu_io(context, server.uri(), "write -f -P 0x77 2M 64k", "write -z -f 3M 64k")
    _expect_bytes(image, 2 * MIB, b"\x77" * 64 * KIB)


@check("qemu-io", "write zeroes", needs=IO)
def write_zeroes(context: Context) -> None:
    """write -z keeps the allocation (NO_HOLE), -z -u gives it back."""
    image = context.image(spans=(Span(0, 8 * MIB),))
    server = context.serve(image, write=True)
    full = image.allocated()
    _qemu_io(context, server.uri(), "write -z 0 4M", "read -P 0 0 4M", "flush")
    if image.allocated() < full - 64 * KIB:
        raise CheckFailedError("write -z gave blocks back")
    _qemu_io(context, server.uri(), "write -z -u 0 4M", "read -P 0 0 4M", options=("-d", "unmap"))
    if image.allocated() > full - 4 * MIB + 64 * KIB:
        raise CheckFailedError("write -z -u gave no blocks back")


@check("qemu-io", "discard", needs=IO)
def discard(context: Context) -> None:
    """discard punches a hole where it was asked to, and only there."""
    image = context.image(spans=(Span(0, 8 * MIB),))
    server = context.serve(image, write=True)
    full, edges = image.allocated(), (image.read(0, 2 * MIB), image.read(6 * MIB, 2 * MIB))
    _qemu_io(context, server.uri(), "discard 2M 4M", "flush", options=("-d", "unmap"))
    if image.allocated() > full - 4 * MIB + 64 * KIB:
        raise CheckFailedError("discard gave no blocks back")
    _expect_bytes(image, 0, edges[0])
    _expect_bytes(image, 6 * MIB, edges[1])


@check("qemu-io", "aio", needs=IO)
def asynchronous(context: Context) -> None:
    """Sixteen requests in flight, reads and writes mixed."""
    image = context.image()
    server = context.serve(image, write=True)
    writes = [f"aio_write -P {index + 1} {index * 64}k 64k" for index in range(16)]
    reads = [f"aio_read -P {index + 1} {index * 64}k 64k" for index in range(16)]
    zeroes = ["aio_write -z 20M 1M", "aio_write -P 0x99 22M 1M"]
    _qemu_io(context, server.uri(), *writes, *zeroes, "aio_flush", *reads, "aio_flush", "flush")
    for index in range(16):
        _expect_bytes(image, index * 64 * KIB, bytes([index + 1]) * 64 * KIB)
    _expect_bytes(image, 20 * MIB, bytes(MIB))
    _expect_bytes(image, 22 * MIB, b"\x99" * MIB)


@check("qemu-io", "read-only", needs=IO)
def read_only(context: Context) -> None:
    """A writable open of a read-only export fails in QEMU already; a read-only one reads."""
    image = context.image()
    before = image.digest()
    server = context.serve(image)
    context.run("qemu-io", "-f", "raw", "-c", "write 0 4k", server.uri(), code=1)
    expect(before, image.digest(), "sha256 of the read-only image")
    _qemu_io(context, server.uri(), "read -P 0 10M 512k", options=("-r",))


@check("qemu-io", "odd size tail", needs=IO)
def odd_tail(context: Context) -> None:
    """Writes into the last, incomplete sector."""
    image = context.image(size=16 * MIB + 333)
    server = context.serve(image, write=True)
    _qemu_io(context, server.uri(), f"write -P 0x42 {16 * MIB} 333", "flush")
    _expect_bytes(image, 16 * MIB, b"\x42" * 333)
    expect(16 * MIB + 333, Path(image.path).stat().st_size, "size of the image")
