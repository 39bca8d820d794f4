"""A disk that boots: MBR, SYSLINUX on FAT, Debian's kernel, and busybox on an ext4 of its own.

::

    0        1 MiB                          33 MiB                                   288 MiB
    |MBR code| FAT: syslinux, vmlinuz, initrd | ext4: busybox, init, /srv/service.*   |

    BIOS ─ MBR ─ SYSLINUX ─ kernel ─ initrd: modules, mount /dev/vda2 ─ /sbin/init: "RESULT booted"

The files below /srv stand for what a real system reads while it starts: 24 MiB in pieces all over
the ext4, among 96 MiB that nobody reads. The boot loader's packages are downloaded and unpacked,
never installed. A disk is made once and kept with the other downloads.
"""

import hashlib
import os
import random
import shutil
from pathlib import Path

from conformance import process
from conformance.context import Context
from conformance.download import cached
from conformance.image import MIB
from conformance.kernel.guest import NEEDS as KERNEL_NEEDS
from conformance.kernel.guest import Guest
from conformance.outcome import MissingPeerError

__all__ = ["NEEDS", "ROOT_AT", "SIZE", "boot_disk"]

NEEDS = (*KERNEL_NEEDS, "sfdisk", "e2fsck", "qemu-img")
SIZE = 288 * MIB
BOOT_AT, ROOT_AT = MIB, 33 * MIB
"""Bytes at which the partitions begin."""
SERVICES, SERVICE = 96, 256 << 10
"""Files that are read while it boots, and their bytes."""
BALLAST = 4
"""Times as much lies between them and is not read."""
PACKAGES = ("syslinux", "syslinux-common", "mtools", "dosfstools")
DOWNLOAD_TIMEOUT_S = 120
_SKIPPED = frozenset({"nbd.ko", "virtio_net.ko", "net_failover.ko", "failover.ko"})
"""Modules of the attaching guest's that this one has no use for."""

_CONFIG = """\
DEFAULT linux
PROMPT 0
TIMEOUT 0
LABEL linux
  KERNEL /vmlinuz
  INITRD /initrd
  APPEND console=ttyS0 quiet panic=-1
"""

_INITRD = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
while read -r module; do /bin/busybox insmod "/modules/$module"; done </modules/order
while [ ! -b /dev/vda2 ]; do /bin/busybox sleep 0.05; done
/bin/busybox mount -t ext4 /dev/vda2 /root || exec /bin/busybox sh
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
"""

_INIT = """\
#!/bin/sh
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo -icrnl
for service in /srv/service.*; do md5sum <$service >>/tmp/started; done
echo
echo "RESULT booted $(wc -l </tmp/started)"
while IFS= read -r line; do eval "$line"; echo "END $?"; done
"""


def boot_disk(context: Context) -> Path:
    """A copy of the disk, raw, in the check's directory.

    Raises:
        MissingPeerError: what it is made of cannot be downloaded.
    """
    told = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]

    def fill(home: Path) -> None:
        _build(context, home / "disk.raw")

    made = cached(f"boot-disk-{told}", fill) / "disk.raw"
    copy = context.directory / "disk.raw"
    context.run("cp", "--sparse=always", made, copy)
    return copy


class _System(Guest):
    """The initramfs, and the kernel of it."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        order = (self._root / "modules" / "order").read_text().split()
        order = [name for name in order if name not in _SKIPPED]
        found = next((self._kernel / "modules").rglob("virtio_blk.ko*"))
        shutil.copy(found, self._root / "modules" / "virtio_blk.ko")
        for name in _SKIPPED:
            (self._root / "modules" / name).unlink(missing_ok=True)
        (self._root / "modules" / "order").write_text("\n".join([*order, "virtio_blk.ko", ""]))
        (self._root / "init").write_text(_INITRD)
        for name in ("bin/nbd-client", "bin/mkfs.ext4", "lib", "lib64"):
            path = self._root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.kernel = self._kernel / "vmlinuz"
        self.initrd = context.directory / "initrd"
        pack = f"find . | cpio --quiet -o -H newc | gzip -1 > '{self.initrd}'"
        context.run("sh", "-c", f"cd '{self._root}' && {pack}")


