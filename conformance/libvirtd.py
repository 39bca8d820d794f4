"""A private libvirtd with domains in it: real, privileged, and unknown to the rest of the machine.

::

    unshare --mount --pid ── sh ── libvirtd ── QEMU (user libvirt-qemu, TCG) ── vda.qcow2 ...
                                      |
          /etc/libvirt /run/libvirt ... are directories of the check, inside only

    outside: virsh, virtnbdbackup, nbdsrv ── qemu:///system?socket=DIRECTORY/run/libvirt-sock

Everything in it ends with its first process, which ends with the check, or by itself after LIFE_S.
A guest needs no system: its writes are made through the virtio device by QEMU's own monitor.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from conformance.context import Context
from conformance.outcome import CheckFailedError, MissingPeerError
from conformance.process import Finished, kill_group, tail

__all__ = ["NEEDS", "Disk", "Domain", "Libvirtd", "bindings_directory"]

NEEDS = ("libvirtd", "virsh", "qemu-system-x86_64", "qemu-img", "unshare")
LIFE_S = 900
START_TIMEOUT_S = 30.0
DISTRIBUTION = Path("/usr/lib/python3/dist-packages")

_QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
cgroup_controllers = [ ]
namespaces = [ ]
remember_owner = 0
"""

_LIBVIRTD_CONF = """\
unix_sock_dir = "{home}/run"
auth_unix_rw = "none"
auth_unix_ro = "none"
log_outputs = "3:file:{home}/log"
"""

_START = """\
mount --make-rprivate /
: > {home}/nothing
# QEMU may be able to open a /dev/kvm that does not work, and libvirt not: it would probe for ever.
if [ -e /dev/kvm ]; then
    mount --bind {home}/nothing /dev/kvm && mount -o remount,bind,ro /dev/kvm
fi
for place in /etc /run /var/lib /var/cache /var/log; do
    mkdir -p $place/libvirt {home}$place
    mount --bind {home}$place $place/libvirt
done
cp {home}/qemu.conf /etc/libvirt/qemu.conf
while :; do
    libvirtd -f {home}/libvirtd.conf -p {home}/pid &
    wait $! || true # and reap what libvirtd leaves: it waits until its dead are gone
done
"""

_DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>{boot}</os>
  <devices>
    <emulator>{emulator}</emulator>
    {disks}
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
    {agent}
    <memballoon model='none'/>
  </devices>
</domain>
"""

_AGENT = """\
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <serial type='file'><source path='{console}'/></serial>
"""

_DISK = """\
<disk type='file' device='disk'>
      <driver name='qemu' type='{format}'/>
      <source file='{path}'/>
      <target dev='{name}' bus='virtio'/>
    </disk>
