"""A guest with QEMU's guest agent in it and an ext4 on its disk that it never stops writing to.

The kernel and most of the initramfs are those of ``kernel.guest``; the agent's package is
downloaded and unpacked, not installed. The host reaches the agent through libvirt's channel.
"""

import re
import shutil
from pathlib import Path

from conformance import process
from conformance.context import Context
from conformance.download import cached
from conformance.kernel.guest import NEEDS as KERNEL_NEEDS
from conformance.kernel.guest import Guest

__all__ = ["NEEDS", "AgentGuest"]

NEEDS = tuple(name for name in KERNEL_NEEDS if name != "qemu-system-x86_64")
MODULES = ("virtio_blk", "virtio_console")
DOWNLOAD_TIMEOUT_S = 120

_INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /run /var
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
/bin/busybox --install -s /bin
export PATH=/bin:/sbin LD_LIBRARY_PATH=/lib
ln -s /run /var/run
while read -r module; do insmod "/modules/$module"; done </modules/order
mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt
ln -sf /proc/self/mounts /etc/mtab
for port in /sys/class/virtio-ports/*; do device=/dev/${port##*/}; done
qemu-ga -m virtio-serial -p "$device" -t /run &
number=0
while :; do
    number=$((number + 1))
    echo $number >/mnt/number.new
    mv /mnt/number.new /mnt/number
    sync
    sleep 0.1
done
"""


class AgentGuest(Guest):
    """Its kernel and initramfs, for a domain to boot.

    Attributes:
        kernel: image.
        initrd: archive.
    """

    def __init__(self, context: Context) -> None:
        """Make them."""
        super().__init__(context)
        self.kernel = context.directory / "vmlinuz"
        shutil.copy(self._kernel / "vmlinuz", self.kernel)
        order = (self._root / "modules" / "order").read_text().split()
        for name in MODULES:
            module = next((self._kernel / "modules").rglob(f"{name}.ko"))
            shutil.copy(module, self._root / "modules" / module.name)
            order.append(module.name)
        (self._root / "modules" / "order").write_text("\n".join([*order, ""]))
        (self._root / "init").write_text(_INIT)
        self._add_agent(_agent())
        self.initrd = context.directory / "initrd"
        pack = f"cd '{self._root}' && find . | cpio --quiet -o -H newc > '{self.initrd}'"
        context.run("sh", "-c", pack)

    def _add_agent(self, program: Path) -> None:
        shutil.copy(program, self._root / "bin" / "qemu-ga")
        for library in re.findall(r"(/\S+) \(0x", self._context.run("ldd", program).stdout):
            if "/ld-linux" not in library:
                shutil.copy(library, self._root / "lib" / Path(library).name)


def _agent() -> Path:
    def download(home: Path) -> None:
        words = ("apt-get", "download", "qemu-guest-agent")
        process.run(words, directory=home, timeout_s=DOWNLOAD_TIMEOUT_S)
        process.run(("dpkg-deb", "-x", next(home.glob("*.deb")), "x"), directory=home)

    return cached("qemu-guest-agent", download) / "x" / "usr" / "sbin" / "qemu-ga"
