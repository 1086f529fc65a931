"""All that a repository holds of one system identity: backups, log, and the records around them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cloudsave.clock import Clock
from cloudsave.errors import IntegrityError, LogConflict, ObjectExists, ObjectMissing, UnknownBackup
from cloudsave.model.identity import SourceIdentity
from cloudsave.model.log import LogHole, LogIndex, LogSegment
from cloudsave.model.manifest import Manifest
from cloudsave.model.position import Position
from cloudsave.repository.container import (
    PLAIN_BYTES_MAX,
    REVOCATION_BYTES,
    ContainerWriter,
    Kind,
    arena_of_thread,
    read_frames,
)
from cloudsave.repository.crypto import LineageKeys
from cloudsave.repository.log_objects import (
    INDEX_READ_BYTES,
    group_prefix,
    index_bytes_needed,
    log_object_name,
    parse_log_object_name,
    read_log_index,
    read_log_object,
    write_log_object,
)
from cloudsave.repository.manifests import decode_manifest, decode_references, encode_manifest
from cloudsave.repository.parallel import map_ahead, reads_in_flight
from cloudsave.repository.plain import read_plain, write_plain
from cloudsave.store.api import Buffer, ObjectInfo, ObjectStore

IDENTITY_FIELDS = ("engine", "system_identifier", "source", "first_seen_utc", "public_key")


@dataclass(frozen=True, slots=True)
class LineageIdentity:
    """Whose backups these are; stored in the clear, so that a repository can be understood without keys."""

    engine: str
    system_identifier: str
    source: str
    """The name of the source when the lineage was first seen."""
    first_seen_utc: str
    public_key: bytes
    """Ed25519 key that the lineage's manifests are signed with."""


