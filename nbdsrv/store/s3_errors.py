"""What an S3 service or the way to it said, as one line and an errno.

obstore raises few kinds of errors and puts the facts into their texts: the HTTP status, the
service's ``<Code>``, and for a request without an answer the chain of causes. This is the one
place that reads those texts (of obstore 0.12).

::

    404 NoSuchBucket     ENOENT  of the store, not of the object
    404                  ObjectMissing
    401 403 ExpiredToken EACCES  check credentials
    301 307 region       EREMOTE set AWS_REGION
    409 EBUSY   413 EFBIG   501 ENOTSUP   507 QuotaExceeded ENOSPC
    429 5xx              EIO     after the repetitions
    no answer            ETIMEDOUT ECONNREFUSED EHOSTUNREACH EIO
"""

import errno as os_errno
import re

from nbdsrv.store.store import ObjectMissing, StoreError

__all__ = ["Said", "explain"]

_CREDENTIALS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what the bucket's policy allows"
_REGION = "the bucket is in another region; set AWS_REGION"
_FULL = frozenset({"QuotaExceeded", "XMinioStorageFull", "StorageFull", "InsufficientStorage"})
_STALE = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})
_MOVED = frozenset(
    {
        "PermanentRedirect",
        "TemporaryRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
    }
)
_BY_STATUS = {
    409: (os_errno.EBUSY, "another request for it is under way; try again"),
    412: (os_errno.EEXIST, "it is there already"),
    413: (os_errno.EFBIG, "too large for this service"),
    416: (os_errno.EIO, "the object ends before that"),
    429: (os_errno.EIO, "too many requests; try again later"),
    501: (os_errno.ENOTSUP, "this service lacks what is needed (conditional puts?)"),
    507: (os_errno.ENOSPC, "the service is full; free some space there"),
}
_BY_CAUSE = (
    ("kind: Timeout", os_errno.ETIMEDOUT, "no answer in time; is the service reachable?"),
    ("TimedOut", os_errno.ETIMEDOUT, "no answer in time; is the service reachable?"),
    ("dns error", os_errno.EHOSTUNREACH, "the host's name is not known; check the endpoint"),
    ("ConnectionRefused", os_errno.ECONNREFUSED, "connection refused; is the service running?"),
    (
        "UnknownIssuer",
        os_errno.EIO,
        "its certificate is signed by nobody known here; set AWS_CA_BUNDLE",
    ),
    ("invalid peer certificate", os_errno.EIO, "its certificate is not for that name or time"),
    ("NotPartial", os_errno.EIO, "the service ignores Range and would send the whole object"),
    ("UnexpectedRange", os_errno.EIO, "the service sent another part of the object"),
    ("NoContentRange", os_errno.EIO, "the answer broke off and could not be continued"),
    ("IncompleteBody", os_errno.EIO, "the answer broke off before its end"),
    ("IncompleteMessage", os_errno.EIO, "the service hung up instead of answering"),
    ("InvalidListResponse", os_errno.EIO, "the listing is not what an S3 service answers"),
)
_NO_CREDENTIALS = ("169.254.169.254", "/latest/api/token", "fd00:ec2::254")


class Said:
    """The facts in an error's text.

    Attributes:
        status: of HTTP, 0 if there was no answer.
        code: the service's own word, "" if it had none.
        timed_out: is it unknown what became of the request?
    """

    __slots__ = ("code", "status", "text", "timed_out")

    def __init__(self, error: Exception) -> None:
        self.text = str(error)
        # The first is the service's; what an object's key or a later text holds does not count.
        status = re.search(r"status code: ([0-9]{3})", self.text)
        code = re.search(r"<Code>([A-Za-z0-9.]{1,64})</Code>", self.text)
        self.status = int(status[1]) if status else 0
        self.code = code[1] if code else ""
        self.timed_out = not self.status and "TimedOut" in self.text

    def __str__(self) -> str:
        return " ".join(filter(None, [str(self.status) if self.status else "", self.code]))


def explain(what: str, bucket: str, error: Exception) -> StoreError:
    """The error to raise.

    Args:
        what: ``s3://bucket/key`` of the call.
        bucket: its bucket.
        error: what obstore raised.
    """
    said = Said(error)
    if said.code == "NoSuchBucket":
        text = f"s3://{bucket}: no such bucket; create it, or check its name and the endpoint"
        return StoreError(text, os_errno.ENOENT)
    if any(address in said.text for address in _NO_CREDENTIALS):
        text = f"{what}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return StoreError(text, os_errno.EACCES)
    if said.status == 404 or (isinstance(error, FileNotFoundError) and not said.status):
        return ObjectMissing(f"{what}: no such object", os_errno.ENOENT)
    number, text = _meaning(said)
    shown = f" ({said})" if str(said) else ""
    return StoreError(f"{what}: {text}{shown}", number)


def _meaning(said: Said) -> tuple[int, str]:
    if said.code in _FULL:
        return _BY_STATUS[507]
    if said.code == "RequestTimeTooSkewed":
        return os_errno.EACCES, "this host's clock and the service's differ; set it"
    if said.code in _STALE:
        return os_errno.EACCES, "the session has expired; renew AWS_SESSION_TOKEN"
    if said.code in _MOVED or said.status in {301, 302, 307, 308} or "redirect" in said.text[:400]:
        return os_errno.EREMOTE, _REGION
    if said.status in {401, 403}:
        return os_errno.EACCES, f"access denied; {_CREDENTIALS}"
    if said.status in _BY_STATUS:
        return _BY_STATUS[said.status]
    if said.status >= 500:
        return os_errno.EIO, "the service failed, and again when asked again; see its log"
    if said.status:
        return os_errno.EIO, "the service refused the request"
    for sign, number, text in _BY_CAUSE:
        if sign in said.text:
            return number, text
    return os_errno.EIO, said.text.partition("\n")[0][:300]