def _build(context: Context, disk: Path) -> None:
    tools = _loader()
    system = _System(context)
    table = "label: dos\n2048,65536,c,*\n67584,,83\n"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    context.run("sh", "-c", f"printf '{table}' | sfdisk -q '{disk}'")
    boot = _boot_partition(context, tools, system)
    root = _root_partition(context)
    with disk.open("r+b") as file:
        file.write((tools / "usr/lib/syslinux/mbr/mbr.bin").read_bytes()[:440])
        for part, at in ((boot, BOOT_AT), (root, ROOT_AT)):
            _place(part, file.fileno(), at)


def _place(part: Path, target: int, at: int) -> None:
    """Copy an image into the disk; what is zeroes stays a hole."""
    with part.open("rb") as file:
        while piece := file.read(MIB):
            if any(piece):
                os.pwrite(target, piece, at)
            at += len(piece)


def _boot_partition(context: Context, tools: Path, system: _System) -> Path:
    image = context.directory / "boot.fat"
    with image.open("wb") as file:
        file.truncate(ROOT_AT - BOOT_AT)
    path = f"{tools}/usr/bin:{tools}/sbin:{tools}/usr/sbin:{os.environ['PATH']}"
    environment = {"PATH": path, "MTOOLS_SKIP_CHECK": "1"}
    context.run(
        "mkfs.vfat" if shutil.which("mkfs.vfat") else str(tools / "sbin/mkfs.vfat"),
        *("-F", "16", "-h", "2048", image),
        environment=environment,
    )
    config = context.directory / "syslinux.cfg"
    config.write_text(_CONFIG)
    for source, name in (
        (system.kernel, "vmlinuz"),
        (system.initrd, "initrd"),
        (config, "syslinux.cfg"),
    ):
        words = (tools / "usr/bin/mcopy", "-i", image, source, f"::/{name}")
        context.run(*words, environment=environment)
    context.run(tools / "usr/bin/syslinux", "--install", image, environment=environment)
    return image


def _root_partition(context: Context) -> Path:
    tree = context.directory / "root"
    for name in ("bin", "sbin", "dev", "proc", "sys", "tmp", "srv", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copy(process.find_program("busybox"), tree / "bin" / "busybox")
    for name in process.run(("busybox", "--list"), directory=tree).stdout.split():
        if name != "busybox":
            (tree / "bin" / name).symlink_to("busybox")
    init = tree / "sbin" / "init"
    init.write_text(_INIT)
    init.chmod(0o755)
    source = random.Random(6)
    for number in range(SERVICES):
        # Half of it text-like: restore points are compressed.
        text = b"".join(b"%d " % source.randrange(1000) for _ in range(SERVICE // 8))
        content = (text[: SERVICE // 2] + source.randbytes(SERVICE))[:SERVICE]
        (tree / "srv" / f"service.{number:03}").write_bytes(content)
        other = text * BALLAST + source.randbytes(2 * SERVICE)
        (tree / "srv" / f"other.{number:03}").write_bytes(other[: BALLAST * SERVICE])
    image = context.directory / "root.ext4"
    with image.open("wb") as file:
        file.truncate(SIZE - ROOT_AT)
    words = ("-q", "-F", "-b", "4096", "-E", "root_owner=0:0", "-d", tree, image)
    context.run("mkfs.ext4", *words, timeout_s=60)
    return image


def _loader() -> Path:
    """The boot loader's packages, unpacked."""

    def download(home: Path) -> None:
        words = ("apt-get", "download", *PACKAGES)
        process.run(words, directory=home, timeout_s=DOWNLOAD_TIMEOUT_S)
        for archive in home.glob("*.deb"):
            process.run(("dpkg-deb", "-x", archive, "x"), directory=home)
            archive.unlink()

    home = cached("syslinux", download)
    if not (home / "x/usr/bin/syslinux").exists():
        raise MissingPeerError("Debian's syslinux has no usr/bin/syslinux any more")
    return home / "x"
