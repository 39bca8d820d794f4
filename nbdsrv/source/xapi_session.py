"""A session with a pool: calls by JSON-RPC 2.0, tasks awaited, logged in again when it has died.

::

    call(method, ...)  ── POST /jsonrpc ──> result
                             HOST_IS_SLAVE ──> the same at its master
                             SESSION_INVALID ─> log in, once more
    task(method, ...)  ── Async.method ──> task ── get_status ... ──> get_result | get_error_info

Rule: neither the password nor a session's reference is ever part of a message.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import re
import xml.etree.ElementTree as ET
from typing import Any, Self

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.xapi_http import HttpServer, exchange
from nbdsrv.source.xapi_place import Access, XapiPlace

__all__ = ["XapiError", "XapiSession"]

log = logging.getLogger(__name__)

VERSION, ORIGINATOR = "1.0", "nbdsrv"
MAX_ANSWER = 64 << 20
"""Bytes: the bitmap of a disk of 16 TiB is 45 MB of base64."""
MAX_MOVES = 4
"""Changes of the master that are followed in a row."""
CALL_S = 60.0
"""Seconds for one call."""
LOGOUT_S = 5.0
"""Seconds for the last one; a session that is not ended ends by itself, a day later."""
TASK_S = 1800.0
"""Seconds for a task: a snapshot waits for its storage to coalesce, if it must."""
FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 2.0
"""Between two looks at a task."""
CANCELLED_S = 20.0
"""Seconds that a task whose caller has gone is waited for, so that what it makes can be found."""
MAX_LOST = 5
"""Looks at a task that may fail in a row before it is given up."""
MAX_DETAILS = 300
_REF = re.compile(r"OpaqueRef:[0-9A-Za-z-]+")
_ADDRESS = re.compile(r"[0-9A-Za-z_.:-]{1,255}")


class XapiError(SourceError):
    """XAPI said no.

    Attributes:
        code: XAPI's, for instance VDI_IN_USE.
        details: what it says about it.
    """

    def __init__(self, where: str, method: str, code: str, details: list[str]) -> None:
        shown = "; ".join(_REF.sub("OpaqueRef:...", each) for each in details if each)
        text = f"{where}: {method}: {code}" + (f" ({shown[:MAX_DETAILS]})" if shown else "")
        super().__init__(text + _ADVICE.get(code, ""))
        self.code = code
        self.details = details


_ADVICE = {
    "SESSION_AUTHENTICATION_FAILED": "; is that the password of that user?",
    "RBAC_PERMISSION_DENIED": "; the user needs the role pool-admin or vm-admin",
}


class XapiSession:
    """Logged in, until the end of the block. Belongs to one event loop; calls may be concurrent.

    Attributes:
        server: the master.
        generation: counts logins: what was made with an older one (an NBD export's name) is void.
    """

    def __init__(self, place: XapiPlace, access: Access) -> None:
        self.server = HttpServer(place.host, place.port, access)
        self.generation = 0
        self._user = place.user
        self._name = f"xapi://{place.user}@{place.host}"
        self._access = access
        self._ref = ""
        self._numbers = itertools.count(1)
        self._logging_in = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self._log_in(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(SourceError, TimeoutError):
            async with asyncio.timeout(LOGOUT_S):
                await self._ask("session.logout", [self._ref])

    @property
    def ref(self) -> str:
        """The session's reference: a secret."""
        return self._ref

    async def call(self, method: str, *parameters: Any) -> Any:
        """One method, without its session.

        Raises:
            XapiError: XAPI refuses.
            SourceError: it cannot be reached, or answers nonsense.
        """
        generation = self.generation
        try:
            return await self._ask(method, [self._ref, *parameters])
        except XapiError as error:
            if error.code not in {"SESSION_INVALID", "HOST_IS_SLAVE"}:
                raise
        await self._log_in(generation)
        return await self._ask(method, [self._ref, *parameters])

    async def task(self, method: str, *parameters: Any, within_s: float = TASK_S) -> str:
        """The same for what takes time: as a task, which is waited for.

        A caller that is cancelled waits for the end of the task, but not long: whatever it has
        made by then can be found and removed.

        Raises:
            XapiError: the task failed.
            SourceError: it did not end within ``within_s``.
        """
        # Not interrupted: a task whose reference never arrived could not be waited for.
        begun = asyncio.ensure_future(self.call(f"Async.{method}", *parameters))
        try:
            task = _text(await asyncio.shield(begun))
            return await self.finished(task, method, within_s=within_s)
        except asyncio.CancelledError:
            with contextlib.suppress(SourceError):
                await self.finished(_text(await begun), method, within_s=CANCELLED_S)
            raise

    async def finished(self, task: str, what: str, *, within_s: float) -> str:
        """Wait for a task, take its result, and remove it. Raises as ``task``."""
        try:
            async with asyncio.timeout(within_s):
                status = await self._watch(task)
        except TimeoutError:
            raise SourceError(f"{self._name}: {what}: not done within {within_s:g} s") from None
        if status == "success":
            result = _value(_text(await self.call("task.get_result", task)))
            await self.forget(task)
            return result
        error = await self.call("task.get_error_info", task)
        await self.forget(task)
        code, *details = [*map(str, error)] if isinstance(error, list) and error else [status]
        raise XapiError(self._name, what, code, details)

    async def _watch(self, task: str) -> str:
        """Until it is neither pending nor being cancelled; a lost answer or two do not matter."""
        pause, lost = FIRST_PAUSE_S, 0
        while True:
            try:
                status = _text(await self.call("task.get_status", task))
                lost = 0
            except XapiError:
                raise
            except SourceError:
                lost += 1
                if lost > MAX_LOST:
                    raise
                status = "pending"
            if status not in {"pending", "cancelling"}:
                return status
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, LAST_PAUSE_S)

    async def forget(self, task: str) -> None:
        """Remove a task that nobody waits for; one that stays is no harm."""
        with contextlib.suppress(SourceError):
            await self.call("task.destroy", task)

    # --- logging in --------------------------------------------------------------------------

    async def _log_in(self, generation: int) -> None:
        """Unless somebody else has since ``generation``."""
        async with self._logging_in:
            if self.generation != generation:
                return
            password = self._access.password.reveal()
            for _ in range(MAX_MOVES):
                try:
                    self._ref = _text(
                        await self._ask(
                            "session.login_with_password",
                            [self._user, password, VERSION, ORIGINATOR],
                        )
                    )
                except XapiError as error:
                    if error.code != "HOST_IS_SLAVE":
                        raise
                    self._move(error)
                else:
                    self.generation += 1
                    log.info("xapi.session pool=%s login=%d", self.server.name, self.generation)
                    return
            raise SourceError(f"{self._name}: its hosts send us from one to the other")

    def _move(self, error: XapiError) -> None:
        address = error.details[0] if error.details else ""
        if not _ADDRESS.fullmatch(address):
            raise SourceError(f"{self._name}: is no master and names none") from error
        log.info("xapi.master host=%s", address)
        self.server = HttpServer(address, self.server.port, self._access)

    # --- one request -------------------------------------------------------------------------

    async def _ask(self, method: str, parameters: list[Any]) -> Any:
        request = {
            "jsonrpc": "2.0",
            "method": method,
            "params": parameters,
            "id": next(self._numbers),
        }
        try:
            async with (
                asyncio.timeout(CALL_S),
                exchange(
                    self.server,
                    "POST",
                    "/jsonrpc",
                    body=json.dumps(request).encode(),
                    answer_s=CALL_S,
                ) as answer,
            ):
                body = await answer.whole(MAX_ANSWER)
                status = answer.status
        except TimeoutError:
            raise SourceError(f"{self._name}: {method}: no answer within {CALL_S:g} s") from None
        if status != 200:
            raise SourceError(f"{self._name}: {method}: HTTP status {status}; is that a XAPI host?")
        return self._result(method, body)

    def _result(self, method: str, body: bytes) -> Any:
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{self._name}: {method}: the answer is no JSON") from error
        if not isinstance(answer, dict):
            raise SourceError(f"{self._name}: {method}: the answer is no JSON-RPC")
        refused = answer.get("error")
        if isinstance(refused, dict):
            data = refused.get("data")
            details = [str(each) for each in data] if isinstance(data, list) else []
            raise XapiError(self._name, method, str(refused.get("message")), details)
        if "result" not in answer:
            raise SourceError(f"{self._name}: {method}: the answer is no JSON-RPC")
        return answer["result"]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise SourceError(f"XAPI answered {type(value).__name__} where a text was expected")
    return value


def _value(result: str) -> str:
    """A task's result: XML in every dialect, for instance ``<value>OpaqueRef:..</value>``."""
    if not result.startswith("<"):
        return result
    if "<!" in result[:MAX_DETAILS]:
        raise SourceError("XAPI: the result of a task is no value")
    try:
        root = ET.fromstring(result)  # noqa: S314 - no doctype: refused above
    except ET.ParseError as error:
        raise SourceError("XAPI: the result of a task is no value") from error
    return "".join(root.itertext())