"""


def bindings_directory(context: Context) -> Path | None:
    """A directory that has libvirt's Python module for this interpreter; None: it has it anyway.

    Raises:
        MissingPeerError: there is none, and the distribution's is for another Python.
    """
    probe = (sys.executable, "-c", "import libvirt")
    if context.run(*probe, code=None).code == 0:
        return None
    tag = f"cpython-{sys.version_info[0]}{sys.version_info[1]}"
    modules = sorted(DISTRIBUTION.glob(f"libvirtmod.{tag}-*.so"))
    if not modules:
        raise MissingPeerError("python3-libvirt is not installed, or is for another Python")
    directory = context.directory / "bindings"
    directory.mkdir(exist_ok=True)
    for file in (DISTRIBUTION / "libvirt.py", modules[0]):
        if not (directory / file.name).exists():
            (directory / file.name).symlink_to(file)
    return directory


class Libvirtd:
    """The daemon. Ends with the check.

    Attributes:
        uri: for all its clients.
    """

    def __init__(self, context: Context, pki: Path | None = None) -> None:
        """Start it, and wait until it answers.

        Args:
            context: of the check.
            pki: directory with the certificates that QEMU serves backups with.

        Raises:
            MissingPeerError: we are not root.
            CheckFailedError: it did not start.
        """
        if os.geteuid() != 0:
            raise MissingPeerError("a private libvirtd needs root, for namespaces of its own")
        self.context = context
        self._home = context.directory / "lv"
        (self._home / "run").mkdir(parents=True)
        context.directory.chmod(0o755)  # QEMU runs as another user
        tls = f'backup_tls_x509_cert_dir = "{pki}"\n' if pki is not None else ""
        (self._home / "qemu.conf").write_text(_QEMU_CONF + tls)
        (self._home / "libvirtd.conf").write_text(_LIBVIRTD_CONF.format(home=self._home))
        (self._home / "start").write_text(_START.format(home=self._home))
        self.uri = f"qemu:///system?socket={self._home}/run/libvirt-sock"
        with (self._home / "out").open("wb") as out:
            process = subprocess.Popen(
                (
                    *("timeout", "-s", "KILL", str(LIFE_S), "unshare", "--mount", "--pid"),
                    *("--fork", "--kill-child", "--mount-proc", "sh", "-eu", self._home / "start"),
                ),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._process = process
        context.at_end(self._stop, process)
        self._await(process)

    def _await(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.virsh("version", code=None).code:
            if process.poll() is not None or time.monotonic() > deadline:
                raise CheckFailedError(f"libvirtd did not start: {self._said()}")
            time.sleep(0.1)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        # timeout(1) leads the group, but the namespace's first process dies with unshare only.
        kill_group(process)
        shutil.rmtree(self._home, ignore_errors=True)

    def _said(self) -> str:
        texts = [self._home / name for name in ("out", "log")]
        return "; ".join(tail(each.read_text(errors="replace")) for each in texts if each.exists())

    def restart(self) -> None:
        """Kill the daemon; another takes its place. Domains do not notice."""
        self.kill(f"libvirtd -f {self._home}/libvirtd.conf")
        self._await(self._process)

    def kill(self, words: str) -> None:
        """SIGKILL to the one process in here that has these words in its command line."""
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                ours = self._namespace() == os.readlink(file.with_name("ns") / "pid")
            except OSError:
                continue  # it has ended meanwhile
            if ours and words in line:
                os.kill(int(file.parent.name), signal.SIGKILL)
                return
        raise CheckFailedError(f"no process with {words!r} in its command line")

    def _namespace(self) -> str:
        """Which all processes in here have, and nobody else."""
        first = Path(f"/proc/{self._process.pid}")
        child = int((first / "task" / first.name / "children").read_text().split()[0])
        return os.readlink(f"/proc/{child}/ns/pid_for_children")

    def virsh(self, *words: str | Path, code: int | None = 0, timeout_s: float = 60) -> Finished:
        """Run virsh on it."""
        return self.context.run("virsh", "-c", self.uri, *words, code=code, timeout_s=timeout_s)


class Disk:
    """An image of a domain, and a model of what the guest sees in it.

    Attributes:
        name: of the disk: ``vda``.
        path: of the image.
        content: what it must be now, by what has been written.
    """

    def __init__(self, name: str, path: Path, size: int, form: str) -> None:
        self.name = name
        self.path = path
        self.form = form
        self.content = bytearray(size)

    def digest(self) -> str:
        """SHA-256 of what it must be now."""
        return hashlib.sha256(self.content).hexdigest()


class Domain:
    """A running domain.

    Attributes:
        name: of it.
        disks: by name.
    """

    def __init__(
        self,
        libvirtd: Libvirtd,
        name: str,
        disks: Mapping[str, tuple[int, str]],
        guest: tuple[Path, Path] | None = None,
        content: Path | None = None,
    ) -> None:
        """Define and start it.

        Args:
            libvirtd: where.
            name: of it.
            disks: (size, format) by name: ``{"vda": (32 << 20, "qcow2")}``.
            guest: kernel and initramfs of a guest that has an agent; None: nothing to boot.
            content: a raw image that disks begin with, of which their models know nothing.
        """
        self.libvirtd = libvirtd
        self.name = name
        self.disks: dict[str, Disk] = {}
        directory = libvirtd.context.directory
        for disk, (size, form) in disks.items():
            path = directory / f"{name}-{disk}.{form}"
            if content is None:
                libvirtd.context.run("qemu-img", "create", "-q", "-f", form, path, str(size))
            else:
                words = ("qemu-img", "convert", "-f", "raw", "-O", form, content, path)
                libvirtd.context.run(*words, timeout_s=300)
            self.disks[disk] = Disk(disk, path, size, form)
        listed = "".join(
            _DISK.format(name=disk.name, path=disk.path, format=disk.form)
            for disk in self.disks.values()
        )
        boot = ""
        if guest is not None:
            boot = f"<kernel>{guest[0]}</kernel><initrd>{guest[1]}</initrd>"
            boot += "<cmdline>console=ttyS0 quiet panic=-1</cmdline>"
        text = _DOMAIN.format(
            name=name,
            memory=256 if guest else 64,
            boot=boot,
            emulator=shutil.which("qemu-system-x86_64"),
            disks=listed,
            agent=_AGENT.format(console=directory / f"{name}.console") if guest else "",
        )
        (directory / f"{name}.xml").write_text(text)
        libvirtd.virsh("define", directory / f"{name}.xml")
        libvirtd.virsh("start", name)

    def write(self, name: str, offset: int, length: int, pattern: int) -> None:
        """Write a byte again and again, through the device."""
        self._do(name, f"write -P {pattern} {offset} {length}")
        self.disks[name].content[offset : offset + length] = bytes([pattern]) * length

    def zero(self, name: str, offset: int, length: int) -> None:
        """Write zeroes, as a guest's TRIM does."""
        self._do(name, f"write -z -u {offset} {length}")
        self.disks[name].content[offset : offset + length] = bytes(length)

    def _do(self, name: str, command: str) -> None:
        number = list(self.disks).index(name)
        device = f"/machine/peripheral/virtio-disk{number}/virtio-backend"
        order = f'qemu-io -d {device} "{command}"'
        said = self.libvirtd.virsh("qemu-monitor-command", self.name, "--hmp", order).stdout
        if "rror" in said or "failed" in said:
            raise CheckFailedError(f"qemu-io on {name}: {command}: {said}")

    def checkpoints(self) -> list[str]:
        """Names of all its checkpoints, sorted."""
        return sorted(self.libvirtd.virsh("checkpoint-list", self.name, "--name").stdout.split())

    def has_job(self) -> bool:
        """Is a backup job running?"""
        return self.libvirtd.virsh("backup-dumpxml", self.name, code=None).code == 0
