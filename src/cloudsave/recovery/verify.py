"""
Check what is stored of a lineage against what its manifests and object names promise.

Quick: every manifest's signature, every map and index; the records (`verify_records`); every pack and log
object by existence, size and footer; that maps stay within their packs; that each backup has the log which
makes it consistent; holes.
With `read_all`: every byte of every pack and log object, digest and authentication of each frame. A byte that
authenticates is the byte that was written, pages included: those were checked when they were read. Log is
followed from record to record, and compared where it is stored twice (`verify_log`).
Packs and maps that no manifest names are those of unfinished backups: they count for nothing yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import IntegrityError, ObjectMissing, UnknownBackup
from cloudsave.model.finding import Finding, Severity
from cloudsave.model.history import Ancestry
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import LogHole, LogSegment
from cloudsave.model.manifest import Manifest
from cloudsave.recovery.verify_log import read_log_through
from cloudsave.recovery.verify_records import LISTED_MAX, in_parallel, verify_identity, verify_records
from cloudsave.repository.container import (
    FOOTER_BYTES,
    FRAME_HEADER,
    HEADER_BYTES,
    ContainerReader,
    Kind,
    check_digest,
    parse_footer,
)
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.log_objects import log_object_name
from cloudsave.repository.maps import ZERO_FRAME, MapObject, decode_map_object
from cloudsave.repository.prints import StoredPrints
from cloudsave.repository.priors import expand_segment
from cloudsave.telemetry import NoProgress, Progress


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What to check."""

    backup_id: str | None = None
    """Only this backup and the log that it needs; None: everything."""
    read_all: bool = False


