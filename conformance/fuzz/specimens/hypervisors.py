"""What qemu-img and qemu-io can write: every sub-format, with data, text, zeroes, untouched parts.

Rule: small. A case costs what its files weigh, and a table of ten entries has all the corners one
of a million has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from conformance.fuzz.mending import mend_vhd, mend_vhdx
from conformance.fuzz.specimen import KIB, MIB, Mend, Specimen, guest_content, spread_content
from conformance.process import run

__all__ = [
    "SMALL",
    "Bench",
    "parallels",
    "qcow",
    "qcow2",
    "qcow2_features",
    "qcow2_writable",
    "raw",
    "vdi",
    "vhd",
    "vhdx",
    "vmdk",
]

SMALL = 200 * KIB + 512
MEDIUM = 640 * KIB + 512
LARGE = 5 * MIB + 512
"""For formats with blocks of 1 or 2 MiB: a few of them, one of them absent."""
RAW = "guest.img"
READ_ONLY = {"subclusters", "data", "data-raw", "snapshot"}
"""qcow2 images that are served read-only."""


class Bench:
    """A directory with the guest's content in it, where qemu-img is run."""

    def __init__(self, directory: Path, content: bytes) -> None:
        self.directory = directory
        self.content = content
        (directory / RAW).write_bytes(self.content)

    def img(self, *words: str) -> None:
        """Run qemu-img here."""
        run(("qemu-img", *words), directory=self.directory)

    def io(self, name: str, form: str, *commands: str) -> None:
        """Run qemu-io commands on an image here."""
        each = [word for command in commands for word in ("-c", command)]
        run(("qemu-io", "-f", form, *each, name), directory=self.directory)

    def convert(self, form: str, name: str, options: str = "", *flags: str) -> None:
        """Our content as an image of this format."""
        chosen = ("-o", options) if options else ()
        self.img("convert", "-f", "raw", "-O", form, *chosen, *flags, RAW, name)

    def read(self, form: str, name: str) -> bytes:
        """What qemu finds in an image."""
        self.img("convert", "-f", form, "-O", "raw", name, "read.img")
        return (self.directory / "read.img").read_bytes()

    def specimen(
        self,
        form: str,
        label: str,
        names: Sequence[str],
        *,
        content: bytes | None = None,
        suffix: str = "",
        mend: Mend | None = None,
    ) -> Specimen:
        """The files of these names as a specimen; the first is the image."""
        files = {name: (self.directory / name).read_bytes() for name in names}
        source = f"{form}:{{}}/{names[0]}{suffix}"
        found = content or self.content
        return Specimen(
            form, label, files, source, found, mend, known=self.content, peer=not suffix
        )


def raw(directory: Path) -> list[Specimen]:
    """A plain file."""
    return [Bench(directory, guest_content(SMALL)).specimen("raw", "plain", [RAW])]


def _converted(
    bench: Bench,
    form: str,
    qemu: str,
    kinds: Mapping[str, tuple[str, ...]],
    mend: Mend | None = None,
) -> list[Specimen]:
    """One specimen per sub-format: label to options and flags of ``qemu-img convert``."""
    made = []
    for label, (options, *flags) in kinds.items():
        name = f"{label}.{form}"
        bench.convert(qemu, name, options, *flags)
        content = bench.read(qemu, name)  # geometry may have rounded the size up
        made.append(bench.specimen(form, label, [name], content=content, mend=mend))
    return made


def qcow2(directory: Path) -> list[Specimen]:
    """Versions, cluster sizes, compression, subclusters."""
    kinds: dict[str, tuple[str, ...]] = {
        "v3": ("compat=1.1",),
        "v2-4k": ("compat=0.10,cluster_size=4k",),
        "512": ("cluster_size=512",),
        "refcount-1": ("refcount_bits=1,cluster_size=1k",),
        "subclusters": ("extended_l2=on,cluster_size=16k",),
        "zlib": ("cluster_size=4k", "-c"),
        "zstd": ("cluster_size=4k,compression_type=zstd", "-c"),
        "2m": ("cluster_size=2M",),
    }
    return _converted(Bench(directory, guest_content(SMALL)), "qcow2", "qcow2", kinds)


def qcow2_features(directory: Path) -> list[Specimen]:
    """Chains, external data, snapshots, bitmaps, zero clusters."""
    bench = Bench(directory, guest_content(SMALL))
    made = [_qcow2_chain(bench), *_qcow2_history(bench), *_qcow2_bitmaps(bench)]
    for label, options in {"data": "", "data-raw": "data_file_raw=on,"}.items():
        names = [f"{label}.qcow2", f"{label}.bin"]
        bench.convert("qcow2", names[0], f"{options}data_file={names[1]},cluster_size=4k")
        made.append(bench.specimen("qcow2", label, names))
    return made


