"""xapi-nbd: one server for each host, with what is particular about it.

* Fixed newstyle, never NO_ZEROES: 124 zero bytes follow EXPORT_NAME's answer.
* EXPORT_NAME, ABORT, LIST (refused by policy) and STARTTLS; all else is unsupported, GO too.
* On a network of purpose ``nbd`` nothing before TLS; EXPORT_NAME in clear hangs up.
* The export's name holds a session of XAPI's, which must be alive.
* Read-only; READ of whole sectors. EINVAL ends the session, unknown commands too, a bad sector
  without an answer. One request at a time. 16 connections to a host in all, a backlog of 5.

Which of two ways a host refuses the 17th connection (closing or not accepting) nobody could look
up; here it is closed at once.
"""

import contextlib
import re
import socket
import ssl
import struct
import threading
import time

from conformance.xapi.pool import Host, Pool, Vdi

__all__ = ["NbdServer"]

MAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
REPLY = 0x3E889045565A9
EXPORT_NAME, ABORT, LIST, STARTTLS = 1, 2, 3, 5
ACK, UNSUP, POLICY, TLS_REQD = 1, 0x80000001, 0x80000002, 0x80000005
HAS_FLAGS, READ_ONLY = 1, 2
READ, DISC = 0, 2
EINVAL = 22
PIECE = 512 << 10
NAME = re.compile(r"/([0-9a-f-]{36})\?session_id=(.+)")
IDLE_S = 120.0


class NbdServer:
    """The NBD service of one host. Threads; ends with the process."""

    def __init__(self, pool: Pool, host: Host, port: int) -> None:
        self._pool = pool
        self._host = host
        self._listener = socket.create_server((host.address, port), backlog=5)
        self.port = int(self._listener.getsockname()[1])
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(f"{host.key}.crt", host.key)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            with self._pool.lock:
                trouble = self._pool.trouble
                full = self._host.connections >= trouble.cap
                full |= self._pool.hosts.index(self._host) in trouble.dead
                if not full:
                    self._host.connections += 1
                    most = max(self._pool.most_connections, self._host.connections)
                    self._pool.most_connections = most
            if full:
                sock.close()
                continue
            threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        sock.settimeout(IDLE_S)
        connection = _Connection(self._pool, self._context, sock)
        try:
            connection.talk()
        except (OSError, EOFError, struct.error):
            pass
        finally:
            with contextlib.suppress(OSError):
                connection.sock.close()
            with self._pool.lock:
                self._host.connections -= 1


class _Connection:
    def __init__(self, pool: Pool, context: ssl.SSLContext, sock: socket.socket) -> None:
        self._pool = pool
        self._context = context
        self.sock: socket.socket = sock

    def talk(self) -> None:
        self.sock.sendall(MAGIC + IHAVEOPT + struct.pack(">H", 1))
        self._take(4)
        secure = self._pool.trouble.insecure_nbd
        while True:
            magic, option, length = struct.unpack(">8sII", self._take(16))
            if magic != IHAVEOPT or length > PIECE:
                return
            data = self._take(length)
            if option == STARTTLS and not secure:
                self._reply(option, ACK)
                self.sock = self._context.wrap_socket(self.sock, server_side=True)
                secure = True
            elif option == EXPORT_NAME:
                vdi = self._vdi(data.decode()) if secure else None
                if vdi is not None:
                    self._serve(vdi)
                return
            elif option == ABORT:
                self._reply(option, ACK)
                return
            elif not secure:
                self._reply(option, TLS_REQD)
            else:
                self._reply(option, POLICY if option == LIST else UNSUP)

    def _vdi(self, name: str) -> Vdi | None:
        match = NAME.fullmatch(name)
        with self._pool.lock:
            if match is None or match[2] not in self._pool.sessions:
                return None
            found = [vdi for vdi in self._pool.vdis.values() if vdi.uuid == match[1]]
            if not found or found[0].data is None:
                return None
            found[0].readers += 1  # a VBD of the control domain
            served = self._pool.served
            served[match[1]] = served.get(match[1], 0) + 1
            return found[0]

    def _serve(self, vdi: Vdi) -> None:
        try:
            assert vdi.data is not None
            self.sock.sendall(struct.pack(">QH124x", len(vdi.data), HAS_FLAGS | READ_ONLY))
            while self._answer(vdi):
                pass
        finally:
            with self._pool.lock:
                vdi.readers -= 1

    def _answer(self, vdi: Vdi) -> bool:
        header = self._take(28)
        magic, _, command, cookie, offset, length = struct.unpack(">IHHQQI", header)
        if magic != 0x25609513 or command == DISC:
            return False
        assert vdi.data is not None
        whole = offset % 512 == 0 and length % 512 == 0
        if command != READ or not whole or offset + length > len(vdi.data):
            self.sock.sendall(struct.pack(">IIQ", 0x67446698, EINVAL, cookie))
            return False
        trouble = self._pool.trouble
        if trouble.nbd_delay_s:
            time.sleep(trouble.nbd_delay_s)
        if any(
            who in {"", vdi.uuid} and offset < at + span and at < offset + length
            for who, at, span in trouble.bad
        ):
            return False
        self.sock.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie))
        for at in range(offset, offset + length, PIECE):
            self.sock.sendall(vdi.data[at : min(at + PIECE, offset + length)])
        return True

    def _reply(self, option: int, reply: int) -> None:
        self.sock.sendall(struct.pack(">QIII", REPLY, option, reply, 0))

    def _take(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self.sock.recv(count - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)
