"""
The one container of all sealed objects: packs, maps, manifests, log objects and records.

    offset  size  field
    0       4     magic "CSV1"
    4       1     kind (Kind)
    5       3     zero
    8       24    salt of the object's key
    32      ..    frames, each: header (16 bytes), then `sealed bytes` of AES-256-GCM ciphertext with its tag
    -120    8     u64 offset of the index frame (0: none)
    -112    4     u32 number of frames
    -108    4     zero
    -104    32    BLAKE3 of all bytes before this field
    -72     64    Ed25519 signature over "cloudsave v1 " + object name + 0x00 + the BLAKE3, or zeros
    -8      8     magic "CSV1END\\n"

    frame header
    0       4     u32 frame number, counting from 0
    4       4     u32 plain bytes
    8       4     u32 sealed bytes (with the tag)
    12      1     codec: 0 raw, 1 zstd
    13      1     1: this is the last frame of the object, else 0
    14      2     zero

All integers are little-endian. A frame is opened with nonce = its number (12 bytes, big-endian) and
associated data = lineage id, 0x00, frame header. Validity: magic at both ends, the BLAKE3 agrees, each
opened frame authenticates, the last frame and no other one is marked as last (one without keys can cut frames
off and make the BLAKE3 right again, but not the mark), a signature that is not zeros is valid. One who has
no keys can check the BLAKE3, and with the lineage's public key the signature.

Source: docs/repository_format.md; decision 0003.
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from blake3 import blake3

from cloudsave.clock import Clock
from cloudsave.errors import FormatUnsupported, IntegrityError
from cloudsave.repository.crypto import (
    CODEC,
    FRAME_PLAIN_BYTES_MAX,
    SALT_BYTES,
    TAG_BYTES,
    ZSTD_LEVEL,
    LineageKeys,
    Sealer,
    signature_is_valid,
)
from cloudsave.store.api import Buffer

MAGIC = b"CSV1"
END_MAGIC = b"CSV1END\n"
HEADER_BYTES = 32
FOOTER_BYTES = 120
FRAME_HEADER = struct.Struct("<IIIBB2x")
_FOOTER = struct.Struct("<QI4x32s64s8s")
_DIGEST_OFFSET = 16
"""Where in the footer the BLAKE3 stands: it covers all before it."""
SCRATCH_BYTES = (1 << 20) + 4096
"""Size that the frames of packs fit in, coded or plain."""
ARENA_BYTES_MIN = 64 << 10
BLOB_FRAME_BYTES = 1 << 20
"""Plain bytes of a frame of a manifest, map or log object."""
REVOCATION_BYTES = HEADER_BYTES + FRAME_HEADER.size + TAG_BYTES + FOOTER_BYTES
"""Size of an object with one empty frame, which no manifest has."""


class Kind(IntEnum):
    """What an object is; stored in its header and authenticated through the name-bound key."""

    PACK = 1
    MAP = 2
    MANIFEST = 3
    LOG = 4
    RECORD = 5


PLAIN_BYTES_MAX = {
    Kind.PACK: 1 << 30,
    Kind.MAP: 1 << 30,
    Kind.MANIFEST: 1 << 30,
    Kind.LOG: 1 << 30,
    Kind.RECORD: 16 << 20,
}
"""Limit: what all frames of an object that is read whole may unfold to: a small one could fill all memory."""


@dataclass(frozen=True, slots=True)
class FrameRef:
    """Where a frame stands in its object."""

    number: int
    offset: int
    sealed_bytes: int
    plain_bytes: int

    @property
    def end(self) -> int:
        """Offset behind the frame."""
        return self.offset + FRAME_HEADER.size + self.sealed_bytes


@dataclass(frozen=True, slots=True)
class Footer:
    """The end of an object, parsed."""

    index_offset: int
    frame_count: int
    digest: bytes
    signature: bytes


class Arena:
    """
    Memory that objects are built in, one after the other, and put from: it begins at a page of memory, so
    that the store can write it around the page cache, and its pages are asked for only once. Grows by
    doubling. Not thread-safe.
    """

    def __init__(self, size_bytes: int = ARENA_BYTES_MIN) -> None:
        self._memory = memoryview(mmap.mmap(-1, size_bytes))

    def room(self, begin: int, length: int) -> memoryview:
        """`length` bytes from `begin` on. What stands before `begin` stays; views given before may not."""
        if begin + length > len(self._memory):
            grown = memoryview(mmap.mmap(-1, max(begin + length, 2 * len(self._memory))))
            grown[:begin] = self._memory[:begin]
            self._memory = grown
        return self._memory[begin : begin + length]


class ContainerWriter:
    """
    Builds one object, frame by frame, in an arena: of its own, or one that no other object is in.

    Not thread-safe. The object's name must be known, since the key depends on it.
    """

    def __init__(
        self,
        keys: LineageKeys,
        name: str,
        kind: Kind,
        *,
        clock: Clock,
        level: int = ZSTD_LEVEL,
        arena: Arena | None = None,
    ) -> None:
        self.name = name
        self._keys = keys
        self._level = level
        salt = clock.random_bytes(SALT_BYTES)
        self._sealer = Sealer(keys, name, salt)
        self._hash = blake3()
        self._arena = arena or Arena()
        self.size_bytes = 0
        self.frame_count = 0
        self._complete = False
        self._append(MAGIC + bytes([kind, 0, 0, 0]) + salt)

    def add_blob(self, content: Buffer) -> None:
        """Seal `content` as the object's last frames, each proved; at least one, so that one is the last."""
        view = memoryview(content)
        begin = 0
        while len(view) - begin > BLOB_FRAME_BYTES:
            self.add(view[begin : begin + BLOB_FRAME_BYTES], proof=True)
            begin += BLOB_FRAME_BYTES
        self.add(view[begin:], proof=True, last=True)

    def add(self, plain: Buffer, *, proof: bool, last: bool = False) -> FrameRef:
        """
        Seal `plain` as the next frame; with `proof`, open it again at once and compare before it may leave.
        """
        if self._complete or len(plain) > FRAME_PLAIN_BYTES_MAX:
            raise ValueError(f"no room for a frame of {len(plain)} bytes")
        number = self.frame_count
        codec, coded = CODEC.compress(plain, self._level)
        header = FRAME_HEADER.pack(number, len(plain), len(coded) + TAG_BYTES, codec, last)
        self._complete = last
        reference = FrameRef(number, self.size_bytes, len(coded) + TAG_BYTES, len(plain))
        self._append(header)
        sealed = self._arena.room(self.size_bytes, reference.sealed_bytes)
        self._sealer.seal_into(number, header, coded, sealed)
        if proof:
            self._prove(number, header, sealed, plain)
        self._hash.update(sealed)
        self.size_bytes = reference.end
        self.frame_count += 1
        return reference

    def _append(self, content: bytes) -> None:
        self._arena.room(self.size_bytes, len(content))[:] = content
        self._hash.update(content)
        self.size_bytes += len(content)

    def _prove(self, number: int, header: bytes, sealed: memoryview, plain: Buffer) -> None:
        _, plain_bytes, _, codec, _ = FRAME_HEADER.unpack(header)
        coded_buffer, plain_buffer = scratch_of_thread().room(len(sealed), plain_bytes)
        coded_bytes = self._sealer.open_into(number, header, sealed, coded_buffer)
        again = plain_buffer[:plain_bytes]
        CODEC.decompress_into(codec, coded_buffer[:coded_bytes], again, "a frame just written")
        # Not by `!=`: comparing memoryviews goes element by element.
        if not np.array_equal(np.frombuffer(again, np.uint8), np.frombuffer(plain, np.uint8)):
            raise IntegrityError(
                f"frame {number} of {self.name!r} does not decode to what was encoded",
                detail="The encoder or this machine's memory is faulty; nothing was stored.",
                hints=["test the memory of this machine"],
            )

    def finish(self, *, index: FrameRef | None = None, sign: bool = False) -> Sequence[Buffer]:
        """
        Close the object, whose last frame was added as such; its bytes, valid until the arena is used again.
        """
        if not self._complete:
            raise ValueError("no frame is the last one")
        self._append(struct.pack("<QI4x", index.offset if index else 0, self.frame_count))
        digest = self._hash.digest()
        signature = bytes(64)
        if sign:
            signature = self._keys.signing_key().sign(_signed_message(self.name, digest))
        self._append(digest + signature + END_MAGIC)
        return [self._arena.room(0, self.size_bytes)]