def _qcow2_chain(bench: Bench) -> Specimen:
    bench.convert("qcow2", "middle.qcow2", "cluster_size=4k")
    bench.img("create", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2")
    bench.io("top.qcow2", "qcow2", "write -P 7 1k 70k", "write -z 128k 16k", "write -z -u 0 64k")
    content = bench.read("qcow2", "top.qcow2")
    return bench.specimen("qcow2", "chain", ["top.qcow2", "middle.qcow2"], content=content)


def _qcow2_history(bench: Bench) -> list[Specimen]:
    bench.convert("qcow2", "history.qcow2", "cluster_size=4k")
    bench.img("snapshot", "-c", "before", "history.qcow2")
    bench.io("history.qcow2", "qcow2", "write -P 9 4k 40k", "write -z 64k 8k", "discard 96k 8k")
    bench.img("snapshot", "-c", "after", "history.qcow2")
    content = bench.read("qcow2", "history.qcow2")
    names = ["history.qcow2"]
    return [
        bench.specimen("qcow2", "with snapshots", names, content=content),
        bench.specimen("qcow2", "snapshot", names, suffix="@before"),
    ]


def _qcow2_bitmaps(bench: Bench) -> list[Specimen]:
    name = "bitmaps.qcow2"
    bench.convert("qcow2", name, "cluster_size=4k")
    bench.img("bitmap", "--add", "-g", "4k", name, "b0")
    bench.io(name, "qcow2", "write -P 3 8k 20k")
    bench.img("bitmap", "--add", "--disable", name, "second")
    return [bench.specimen("qcow2", "bitmaps", [name], content=bench.read("qcow2", name))]


def qcow2_writable(directory: Path) -> list[Specimen]:
    """Those of all qcow2 images that may be written to."""
    made = []
    for index, make in enumerate((qcow2, qcow2_features)):
        place = directory / str(index)
        place.mkdir()
        made += make(place)
    return [
        replace(each, format="qcow2-write", writes=True)
        for each in made
        if each.name not in READ_ONLY
    ]


def qcow(directory: Path) -> list[Specimen]:
    """Version 1: plain, compressed, on a backing file."""
    bench = Bench(directory, guest_content(SMALL // 4096 * 4096))
    made = _converted(bench, "qcow", "qcow", {"plain": ("",)})
    # Not by `convert -c`: qemu-img 7.2 fails at it without a word.
    bench.img("create", "-f", "qcow", "compressed.qcow", "64k")
    packed = [f"write -c -P {7 + at} {at}k 4k" for at in (0, 4, 12, 40, 60)]
    bench.io("compressed.qcow", "qcow", *packed, "write -P 3 20k 4k")
    content = bench.read("qcow", "compressed.qcow")
    made.append(bench.specimen("qcow", "compressed", ["compressed.qcow"], content=content))
    bench.img("create", "-f", "qcow", "-b", RAW, "-F", "raw", "top.qcow")
    bench.io("top.qcow", "qcow", "write -P 5 4k 30k")
    content = bench.read("qcow", "top.qcow")
    return [*made, bench.specimen("qcow", "chain", ["top.qcow", RAW], content=content)]


def vhd(directory: Path) -> list[Specimen]:
    """Fixed and dynamic; sizes with and without geometry."""
    kinds: dict[str, tuple[str, ...]] = {
        "dynamic": ("subformat=dynamic,force_size=on",),
        "fixed": ("subformat=fixed,force_size=on",),
        "chs": ("subformat=dynamic",),
    }
    return _converted(Bench(directory, spread_content(LARGE)), "vhd", "vpc", kinds, mend_vhd)


def vhdx(directory: Path) -> list[Specimen]:
    """Dynamic and fixed, with the smallest blocks and log."""
    kinds: dict[str, tuple[str, ...]] = {
        "dynamic": ("subformat=dynamic,block_size=1M,log_size=1M",),
        "fixed": ("subformat=fixed,block_size=1M,log_size=1M",),
    }
    return _converted(Bench(directory, spread_content(LARGE)), "vhdx", "vhdx", kinds, mend_vhdx)


def vmdk(directory: Path) -> list[Specimen]:
    """All of qemu-img's sub-formats, and a child."""
    bench = Bench(directory, guest_content(MEDIUM))
    made = _converted(bench, "vmdk", "vmdk", {"sparse": ("subformat=monolithicSparse",)})
    made += _converted(bench, "vmdk", "vmdk", {"stream": ("subformat=streamOptimized",)})
    extents = {"monolithicFlat": "flat"}
    extents |= {"twoGbMaxExtentSparse": "s001", "twoGbMaxExtentFlat": "f001"}
    for kind, suffix in extents.items():
        bench.convert("vmdk", f"{kind}.vmdk", f"subformat={kind}")
        made.append(bench.specimen("vmdk", kind, [f"{kind}.vmdk", f"{kind}-{suffix}.vmdk"]))
    bench.img("create", "-f", "vmdk", "-b", "sparse.vmdk", "-F", "vmdk", "top.vmdk")
    bench.io("top.vmdk", "vmdk", "write -P 5 64k 100k")
    content = bench.read("vmdk", "top.vmdk")
    return [*made, bench.specimen("vmdk", "chain", ["top.vmdk", "sparse.vmdk"], content=content)]


def vdi(directory: Path) -> list[Specimen]:
    """Dynamic and static."""
    kinds: dict[str, tuple[str, ...]] = {"dynamic": ("",), "static": ("static=on",)}
    return _converted(Bench(directory, spread_content(LARGE)), "vdi", "vdi", kinds)


def parallels(directory: Path) -> list[Specimen]:
    """With the newer magic, and the same image told in the older one."""
    bench = Bench(directory, guest_content(MEDIUM))
    made = _converted(bench, "parallels", "parallels", {"ext": ("cluster_size=65536",)})
    data = bytearray(made[0].files["ext.parallels"])
    # The old format's table counts sectors, the new one's clusters.
    tracks = int.from_bytes(data[28:32], "little")
    entries = int.from_bytes(data[32:36], "little")
    data[0:16] = b"WithoutFreeSpace"
    for at in range(64, 64 + 4 * entries, 4):
        entry = int.from_bytes(data[at : at + 4], "little") * tracks
        data[at : at + 4] = entry.to_bytes(4, "little")
    (directory / "old.parallels").write_bytes(data)
    content = bench.read("parallels", "old.parallels")
    return [*made, bench.specimen("parallels", "old", ["old.parallels"], content=content)]