@dataclass(slots=True)
class _Damage:
    """Objects that are wrong, by what is wrong with them."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, name: str) -> None:
        """Note an object."""
        self.found.setdefault(what, []).append(name)

    def findings(self, subject: str, hint: str) -> Iterator[Finding]:
        """One finding for each kind of damage."""
        for what, names in self.found.items():
            more = f" and {len(names) - LISTED_MAX} more" if len(names) > LISTED_MAX else ""
            yield Finding(Severity.PROBLEM, subject, f"{what}: {', '.join(names[:LISTED_MAX])}{more}", hint)


def has_problem(findings: Iterable[Finding]) -> bool:
    """Whether anything stored is wrong."""
    return any(one.severity is Severity.PROBLEM for one in findings)


def verify_lineage(
    lineage: Lineage, dialect: Dialect, request: VerifyRequest, *, progress: Progress | None = None
) -> list[Finding]:
    """Check; never raises for damage, that is what it reports. Raises: StoreError, UnknownBackup."""
    run = _Verification(lineage, dialect, request, progress or NoProgress())
    return [*run.records(), *run.backups(), *run.log()]


class _Verification:
    def __init__(
        self, lineage: Lineage, dialect: Dialect, request: VerifyRequest, progress: Progress
    ) -> None:
        self._lineage = lineage
        self._dialect = dialect
        self._request = request
        self._progress = progress
        self._sizes = {
            info.name[len(lineage.root) :]: info.size_bytes for info in lineage.store.list(lineage.root)
        }
        packs = [name for name in self._sizes if name.startswith("packs/")]
        self._pack_sizes = {name.removeprefix("packs/"): self._sizes[name] for name in packs}
        self._stored = StoredPrints(lineage, self._pack_sizes)
        self._manifests: list[Manifest] = []
        self._expired: set[str] = set()
        """Backups that went while they were verified."""

    def records(self) -> Iterator[Finding]:
        """The small objects: for a single backup, only those that a restore of it reads."""
        yield from verify_identity(self._lineage)
        single = self._request.backup_id is not None
        names = [name for name in self._sizes if not single or name.endswith("/history")]
        yield from verify_records(self._lineage, self._dialect, names)

    # ---- base backups

    def backups(self) -> Iterator[Finding]:
        """Manifests, maps and packs."""
        wanted = self._request.backup_id
        for backup_id in [wanted] if wanted is not None else self._lineage.backup_ids():
            try:
                self._manifests.append(self._lineage.manifest(backup_id))
            except UnknownBackup:
                if wanted is not None:
                    raise
                continue  # It was expired since it was listed.
            except IntegrityError as error:
                hint = "was the repository tampered with? restore the object from a copy of the repository"
                yield Finding(Severity.PROBLEM, f"backup {backup_id}", str(error.message), hint)
        if not self._manifests:
            hint = "`cloudsave backup NAME` takes one"
            yield Finding(Severity.PROBLEM, "backups", "there is no backup that could be restored", hint)
        packs = self._check_packs()
        maps = self._check_maps()
        for manifest in self._manifests:
            yield from self._backup_findings(manifest, packs, maps)

    def _check_packs(self) -> dict[str, str]:
        """For each pack that a manifest names, what is wrong with it ("" where nothing is)."""
        names = sorted({name for manifest in self._manifests for name in manifest.packs})
        total = sum(self._sizes.get(f"packs/{name}", 0) for name in names)
        self._progress.begin("verify packs", bytes_total=total)
        checked = dict(zip(names, in_parallel(self._check_pack, names), strict=True))
        self._progress.finish()
        return checked

    def _check_pack(self, pack: str) -> str:
        size_bytes = self._sizes.get(f"packs/{pack}")
        if size_bytes is None:
            return "packs are missing"
        if size_bytes < HEADER_BYTES + FOOTER_BYTES:
            return "packs are truncated"
        name = f"{self._lineage.root}packs/{pack}"
        try:
            if self._request.read_all:
                self._open_all_frames(name)
            else:
                self._check_end(name, size_bytes)
        except IntegrityError:
            return "packs are damaged"
        except ObjectMissing:
            return "packs are missing"
        self._progress.advance(size_bytes)
        return ""

    def _check_end(self, name: str, size_bytes: int) -> None:
        """An object that was cut off or added to has no footer at its end. Raises: IntegrityError."""
        offset = max(0, size_bytes - FOOTER_BYTES)
        footer = self._lineage.store.get_range(name, offset=offset, length=min(size_bytes, FOOTER_BYTES))
        parse_footer(name, footer)

    def _open_all_frames(self, name: str) -> None:
        """Open frame by frame: a pack may hold far more plain bytes than its own. Raises: IntegrityError."""
        content = memoryview(self._lineage.store.get(name))
        footer = check_digest(name, content)
        if any(footer.signature):
            check_digest(name, content, public_key=self._lineage.keys.public_key())
        reader = ContainerReader(self._lineage.keys, name, Kind.PACK, content[:HEADER_BYTES])
        offset, end = HEADER_BYTES, len(content) - FOOTER_BYTES
        for number in range(footer.frame_count):
            _, length = reader.open(content[offset:end], number=number, last=number == footer.frame_count - 1)
            offset += length
        if offset != end:
            raise IntegrityError(f"object {name!r} is damaged", detail="Its frames do not fill it.")

    def _check_maps(self) -> dict[str, MapObject | str]:
        """For each map that a manifest names, the map, or what is wrong with it."""
        names = sorted({name for manifest in self._manifests for name in manifest.maps})
        return dict(zip(names, in_parallel(self._check_map, names), strict=True))

    def _check_map(self, map_id: str) -> MapObject | str:
        try:
            found = decode_map_object(self._lineage.get_blob(f"maps/{map_id}", Kind.MAP), f"map {map_id!r}")
        except IntegrityError:
            return "maps are damaged"
        except ObjectMissing:
            return "maps are missing"
        limits = [self._sizes.get(f"packs/{pack}", 0) - FOOTER_BYTES for pack in found.packs]
        for segment in found.segments:
            frames = segment.frames
            ends = frames["offset"] + frames["sealed"] + FRAME_HEADER.size
            for number, limit in enumerate(limits):
                mine = ends[frames["pack"] == number]
                if len(mine) and int(mine.max()) > limit:
                    return "maps point beyond the end of their packs"
        return found

    def _damage_of(
        self, manifest: Manifest, packs: dict[str, str], maps: dict[str, MapObject | str]
    ) -> _Damage:
        """What is wrong with the objects of a backup."""
        damage = _Damage()
        for pack in manifest.packs:
            if packs[pack]:
                damage.add(packs[pack], pack)
        for map_id in manifest.maps:
            found = maps[map_id]
            if isinstance(found, str):
                damage.add(found, map_id)
        for entry in manifest.files:
            found = maps[manifest.maps[entry.map_index]] if entry.map_index >= 0 else ""
            if isinstance(found, str):
                continue
            if entry.map_ordinal >= len(found.segments):
                damage.add("files have no map", entry.path)
            elif found.segments[entry.map_ordinal].file_bytes != entry.size_bytes:
                damage.add("files differ in size from their map", entry.path)
            elif self._request.read_all and self._strays(entry.path, found, entry.map_ordinal):
                damage.add("maps name blocks of other files, or other blocks", entry.path)
        return damage

    def _backup_findings(
        self, manifest: Manifest, packs: dict[str, str], maps: dict[str, MapObject | str]
    ) -> Iterator[Finding]:
        damage = self._damage_of(manifest, packs, maps)
        subject = f"backup {manifest.backup_id}"
        hint = "files in them cannot be restored from this backup; take a new full backup now"
        problems = list(damage.findings(subject, hint))
        if problems and manifest.backup_id not in self._lineage.backup_ids():
            self._expired.add(manifest.backup_id)
            yield Finding(Severity.NOTICE, subject, "was expired while it was verified")
            return
        yield from problems
        if not problems:
            depth = "every byte read" if self._request.read_all else "objects, sizes and maps"
            yield Finding(Severity.OK, subject, f"{len(manifest.packs)} packs, {depth}")
        if manifest.corrupt_pages:
            yield Finding(
                Severity.WARNING,
                subject,
                f"{len(manifest.corrupt_pages)} pages were already damaged in the source",
                "`cloudsave show` lists them",
            )

    def _strays(self, path: str, found: MapObject, ordinal: int) -> bool:
        """
        Whether a map names a block that its pack knows as another one. It says nothing of the time at which
        the block was like this: only a comparison with the source does (`backup --read-all`).
        """
        file = expand_segment(found.segments[ordinal], found.packs, self._pack_sizes)
        held = np.flatnonzero(file.frame != ZERO_FRAME)
        stored = self._stored.find(path, file.places, file.frame[held], file.offset[held])
        return bool((stored.known & ~(stored.of_file & (stored.block == held))).any())

    # ---- log

    def log(self) -> Iterator[Finding]:
        """Log objects, holes, and whether each backup has its log."""
        ancestry = self._ancestry()
        segments = self._lineage.logs()
        wanted = self._segments_to_check(segments, ancestry)
        self._progress.begin("verify log", bytes_total=sum(one.size_bytes for one in wanted))
        damage = _Damage()
        sound = []
        for segment, what in zip(wanted, in_parallel(self._check_segment, wanted), strict=True):
            if what and not self._is_expired(segment):
                damage.add(what, f"{segment.branch} {segment.first:#x}-{segment.last:#x}")
            elif what:
                continue
            else:
                sound.append(segment)
        self._progress.finish()
        yield from damage.findings("log", "targets in and after it cannot be reached; take a new backup now")
        if self._request.read_all and self._manifests:
            yield from read_log_through(
                self._lineage,
                self._dialect,
                sound,
                log_file_bytes=self._manifests[-1].log_file_bytes,
                progress=self._progress,
            )
        ledger = Ledger(sound)
        for manifest in self._manifests:
            if manifest.backup_id not in self._expired:
                yield from self._log_of_backup(manifest, ledger, ancestry)
        if self._request.backup_id is None:
            yield from self._continuity(ledger, ancestry)

    def _ancestry(self) -> Ancestry:
        """What is known of it; a damaged history has been told of with the records."""
        ancestors = {}
        for branch, raw in self._lineage.readable_histories().items():
            with suppress(IntegrityError):
                ancestors[branch] = self._dialect.parse_history(raw)
        return Ancestry(ancestors)

    def _known_holes(self) -> list[LogHole]:
        """Recorded holes; a damaged record has been told of with the records."""
        try:
            return self._lineage.holes()
        except IntegrityError:
            return []

    def _is_expired(self, segment: LogSegment) -> bool:
        """Whether a stretch that was listed has been removed on purpose since."""
        expired = [hole for hole in self._known_holes() if hole.expired and hole.branch == segment.branch]
        return bool(_explaining(expired, segment.first, segment.last))

    def _segments_to_check(self, segments: list[LogSegment], ancestry: Ancestry) -> list[LogSegment]:
        if self._request.backup_id is None:
            return segments
        ledger = Ledger(segments)
        wanted = []
        for manifest in self._manifests:
            path = ancestry.lineage_of(manifest.stop.branch)
            cover = ledger.cover(path, manifest.log_begin, manifest.stop.offset)
            wanted += [extent.segment for extent in cover.extents]
        return wanted

    def _check_segment(self, segment: LogSegment) -> str:
        try:
            if self._request.read_all:
                self._lineage.read_log(segment)
            else:
                self._check_end(log_object_name(self._lineage.id, segment), segment.size_bytes)
            self._lineage.log_index(segment)
        except IntegrityError:
            return "log objects are damaged"
        except ObjectMissing:
            return "log objects are missing"
        self._progress.advance(segment.size_bytes)
        return ""

    def _log_of_backup(self, manifest: Manifest, ledger: Ledger, ancestry: Ancestry) -> Iterator[Finding]:
        subject = f"log of backup {manifest.backup_id}"
        path = ancestry.lineage_of(manifest.stop.branch)
        cover = ledger.cover(path, manifest.log_begin, manifest.stop.offset)
        if not cover.complete:
            yield Finding(
                Severity.PROBLEM,
                subject,
                f"log from {cover.end:#x} of branch {cover.branch} on is missing: it cannot be used",
                "take a new backup now",
            )
        else:
            yield Finding(Severity.OK, subject, "the log that makes it consistent is stored")

    def _continuity(self, ledger: Ledger, ancestry: Ancestry) -> Iterator[Finding]:
        """Holes on each branch; one that capture did not record means that stored log was lost."""
        recorded = self._known_holes()
        first_branch = self._dialect.first_branch(self._lineage.id.partition("-")[2])
        for branch in ledger.branches():
            if branch not in ancestry.ancestors and branch != first_branch:
                yield Finding(
                    Severity.PROBLEM,
                    f"branch {branch}",
                    "its history file is not stored, so that none of its log can be used",
                    "`cloudsave logs capture` stores it while the source has it",
                )
            ranges = ledger.ranges(branch)
            for (_, end), (begin, _) in itertools.pairwise(ranges):
                explaining = _explaining([hole for hole in recorded if hole.branch == branch], end, begin)
                why = explaining[0].cause if explaining else "no cause is known"
                severity = Severity.WARNING if explaining else Severity.PROBLEM
                yield Finding(
                    Severity.NOTICE if explaining and all(one.expired for one in explaining) else severity,
                    f"branch {branch}",
                    f"log has a hole from {end:#x} to {begin:#x} ({why})",
                    "targets in the hole cannot be reached; after it only from backups taken after it",
                )
            size = sum(end - begin for begin, end in ranges)
            yield Finding(Severity.OK, f"branch {branch}", f"{size} bytes of log in {len(ranges)} ranges")


def _explaining(holes: Sequence[LogHole], first: int, last: int) -> list[LogHole]:
    """Why log from `first` to `last` is not there; none where records, which may touch, leave some out."""
    explaining = []
    for hole in sorted(holes, key=lambda one: one.first):
        if hole.first <= first < hole.last:
            explaining.append(hole)
            first = hole.last
    return explaining if first >= last else []