def _signed_message(name: str, digest: bytes) -> bytes:
    return b"cloudsave v1 " + name.encode() + b"\0" + digest


def parse_footer(name: str, footer: Buffer) -> Footer:
    """The last FOOTER_BYTES of an object. Raises: IntegrityError."""
    if len(footer) != FOOTER_BYTES:
        raise _damaged(name, f"it is too short ({len(footer)} bytes of footer)")
    index_offset, frame_count, digest, signature, magic = _FOOTER.unpack(footer)
    if magic != END_MAGIC:
        raise _damaged(name, "its end is missing (truncated, or not an object of cloudsave)")
    return Footer(index_offset, frame_count, digest, signature)


def check_digest(name: str, content: Buffer, *, public_key: bytes | None = None) -> Footer:
    """
    Check a whole object without keys: both ends, the BLAKE3, and with `public_key` the signature.

    Raises: IntegrityError.
    """
    view = memoryview(content)
    if len(view) < HEADER_BYTES + FOOTER_BYTES or bytes(view[:4]) != MAGIC:
        raise _damaged(name, "its begin is missing (truncated, or not an object of cloudsave)")
    footer = parse_footer(name, view[-FOOTER_BYTES:])
    if blake3(view[: len(view) - FOOTER_BYTES + _DIGEST_OFFSET]).digest() != footer.digest:
        raise _damaged(name, "its checksum is wrong")
    if public_key is not None and not signature_is_valid(
        public_key, footer.signature, _signed_message(name, footer.digest)
    ):
        raise _damaged(name, "its signature is not that of this lineage")
    return footer


