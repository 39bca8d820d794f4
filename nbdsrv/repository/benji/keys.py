"""The keys of Benji's encryption, and of its metadata's authentication.

::

    masterKey (32 bytes, base64) ──────────────────────┐
    password ── PBKDF2-HMAC-SHA512(salt, iterations) ──┴─> AES key wrap (RFC 3394) ──> envelope key
    eccKey ── ECDH with the public key in the metadata ──> SHA-256(x ‖ y) ──────────>       │
    object ── AES-256-GCM's keystream, without a tag ───────────────────────────────────────┘

The envelope key proves a master key: a wrong one does not unwrap. ECC keys prove nothing; a wrong
one is noticed by what comes out.
"""

import base64
import binascii
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from nbdsrv.errors import ConfigError, CorruptImage, RepositoryError
from nbdsrv.repository.benji.config import VARIABLE, Configuration, Storage

__all__ = ["Keys", "hmac_key"]

KEY = 32
MAX_ITERATIONS = 50_000_000
"""Rounds of PBKDF2: half a minute."""
MAX_DER = 1024
"""Bytes of an ECC key."""
MAX_POINTS = 256
"""Shared keys kept: each point multiplication takes a millisecond."""


class Keys:
    """Envelope keys. Thread-safe; all methods block.

    Attributes:
        configuration: where keys are looked for besides the passphrase.
    """

    def __init__(
        self, name: str, configuration: Configuration, passphrase: Callable[[], str]
    ) -> None:
        self._name = name
        self.configuration = configuration
        self._passphrase = passphrase
        self._lock = threading.Lock()
        self._proven: set[str] = set()
        self._masters: dict[str, bytes] = {}
        self._private: dict[str, ec.EllipticCurvePrivateKey] = {}
        self._shared: OrderedDict[bytes, bytes] = OrderedDict()

    def envelope(self, module: str, transform: str, wrapped: bytes) -> bytes:
        """The key an object is encrypted with.

        Args:
            module: ``aes_256_gcm`` or ``aes_256_gcm_ecc``.
            transform: the transform's name.
            wrapped: ``envelope_key`` of the object's metadata.

        Raises:
            RepositoryError: the key is wrong.
            CorruptImage: this object's is, others' are not.
            ConfigError: there is none.
        """
        if module == "aes_256_gcm_ecc":
            return self._agree(transform, wrapped)
        master = self._master(transform)
        try:
            key = keywrap.aes_key_unwrap(master, wrapped)
        except (keywrap.InvalidUnwrap, ValueError) as error:
            if transform in self._proven:
                text = f"transform {transform!r}: the envelope key was changed"
                raise CorruptImage(f"corrupt repository: {self._name}: {text}") from error
            text = f"{self._name}: the key of transform {transform!r} is not the one it was"
            raise RepositoryError(f"{text} encrypted with, or the metadata was changed") from error
        self._proven.add(transform)
        return key

    # --- a master key --------------------------------------------------------------------------

    def _master(self, transform: str) -> bytes:
        with self._lock:
            if transform not in self._masters:
                self._masters[transform] = self._find_master(transform)
            return self._masters[transform]

    def _find_master(self, transform: str) -> bytes:
        configuration = self.configuration
        settings = configuration.transforms.get(transform, {})
        given, missing = self._given()
        if given and (key := _key_of(given)) is not None:
            return key
        if settings.get("kdfSalt") and (given or settings.get("password")):
            return _derive(configuration.path, settings, given)
        master = settings.get("masterKey")
        if isinstance(master, str):
            key = _key_of(master)
            if key is None:
                raise ConfigError(f"{configuration.path}: masterKey of {transform!r} is no key")
            return key
        if missing is not None:
            text = f"it is encrypted; set NBDSRV_PASSPHRASE to the master key, or {VARIABLE} to the"
            raise ConfigError(f"{self._name}: {text} benji.yaml that has the key") from missing
        text = (
            "the passphrase is no master key (32 bytes in base64); for a password the salt and the"
        )
        raise ConfigError(
            f"{self._name}: {text} iterations are needed: set {VARIABLE} to the benji.yaml that has"
            f" transform {transform!r}"
        )

    def _given(self) -> tuple[str, ConfigError | None]:
        try:
            return self._passphrase(), None
        except ConfigError as error:
            return "", error

    # --- elliptic curves -----------------------------------------------------------------------

    def _agree(self, transform: str, public: bytes) -> bytes:
        with self._lock:
            found = self._shared.get(public)
            if found is None:
                found = self._shared[public] = self._multiply(transform, public)
                if len(self._shared) > MAX_POINTS:
                    self._shared.popitem(last=False)
            return found

    def _multiply(self, transform: str, public: bytes) -> bytes:
        private = self._private.get(transform)
        if private is None:
            private = self._private[transform] = self._find_private(transform)
        try:
            theirs = serialization.load_der_public_key(public[:MAX_DER])
            if not isinstance(theirs, ec.EllipticCurvePublicKey):
                raise ValueError("no key on a curve")  # noqa: TRY004 - of what was read
            # cryptography gives x only, as ECDH is used everywhere else; Benji hashes y too.
            x, y = _multiplied(private, theirs)
        except (ValueError, UnsupportedAlgorithm) as error:
            text = f"{self._name}: transform {transform!r}: the metadata's public key is broken"
            raise RepositoryError(f"{text}: {error}") from error
        size = (private.curve.key_size + 7) // 8
        return hashlib.sha256(x.to_bytes(size, "big") + y.to_bytes(size, "big")).digest()

    def _find_private(self, transform: str) -> ec.EllipticCurvePrivateKey:
        settings = self.configuration.transforms.get(transform, {})
        given, missing = self._given()
        text = given or settings.get("eccKey") or ""
        where = self.configuration.path or self._name
        if not text:
            said = f"it is encrypted; set NBDSRV_PASSPHRASE to the ECC key, or {VARIABLE} to the"
            raise ConfigError(f"{self._name}: {said} benji.yaml that has it") from missing
        try:
            raw = base64.b64decode(text, validate=True)
            key = serialization.load_der_private_key(raw, password=None)
        except (binascii.Error, ValueError, TypeError, UnsupportedAlgorithm) as error:
            text = "is no private key (base64 of DER); encryption needs the public one only"
            raise ConfigError(f"{where}: eccKey of {transform!r} {text}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{where}: eccKey of {transform!r} is no key on a curve")
        return key