class Lineage:
    """One lineage. Thread-safe where its store is."""

    def __init__(self, store: ObjectStore, keys: LineageKeys, *, clock: Clock) -> None:
        self.id = keys.lineage
        self.store = store
        self.keys = keys
        self.clock = clock
        self.root = f"lineages/{self.id}/"

    # ---- identity
    # ---------------------------------------------------------------------------------------------

    def record_identity(self, identity: SourceIdentity, *, source: str) -> None:
        """Note whose lineage this is; only the first call leaves something."""
        if identity.lineage != self.id:
            raise ValueError("identity belongs to another lineage")
        try:
            self.store.get(self.root + "identity")
        except ObjectMissing:
            self._put_identity(identity, source)

    def _put_identity(self, identity: SourceIdentity, source: str) -> None:
        record = {
            "engine": identity.engine,
            "system_identifier": identity.system_identifier,
            "source": source,
            "first_seen_utc": self.clock.now().isoformat(timespec="seconds"),
            "public_key": self.keys.public_key().hex(),
        }
        try:
            self.store.put(self.root + "identity", [write_plain(record)])
        except ObjectExists:
            return

    def identity(self) -> LineageIdentity | None:
        """What `record_identity` noted; None where the lineage is not stored yet. Raises: IntegrityError."""
        try:
            read = read_plain(self.store.get(self.root + "identity"))
        except ObjectMissing:
            return None
        try:
            if read is None or read.intact is False:
                raise ValueError("its digest is wrong, or it is no JSON object")
            record = {name: str(read.fields[name]) for name in IDENTITY_FIELDS}
            key = bytes.fromhex(record.pop("public_key"))
            found = LineageIdentity(**record, public_key=key)
        except (ValueError, KeyError) as error:
            raise IntegrityError(
                f"identity of lineage {self.id!r} is damaged",
                hints=[
                    f"a restore needs it for the name alone: give {self.id} in place of the source's name",
                    "restore the object from a copy of the repository, or remove it: a backup writes it anew",
                ],
            ) from error
        if found.public_key != self.keys.public_key():
            raise IntegrityError(
                f"identity of lineage {self.id!r} names a foreign signing key",
                hints=["was the repository tampered with?"],
            )
        return found

    # ---- log
    # --------------------------------------------------------------------------------------------------

    def put_log(self, segment: LogSegment, parts: Sequence[Buffer], index: LogIndex) -> None:
        """
        Store a stretch of log; durable when it returns. The same stretch again is accepted when its bytes
        are the same.

        Raises: LogConflict, StoreError.
        """
        name = log_object_name(self.id, segment)
        content = write_log_object(self.keys, segment, parts, index, clock=self.clock)
        try:
            self.store.put(name, content)
        except ObjectExists as error:
            if self.read_log(segment) != b"".join(parts):
                raise _log_conflict(segment) from error

    def logs(self) -> list[LogSegment]:
        """
        All stored log, from object names alone, by (branch, first, longest first). Stretches may overlap.
        """
        return _sorted_segments(self.store.list(self.root + "logs/"))

    def logs_near(self, branch: str, offset: int) -> list[LogSegment]:
        """Stored log that begins in the same 256 MiB of `branch` as `offset`: one short listing."""
        return _sorted_segments(self.store.list(group_prefix(self.id, branch, offset)))

    def log_index(self, segment: LogSegment) -> LogIndex:
        """The commits of a stored stretch: one or two small reads. Raises: ObjectMissing, IntegrityError."""
        name = log_object_name(self.id, segment)
        length = min(INDEX_READ_BYTES, segment.size_bytes or INDEX_READ_BYTES)
        head = (
            self.store.get_range(name, offset=0, length=length)
            if segment.size_bytes
            else self.store.get(name)
        )
        if len(head) < (needed := index_bytes_needed(head)):
            head = self.store.get_range(name, offset=0, length=needed)
        return read_log_index(self.keys, segment, head)

    def read_log(self, segment: LogSegment) -> bytes:
        """The log bytes of a stored stretch, every one checked. Raises: ObjectMissing, IntegrityError."""
        return read_log_object(self.keys, segment, self.store.get(log_object_name(self.id, segment)))

    def put_history(self, branch: str, content: bytes) -> None:
        """Store the raw history file of a branch. Raises: LogConflict where another one is stored."""
        try:
            self._put_record(f"logs/{branch}/history", content)
        except ObjectExists as error:
            if self._get_record(f"logs/{branch}/history") != content:
                raise LogConflict(
                    f"history of branch {branch} differs from the stored one",
                    detail="Another server with the same system identifier has used this branch number.",
                    hints=["does a restored copy of the source write to the same repository?"],
                ) from error

    def histories(self) -> dict[str, bytes]:
        """Raw history files by branch. Raises: IntegrityError where one is damaged."""
        return {branch: self.history(branch) for branch in self.branches_with_history()}

    def readable_histories(self) -> dict[str, bytes]:
        """Raw history files by branch, but for damaged ones."""
        found = {}
        for branch in self.branches_with_history():
            with suppress(IntegrityError):
                found[branch] = self.history(branch)
        return found

    def branches_with_history(self) -> list[str]:
        """The branches whose history files are stored."""
        names = [info.name.split("/") for info in self.store.list(self.root + "logs/")]
        return [parts[3] for parts in names if len(parts) == 5 and parts[4] == "history"]

    def history(self, branch: str) -> bytes:
        """The raw history file of a branch. Raises: ObjectMissing, IntegrityError."""
        return self._get_record(f"logs/{branch}/history")

    def claim_origin(self, begin: Position, origin: bytes) -> None:
        """
        Record with which bytes of log a branch begins, at `begin`: they tell it from every other branch of
        the same number. The same bytes again, or more or fewer of them, change nothing. Raises: LogConflict.
        """
        name = f"logs/{begin.branch}/origin"
        try:
            self.put_record_json(name, {"offset": begin.offset, "bytes": origin.hex()})
        except ObjectExists as error:
            claimed = self.origin(begin.branch)
            if claimed is None or claimed[0] != begin.offset or not _same_begin(claimed[1], origin):
                raise LogConflict(
                    f"branch {begin.branch} of the server is not the one that is stored",
                    detail="It begins otherwise: two servers with the same system identifier were promoted to"
                    " the same branch number.",
                    hints=[
                        "which of them goes on? Stop the other one, or capture it into another repository",
                        "the other one can be captured here after it was made anew from the stored one",
                    ],
                ) from error

    def origin(self, branch: str) -> tuple[int, bytes] | None:
        """
        Where a branch begins, and with which bytes; None where nobody has claimed it. Raises: IntegrityError.
        """
        name = f"logs/{branch}/origin"
        try:
            fields = self.get_record_json(name)
            return int(fields["offset"]), bytes.fromhex(fields["bytes"])
        except ObjectMissing:
            return None
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise IntegrityError(f"record {self.root + name!r} is malformed") from error

    def put_hole(self, hole: LogHole) -> None:
        """Record a hole and its cause; recording it again changes nothing."""
        fields = {"first": hole.first, "last": hole.last, "cause": hole.cause}
        if hole.expired:
            fields["expired"] = True
        try:
            self._put_record(hole_name(hole), json.dumps(fields).encode())
        except ObjectExists:
            return

    def holes(self) -> list[LogHole]:
        """Recorded holes."""
        found = []
        for info in self.store.list(self.root + "logs/"):
            parts = info.name.split("/")
            if len(parts) == 6 and parts[4] == "holes":
                fields = self.get_record_json("/".join(parts[2:]))
                try:
                    first, last, cause = int(fields["first"]), int(fields["last"]), str(fields["cause"])
                    hole = LogHole(parts[3], first, last, cause, fields.get("expired") is True)
                except (KeyError, ValueError, TypeError, OverflowError) as error:
                    raise IntegrityError(f"record {info.name!r} is malformed") from error
                found.append(hole)
        return found

    # ---- base backups
    # -----------------------------------------------------------------------------------------

    def backup_ids(self) -> list[str]:
        """Ids of committed backups, oldest first (ids begin with the instant of their start)."""
        infos = list(self.store.list(self.root + "backups/"))
        flags = map_ahead(self._is_revocation, infos, in_flight=reads_in_flight(self.store))
        return sorted(
            info.name.rpartition("/")[2] for info, revoked in zip(infos, flags, strict=True) if not revoked
        )

    def decided_backup_ids(self) -> set[str]:
        """Ids of backups that are committed or revoked; all others may still be on their way."""
        return {info.name.rpartition("/")[2] for info in self.store.list(self.root + "backups/")}

    def revoke(self, backup_id: str) -> None:
        """
        Take the name of a backup that was never committed, or is expired, so that its writer, should it still
        live, cannot commit it (again). Raises: ObjectExists where it is committed or revoked.
        """
        self.put_blob(f"backups/{backup_id}", Kind.RECORD, b"")

    def _is_revocation(self, info: ObjectInfo) -> bool:
        """
        Whether an object stands where a manifest could, to say that there will be none. A damaged one is
        taken for a manifest, which cannot be read then: one object more or less stops nothing else.
        """
        if info.size_bytes != REVOCATION_BYTES:
            return False
        try:
            return self.get_blob(info.name[len(self.root) :], Kind.RECORD) == b""
        except IntegrityError:
            return False
        except ObjectMissing:
            return True

    def manifest_name(self, backup_id: str) -> str:
        """Object name of a manifest: the commit point of a backup."""
        return f"{self.root}backups/{backup_id}"

    def manifest(self, backup_id: str) -> Manifest:
        """A manifest, its signature checked. Raises: UnknownBackup, IntegrityError."""
        return decode_manifest(self._manifest_text(backup_id), f"manifest of backup {backup_id!r}")

    def _manifest_text(self, backup_id: str) -> bytes:
        name = self.manifest_name(backup_id)
        try:
            content = self.store.get(name)
        except ObjectMissing as error:
            raise _unknown(backup_id) from error
        if len(content) == REVOCATION_BYTES and read_frames(self.keys, name, Kind.RECORD, content) == [b""]:
            raise _unknown(backup_id)
        frames = read_frames(self.keys, name, Kind.MANIFEST, content, public_key=self.keys.public_key())
        return b"".join(frames)

    def references(self, backup_id: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """
        The packs and the maps that a backup names, without its file table. Raises: UnknownBackup,
        IntegrityError.
        """
        return decode_references(self._manifest_text(backup_id), f"manifest of backup {backup_id!r}")

    def put_manifest(self, manifest: Manifest) -> None:
        """Seal, sign and put a manifest. Raises: ObjectExists where the id is taken (or was revoked)."""
        self.put_blob(f"backups/{manifest.backup_id}", Kind.MANIFEST, encode_manifest(manifest), sign=True)

    def put_blob(self, name: str, kind: Kind, content: Buffer, *, sign: bool = False) -> int:
        """
        Seal `content` under `name` (relative to the lineage) and store it; its stored size. Raises:
        ObjectExists.
        """
        writer = ContainerWriter(self.keys, self.root + name, kind, clock=self.clock, arena=arena_of_thread())
        writer.add_blob(content)
        self.store.put(self.root + name, writer.finish(sign=sign))
        return writer.size_bytes

    def get_blob(self, name: str, kind: Kind) -> bytes:
        """The content that `put_blob` stored. Raises: ObjectMissing, IntegrityError."""
        return b"".join(read_frames(self.keys, self.root + name, kind, self.store.get(self.root + name)))

    def put_record_json(self, name: str, fields: Mapping[str, Any]) -> None:
        """Seal a small JSON record (pin, generation). Raises: ObjectExists."""
        self._put_record(name, json.dumps(fields, sort_keys=True).encode())

    def get_record_json(self, name: str) -> dict[str, Any]:
        """A record that `put_record_json` stored. Raises: ObjectMissing, IntegrityError."""
        try:
            return dict(json.loads(self._get_record(name)))
        except (ValueError, TypeError, RecursionError) as error:
            raise IntegrityError(f"record {self.root + name!r} is malformed") from error

    def _put_record(self, name: str, content: bytes) -> None:
        if len(content) > PLAIN_BYTES_MAX[Kind.RECORD]:
            raise IntegrityError(f"record {name!r} is too large", detail=f"It has {len(content)} bytes.")
        self.put_blob(name, Kind.RECORD, content)

    def _get_record(self, name: str) -> bytes:
        return self.get_blob(name, Kind.RECORD)


def hole_name(hole: LogHole) -> str:
    """Name of the record of a hole, relative to the lineage."""
    return f"logs/{hole.branch}/holes/{hole.first:016x}-{hole.last:016x}"


def _sorted_segments(listing: Iterator[ObjectInfo]) -> list[LogSegment]:
    found = (parse_log_object_name(info) for info in listing)
    return sorted(
        (segment for segment in found if segment is not None),
        key=lambda segment: (segment.branch, segment.first, -segment.last),
    )


def _same_begin(one: bytes, other: bytes) -> bool:
    common = min(len(one), len(other))
    return common > 0 and one[:common] == other[:common]


def _unknown(backup_id: str) -> UnknownBackup:
    return UnknownBackup(
        f"backup {backup_id!r} is not in the repository", hints=["`cloudsave list` shows the backups"]
    )


def _log_conflict(segment: LogSegment) -> LogConflict:
    return LogConflict(
        f"log of branch {segment.branch} differs from the stored log",
        detail=f"Bytes {segment.first:#x} to {segment.last:#x} are stored with other content.",
        hints=["does a restored copy of the source write to the same repository?"],
    )