class ContainerReader:
    """Opens the frames of one object. Thread-safe."""

    def __init__(self, keys: LineageKeys, name: str, kind: Kind, header: Buffer) -> None:
        if len(header) < HEADER_BYTES or bytes(header[:3]) != MAGIC[:3]:
            raise _damaged(name, "its begin is missing (truncated, or not an object of cloudsave)")
        if bytes(header[:4]) != MAGIC:
            raise FormatUnsupported(
                f"cannot read object {name!r}: a newer format", hints=["use a newer release of cloudsave"]
            )
        if header[4] != kind:
            raise _damaged(name, f"it is of kind {header[4]}, not {int(kind)}")
        self._name = name
        self._sealer = Sealer(keys, name, bytes(header[8:HEADER_BYTES]))

    def open(self, frame: Buffer, *, number: int, last: bool | None = None) -> tuple[bytes, int]:
        """
        The plain bytes of the frame that stands at the begin of `frame`, and its length with the header.

        Args:
            last: Whether it must be the object's last frame; None: either.
        Raises: IntegrityError.
        """
        header, sealed = self._frame(frame, number, last)
        _, plain_bytes, _, codec, _ = FRAME_HEADER.unpack(header)
        coded = self._sealer.open(number, header, sealed)
        what = f"frame {number} of {self._name!r}"
        plain = CODEC.decompress(codec, coded, plain_bytes=plain_bytes, what=what)
        return plain, FRAME_HEADER.size + len(sealed)

    def open_into(self, frame: Buffer, *, number: int, scratch: FrameScratch) -> memoryview:
        """
        Like `open`, but the plain bytes stand in `scratch`, until it is used again. Raises: IntegrityError.
        """
        header, sealed = self._frame(frame, number, None)
        _, plain_bytes, _, codec, _ = FRAME_HEADER.unpack(header)
        coded_buffer, plain_buffer = scratch.room(len(sealed), plain_bytes)
        coded_bytes = self._sealer.open_into(number, header, sealed, coded_buffer)
        plain = plain_buffer[:plain_bytes]
        CODEC.decompress_into(codec, coded_buffer[:coded_bytes], plain, f"frame {number} of {self._name!r}")
        return plain

    def _frame(self, frame: Buffer, number: int, last: bool | None) -> tuple[bytes, memoryview]:
        """Header and sealed bytes of the frame at the begin of `frame`, its header checked."""
        view = memoryview(frame)
        if len(view) < FRAME_HEADER.size:
            raise _damaged(self._name, f"it ends before frame {number}")
        header = bytes(view[: FRAME_HEADER.size])
        stated, plain_bytes, sealed_bytes, _, is_last = FRAME_HEADER.unpack(header)
        if (
            stated != number
            or max(plain_bytes, sealed_bytes) > FRAME_PLAIN_BYTES_MAX
            or sealed_bytes < TAG_BYTES
        ):
            raise _damaged(self._name, f"the header of frame {number} is wrong")
        end = FRAME_HEADER.size + sealed_bytes
        if len(view) < end:
            raise _damaged(self._name, f"it ends within frame {number}")
        if last is not None and is_last != last:
            raise _damaged(self._name, f"frames behind frame {number} were cut off or added")
        return header, view[FRAME_HEADER.size : end]


