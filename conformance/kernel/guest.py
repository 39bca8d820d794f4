"""A Linux guest made of a Debian kernel and an initramfs of this machine's programs.

The kernel's package is downloaded and unpacked, never installed. The initramfs holds busybox,
nbd-client and mkfs.ext4 with the libraries they are linked to, the modules below, and ``init``
beside this file. The machine is emulated (TCG): it boots in seconds and needs no privileges.
"""

import lzma
import re
import shutil
from pathlib import Path

from conformance import process
from conformance.context import Context
from conformance.download import cached
from conformance.outcome import CheckFailedError, MissingPeerError
from conformance.process import find_program

__all__ = ["NEEDS", "Guest"]

NEEDS = ("qemu-system-x86_64", "nbd-client", "mkfs.ext4", "busybox", "cpio", "apt-get", "dpkg-deb")

MODULES = (
    *("failover", "net_failover", "virtio_ring", "virtio"),
    *("virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_net"),
    *("crc16", "crc32c_generic", "libcrc32c", "mbcache", "jbd2", "ext4", "nbd"),
)
"""In the order they are loaded. What has no file is built into the kernel."""

GUEST_TIMEOUT_S = 180.0
DOWNLOAD_TIMEOUT_S = 180.0


class Guest:
    """One boot. Its initramfs may be given more files before it is run."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._kernel = _kernel()
        self._root = context.directory / "guest"
        self._fill()

    def add(self, file: Path, name: str) -> None:
        """Put a file at the root of the guest's file system."""
        shutil.copy(file, self._root / name)

    def run(self, job: str, port: int, name: str) -> dict[str, str]:
        """Boot, do one job of ``init``, and return what it reported.

        Raises:
            CheckFailedError: a step failed in the guest, or it did not end within 180 s.
        """
        archive = self._context.directory / "initramfs"
        pack = f"cd '{self._root}' && find . | cpio --quiet -o -H newc > '{archive}'"
        self._context.run("sh", "-c", pack)
        command_line = "console=ttyS0 quiet panic=-1 "
        command_line += f"nbdsrv.job={job} nbdsrv.port={port} nbdsrv.name={name}"
        text = self._context.run(
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-smp", "2", "-m", "512", "-nographic", "-no-reboot", "-nodefaults"),
            *("-serial", "stdio", "-nic", "user,model=virtio-net-pci"),
            *("-kernel", self._kernel / "vmlinuz", "-initrd", archive, "-append", command_line),
            timeout_s=GUEST_TIMEOUT_S,
        ).stdout
        results = dict(re.findall(r"^RESULT (\S+) (.*?)\r?$", text, flags=re.MULTILINE))
        if results.get("done") != "ok":
            failed = results.get("failed", "a step it did not name")
            raise CheckFailedError(f"the guest failed at `{failed}`: {process.tail(text, lines=8)}")
        return results

    def _fill(self) -> None:
        for name in ("bin", "lib", "lib64", "sbin", "modules"):
            (self._root / name).mkdir(parents=True)
        for program in ("busybox", "nbd-client", "mkfs.ext4"):
            self._copy_program(program)
        shutil.copy(Path(__file__).with_name("init"), self._root / "init")
        (self._root / "init").chmod(0o755)
        (self._root / "etc").mkdir()
        (self._root / "etc" / "mtab").touch()
        order: list[str] = []
        for name in MODULES:
            found = sorted((self._kernel / "modules").rglob(f"{name}.ko*"))
            if found:
                order.append(f"{name}.ko")
                (self._root / "modules" / f"{name}.ko").write_bytes(_plain(found[0]))
        (self._root / "modules" / "order").write_text("\n".join([*order, ""]))

    def _copy_program(self, name: str) -> None:
        path = Path(find_program(name)).resolve()
        shutil.copy(path, self._root / "bin" / name)
        linked = self._context.run("ldd", path, code=None).stdout
        for library in re.findall(r"(/\S+) \(0x", linked):
            place = "lib64" if "/ld-linux" in library else "lib"
            shutil.copy(library, self._root / place / Path(library).name)


def _plain(module: Path) -> bytes:
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data


def _kernel() -> Path:
    """A directory with ``vmlinuz`` and ``modules/``, from Debian's current kernel package."""
    here = Path("/")
    depends = process.run(("apt-cache", "depends", "linux-image-amd64"), directory=here, code=None)
    package = re.search(r"Depends: (linux-image-[0-9]\S*)", depends.stdout)
    if package is None:
        raise MissingPeerError("apt knows no linux-image-amd64 (run apt-get update; Debian only)")
    policy = process.run(("apt-cache", "policy", package[1]), directory=here).stdout
    candidate = re.search(r"Candidate: (\S+)", policy)
    version = candidate[1].replace(":", "_") if candidate else "unknown"

    def download(home: Path) -> None:
        process.run(
            ("apt-get", "download", package[1]), directory=home, timeout_s=DOWNLOAD_TIMEOUT_S
        )
        archive = next(home.glob("*.deb"))
        process.run(("dpkg-deb", "-x", archive, "x"), directory=home, timeout_s=120)
        next((home / "x" / "boot").glob("vmlinuz-*")).rename(home / "vmlinuz")
        next((home / "x").rglob("lib/modules/*")).rename(home / "modules")
        shutil.rmtree(home / "x")
        archive.unlink()

    return cached(f"kernel-{package[1]}-{version}", download)