def _multiplied(
    private: ec.EllipticCurvePrivateKey, public: ec.EllipticCurvePublicKey
) -> tuple[int, int]:
    """Both coordinates of d·Q. ECDH gives x; of the two y's the right one is that of d·(Q+G)."""
    if private.curve.name != public.curve.name:
        raise ValueError("another curve")
    x = int.from_bytes(private.exchange(ec.ECDH(), public), "big")
    prime, order_b = _CURVES[private.curve.name]
    y_squared = (pow(x, 3, prime) - 3 * x + order_b) % prime
    y = pow(y_squared, (prime + 1) // 4, prime)
    if y * y % prime != y_squared:
        raise ValueError("no point of the curve")
    q, mine = public.public_numbers(), private.public_key().public_numbers()
    # d·(Q + G) = d·Q + d·G: its x, by ECDH again, tells the two candidates apart.
    shifted = _add((q.x, q.y), _generator(private.curve), prime)
    if shifted is None:
        raise ValueError("a point nobody would choose")
    point = ec.EllipticCurvePublicNumbers(*shifted, private.curve).public_key()
    wanted = int.from_bytes(private.exchange(ec.ECDH(), point), "big")
    for candidate in (y, prime - y):
        total = _add((x, candidate), (mine.x, mine.y), prime)
        if total is not None and total[0] == wanted:
            return x, candidate
    raise ValueError("no such point")


def _generator(curve: ec.EllipticCurve) -> tuple[int, int]:
    numbers = ec.derive_private_key(1, curve).public_key().public_numbers()
    return numbers.x, numbers.y


def _add(a: tuple[int, int], b: tuple[int, int], prime: int) -> tuple[int, int] | None:
    """The sum of two points that differ in x; None if they do not."""
    if (a[0] - b[0]) % prime == 0:
        return None
    slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, prime) % prime
    x = (slope * slope - a[0] - b[0]) % prime
    return x, (slope * (a[0] - x) - a[1]) % prime


_CURVES = {
    # Of NIST's curves (FIPS 186-4, D.1.2): the prime, and b; a is -3. All primes are 3 modulo 4.
    "secp256r1": (
        2**256 - 2**224 + 2**192 + 2**96 - 1,
        0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B,
    ),
    "secp384r1": (
        2**384 - 2**128 - 2**96 + 2**32 - 1,
        0xB3312FA7E23EE7E4988E056BE3F82D19181D9C6EFE8141120314088F5013875AC656398D8A2ED19D2A85C8EDD3EC2AEF,
    ),
    "secp521r1": (
        2**521 - 1,
        0x051953EB9618E1C9A1F929A21A0B68540EEA2DA725B99B315F3B8B489918EF109E156193951EC7E937B1652C0BD3BB1BF073573DF883D2C34F1EF451FD46B503F00,
    ),
}


def hmac_key(path: str, storage: Storage | None) -> bytes | None:
    """The key objects' metadata is authenticated with; None if it is not, or not known. Blocking.

    Raises:
        ConfigError: what is configured makes no key.
    """
    if storage is None or not storage.hmac:
        return None
    key = storage.hmac.get("key")
    if isinstance(key, str):
        return _decoded(path, "hmac.key", key)
    return _derive(path, storage.hmac, "")


def _derive(path: str, settings: Mapping[str, Any], given: str) -> bytes:
    password = given or settings.get("password")
    iterations, salt = settings.get("kdfIterations"), settings.get("kdfSalt")
    if not isinstance(password, str) or not isinstance(salt, str):
        raise ConfigError(f"{path}: kdfSalt without a password")
    if not isinstance(iterations, int) or not 0 < iterations <= MAX_ITERATIONS:
        raise ConfigError(f"{path}: kdfIterations must be from 1 to {MAX_ITERATIONS}")
    kdf = PBKDF2HMAC(hashes.SHA512(), KEY, _decoded(path, "kdfSalt", salt), iterations)
    return kdf.derive(password.encode())


def _decoded(path: str, name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"{path}: {name} is no base64") from error


def _key_of(text: str) -> bytes | None:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if len(raw) == KEY else None