class FrameScratch:
    """
    Buffers to open frames in, one after the other; for one thread.

    They begin at a multiple of the machine's page size, so that what stands in them can be written around
    the page cache.
    """

    def __init__(self) -> None:
        self._plain = memoryview(mmap.mmap(-1, SCRATCH_BYTES))
        self._coded = memoryview(mmap.mmap(-1, SCRATCH_BYTES))

    def room(self, coded_bytes: int, plain_bytes: int) -> tuple[memoryview, memoryview]:
        """
        The two buffers, at least that large (both sizes have been checked against FRAME_PLAIN_BYTES_MAX).
        """
        if len(self._coded) < coded_bytes:
            self._coded = memoryview(mmap.mmap(-1, coded_bytes))
        if len(self._plain) < plain_bytes:
            self._plain = memoryview(mmap.mmap(-1, plain_bytes))
        return self._coded, self._plain


_of_thread = threading.local()


def arena_of_thread() -> Arena:
    """The calling thread's arena for objects that are built and put in one go."""
    if not hasattr(_of_thread, "arena"):
        _of_thread.arena = Arena()
    found: Arena = _of_thread.arena
    return found


def scratch_of_thread() -> FrameScratch:
    """The scratch of the calling thread."""
    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = FrameScratch()
    found: FrameScratch = _of_thread.scratch
    return found


def read_frames(
    keys: LineageKeys, name: str, kind: Kind, content: Buffer, *, public_key: bytes | None = None
) -> list[bytes]:
    """
    All frames of a whole object, every byte checked. With `public_key` it must be signed; without, a
    signature is checked where there is one.

    Raises: IntegrityError.
    """
    footer = check_digest(name, content, public_key=public_key)
    if public_key is None and any(footer.signature):
        check_digest(name, content, public_key=keys.public_key())
    view = memoryview(content)
    reader = ContainerReader(keys, name, kind, view[:HEADER_BYTES])
    frames: list[bytes] = []
    offset = HEADER_BYTES
    end = len(view) - FOOTER_BYTES
    room = PLAIN_BYTES_MAX[kind]
    for number in range(footer.frame_count):
        last = number == footer.frame_count - 1
        plain, length = reader.open(view[offset:end], number=number, last=last)
        room -= len(plain)
        if room < 0:
            raise _damaged(name, f"it unfolds to more than {PLAIN_BYTES_MAX[kind]} bytes")
        frames.append(plain)
        offset += length
    if not frames or offset != end:
        raise _damaged(name, f"its {footer.frame_count} frames do not fill it")
    return frames


def _damaged(name: str, why: str) -> IntegrityError:
    return IntegrityError(
        f"object {name!r} is damaged",
        detail=f"The object cannot be read: {why}.",
        hints=["run `cloudsave verify` to see what else is affected"],
    )
