"""
Keys of lineages and objects, and the sealing of frames.

Everything that leaves the host is compressed with zstd (or kept raw where that is smaller) and then
encrypted and authenticated with AES-256-GCM. Each object has a key of its own, derived from the lineage's
key, the object's name and a random salt, so that a nonce (the frame's number) never meets the same key
twice, and an object that was renamed or moved to another lineage does not open.

    repository key   32 random bytes, wrapped in keys/<id>
    lineage key      HKDF-SHA256(repository key, info = "cloudsave v1 lineage " + lineage id)
    object key       HKDF-SHA256(lineage key, salt of the object, info = "cloudsave v1 object " + object name)

Source: RFC 5869 (HKDF), NIST SP 800-38D (GCM); decision 0003.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import zstandard
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloudsave.errors import IntegrityError
from cloudsave.store.api import Buffer

KEY_BYTES = 32
SALT_BYTES = 24
TAG_BYTES = 16
FRAME_PLAIN_BYTES_MAX = 64 << 20
"""Limit: no frame claims to be larger when opened; a damaged or hostile length cannot exhaust memory."""
ZSTD_LEVEL = 1
CODEC_RAW = 0
CODEC_ZSTD = 1


def derive_key(secret: bytes, *, salt: bytes, info: str) -> bytes:
    """32 bytes by HKDF-SHA256."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info.encode()).derive(secret)


@dataclass(frozen=True, slots=True)
class LineageKeys:
    """The keys of one lineage. `repr` shows none of them."""

    lineage: str
    lineage_key: bytes

    def __repr__(self) -> str:
        return f"LineageKeys({self.lineage!r})"

    @staticmethod
    def derive(repository_key: bytes, lineage: str) -> LineageKeys:
        """The keys of `lineage`."""
        info = f"cloudsave v1 lineage {lineage}"
        return LineageKeys(lineage, derive_key(repository_key, salt=b"", info=info))

    def object_key(self, name: str, salt: bytes) -> bytes:
        """The key of the object called `name` (its full name in the store)."""
        return derive_key(self.lineage_key, salt=salt, info=f"cloudsave v1 object {name}")

    def fingerprint_seed(self) -> bytes:
        """Seed of the keyed page fingerprints."""
        return derive_key(self.lineage_key, salt=b"", info="cloudsave v1 page fingerprints")

    def signing_key(self) -> Ed25519PrivateKey:
        """Signs manifests and proofs."""
        return Ed25519PrivateKey.from_private_bytes(
            derive_key(self.lineage_key, salt=b"", info="cloudsave v1 signing key")
        )

    def public_key(self) -> bytes:
        """With this, one who has no keys can check who wrote a manifest."""
        return self.signing_key().public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def signature_is_valid(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` is that of `message`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except InvalidSignature:
        return False
    return True


class Codec(threading.local):
    """zstd contexts, one per thread and level."""

    def __init__(self) -> None:
        self._compressors: dict[int, zstandard.ZstdCompressor] = {}
        self._decompressor = zstandard.ZstdDecompressor()

    def compress(self, plain: Buffer, level: int) -> tuple[int, Buffer]:
        """The codec chosen and the coded bytes: zstd, or raw where zstd does not help."""
        if level not in self._compressors:
            self._compressors[level] = zstandard.ZstdCompressor(level=level, write_content_size=True)
        packed = self._compressors[level].compress(plain)
        if len(packed) >= len(plain):
            return CODEC_RAW, plain
        return CODEC_ZSTD, packed

    def decompress(self, codec: int, coded: Buffer, *, plain_bytes: int, what: str) -> bytes:
        """The plain bytes. Raises: IntegrityError."""
        if codec == CODEC_RAW:
            plain = bytes(coded)
        elif codec == CODEC_ZSTD:
            plain = self._unpack(coded, plain_bytes, what)
        else:
            raise IntegrityError(f"cannot read {what}", detail=f"It names the unknown codec {codec}.")
        if len(plain) != plain_bytes:
            raise IntegrityError(
                f"cannot read {what}",
                detail=f"It holds {len(plain)} bytes where {plain_bytes} were promised.",
            )
        return plain

    def decompress_into(self, codec: int, coded: Buffer, target: memoryview, what: str) -> None:
        """
        Fill `target`, exactly, with the plain bytes; allocates nothing of its size. Raises: IntegrityError.
        """
        if codec == CODEC_RAW and len(coded) == len(target):
            target[:] = coded
            return
        if codec != CODEC_ZSTD:
            raise IntegrityError(f"cannot read {what}", detail=f"Its codec {codec} or its length is wrong.")
        try:
            with self._decompressor.stream_reader(coded, read_across_frames=False) as reader:
                filled = 0
                while filled < len(target) and (count := reader.readinto(target[filled:])):
                    filled += count
                surplus = reader.read(1)
        except zstandard.ZstdError as error:
            raise IntegrityError(f"cannot read {what}", detail=f"Decompression failed: {error}.") from error
        if filled != len(target) or surplus:
            raise IntegrityError(
                f"cannot read {what}", detail="It holds another number of bytes than promised."
            )

    def _unpack(self, coded: Buffer, plain_bytes: int, what: str) -> bytes:
        try:
            return self._decompressor.decompress(coded, max_output_size=plain_bytes)
        except zstandard.ZstdError as error:
            raise IntegrityError(f"cannot read {what}", detail=f"Decompression failed: {error}.") from error


CODEC = Codec()


class Sealer:
    """Encrypts and opens the frames of one object. Thread-safe."""

    def __init__(self, keys: LineageKeys, name: str, salt: bytes) -> None:
        self._aead = AESGCM(keys.object_key(name, salt))
        self._lineage = keys.lineage.encode() + b"\0"
        self._name = name

    def seal_into(self, frame_number: int, header: bytes, coded: Buffer, target: memoryview) -> None:
        """
        Write ciphertext and tag, which fill `target` exactly; `header` is authenticated with them.
        """
        self._aead.encrypt_into(_nonce(frame_number), coded, self._lineage + header, target)

    def open(self, frame_number: int, header: bytes, sealed: Buffer) -> bytes:
        """
        The coded bytes. Raises: IntegrityError where one bit of them, the header, name or lineage is not
        the sealed one.
        """
        try:
            return self._aead.decrypt(_nonce(frame_number), sealed, self._lineage + header)
        except InvalidTag as error:
            raise self._unauthentic(frame_number) from error

    def open_into(self, frame_number: int, header: bytes, sealed: Buffer, target: memoryview) -> int:
        """`open` into a buffer that is large enough; the number of coded bytes. Raises: IntegrityError."""
        coded_bytes = len(sealed) - TAG_BYTES
        try:
            return self._aead.decrypt_into(
                _nonce(frame_number), sealed, self._lineage + header, target[:coded_bytes]
            )
        except InvalidTag as error:
            raise self._unauthentic(frame_number) from error

    def _unauthentic(self, frame_number: int) -> IntegrityError:
        return IntegrityError(
            f"object {self._name!r} is damaged",
            detail=f"Frame {frame_number} fails its authentication: bytes were changed, lost or swapped.",
            hints=["run `cloudsave verify` to see what else is affected"],
        )


def _nonce(frame_number: int) -> bytes:
    return frame_number.to_bytes(12, "big")
