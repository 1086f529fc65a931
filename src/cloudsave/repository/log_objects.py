"""
Log objects: a sealed stretch of log with an index of its commits.

The name carries what a listing must tell: `logs/<branch>/<group>/<first>-<last>-<commit first>-<commit
last>`, all but the branch as 16 (group: 8) lower-case hex digits; group = first >> 28; the instants are
microseconds since 1970 of the earliest and the latest commit, 0 where there is none. Frame 0 is the index,
the other frames are the log bytes in order.

    index frame
    0    4    u32 length of the JSON head
    4    ..   JSON head: branch, first, last, record_first, record_last, records_end, complete_until_us,
              commits (count), restore_points ([offset, end offset, instant, name] each),
              changes (absent or null: not noted; else seen_from, groups (count), blocks (count)),
              padding_bytes (absent: 0; so many bytes at the end of the stretch are not there)
    ..   ..   four arrays of `commits` 64-bit integers: offset, end offset, instant, transaction id
    ..   ..   `groups` rows of five u32: space, database, object, kind, count of blocks
    ..   ..   `blocks` u32: of each group, ascending, the first block and the steps to the following ones

Source: docs/repository_format.md; decision 0005.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from cloudsave.clock import Clock
from cloudsave.errors import IntegrityError
from cloudsave.model.changes import CHANGE_TYPE, LogChanges, groups_of
from cloudsave.model.log import Commits, LogIndex, LogSegment, RestorePoint
from cloudsave.repository.container import (
    FRAME_HEADER,
    HEADER_BYTES,
    ContainerReader,
    ContainerWriter,
    Kind,
    arena_of_thread,
    read_frames,
)
from cloudsave.repository.crypto import LineageKeys
from cloudsave.store.api import Buffer, ObjectInfo

GROUP_SHIFT = 28
"""A listing of one group covers 256 MiB of log."""
INDEX_READ_BYTES = 64 << 10
"""First guess of what holds the index; a larger one takes a second read."""
GROUP_TYPE = ("space", "database", "object", "kind", "count")
"""Columns of a group of changes."""


def log_object_name(lineage: str, segment: LogSegment) -> str:
    """Full name of a log object."""
    return (
        f"{group_prefix(lineage, segment.branch, segment.first)}{segment.first:016x}-{segment.last:016x}"
        f"-{segment.commit_first_us:016x}-{segment.commit_last_us:016x}"
    )


def group_prefix(lineage: str, branch: str, offset: int) -> str:
    """Prefix of the log objects that begin near `offset`."""
    return f"lineages/{lineage}/logs/{branch}/{offset >> GROUP_SHIFT:08x}/"


def parse_log_object_name(info: ObjectInfo) -> LogSegment | None:
    """The segment that a listed object holds, or None where the name is not that of a log object."""
    parts = info.name.split("/")
    numbers = parts[-1].split("-")
    if len(parts) != 6 or len(numbers) != 4 or any(len(number) != 16 for number in numbers):
        return None
    try:
        first, last, commit_first_us, commit_last_us = (int(number, 16) for number in numbers)
    except ValueError:
        return None
    if last <= first:
        return None
    return LogSegment(parts[3], first, last, commit_first_us, commit_last_us, info.size_bytes)


def write_log_object(
    keys: LineageKeys, segment: LogSegment, log: Sequence[Buffer], index: LogIndex, *, clock: Clock
) -> Sequence[Buffer]:
    """
    A log object, in the calling thread's arena. Every frame is opened and compared before it leaves.
    """
    name = log_object_name(keys.lineage, segment)
    writer = ContainerWriter(keys, name, Kind.LOG, clock=clock, arena=arena_of_thread())
    writer.add(_encode_index(segment, index), proof=True)
    joined = log[0] if len(log) == 1 else b"".join(log)
    view = memoryview(joined)
    if len(view) != segment.last - segment.first - index.padding_bytes:
        raise ValueError("log bytes do not fill the segment")
    writer.add_blob(view)
    return writer.finish()


def read_log_object(keys: LineageKeys, segment: LogSegment, content: Buffer) -> bytes:
    """The log bytes, all checked, without padding. Raises: IntegrityError."""
    name = log_object_name(keys.lineage, segment)
    frames = read_frames(keys, name, Kind.LOG, content)
    wanted = segment.last - segment.first - _decode_index(name, segment, frames[0]).padding_bytes
    log = b"".join(frames[1:])
    if len(log) != wanted:
        raise IntegrityError(
            f"object {name!r} is damaged",
            detail=f"It holds {len(log)} bytes of log; its name and index promise {wanted}.",
        )
    return log


def index_bytes_needed(head: Buffer) -> int:
    """How many bytes from the begin of the object hold the whole index frame. Raises: IntegrityError."""
    try:
        _, _, sealed_bytes, _, _ = FRAME_HEADER.unpack_from(head, HEADER_BYTES)
    except struct.error as error:
        raise IntegrityError("log object is damaged", detail="It ends within its header.") from error
    return int(HEADER_BYTES + FRAME_HEADER.size + sealed_bytes)


def read_log_index(keys: LineageKeys, segment: LogSegment, head: Buffer) -> LogIndex:
    """The index from the first bytes of an object. Raises: IntegrityError."""
    name = log_object_name(keys.lineage, segment)
    view = memoryview(head)
    plain, _ = ContainerReader(keys, name, Kind.LOG, view).open(view[HEADER_BYTES:], number=0)
    return _decode_index(name, segment, plain)


def _encode_index(segment: LogSegment, index: LogIndex) -> bytes:
    described, columns = _encode_changes(index.changes)
    head = json.dumps(
        {
            "branch": segment.branch,
            "first": segment.first,
            "last": segment.last,
            "record_first": index.record_first,
            "record_last": index.record_last,
            "records_end": index.records_end,
            "complete_until_us": index.complete_until_us,
            "commits": len(index.commits),
            "restore_points": [[p.offset, p.end_offset, p.instant_us, p.name] for p in index.restore_points],
            "changes": described,
        }
        | ({"padding_bytes": index.padding_bytes} if index.padding_bytes else {})
    ).encode()
    commits = index.commits.rows.astype("<i8", copy=False).tobytes()
    return struct.pack("<I", len(head)) + head + commits + columns


def _encode_changes(changes: LogChanges | None) -> tuple[dict[str, int] | None, bytes]:
    """What the head says of them, and the columns. Steps between blocks compress far better than blocks."""
    if changes is None:
        return None, b""
    groups, steps = [], []
    for key, kind, blocks in groups_of(changes.rows):
        groups.append((*key, kind, len(blocks)))
        steps.append(np.diff(blocks, prepend=np.uint32(0)))
    table = np.array(groups, "<u4").reshape(len(groups), len(GROUP_TYPE))
    flat = np.concatenate(steps) if steps else np.empty(0, np.uint32)
    described = {"seen_from": changes.seen_from, "groups": len(groups), "blocks": len(flat)}
    return described, table.tobytes() + flat.astype("<u4", copy=False).tobytes()


def _decode_changes(described: dict[str, int] | None, plain: bytes, offset: int) -> LogChanges | None:
    """Raises: ValueError, KeyError, TypeError where they are malformed."""
    if described is None:
        return None
    count = described["groups"]
    table = np.frombuffer(plain, "<u4", count * len(GROUP_TYPE), offset).reshape(count, len(GROUP_TYPE))
    steps = np.frombuffer(plain, "<u4", described["blocks"], offset + table.nbytes)
    counts = table[:, -1].astype(np.int64)
    ends = counts.cumsum()
    if (int(ends[-1]) if count else 0) != len(steps) or bool((counts == 0).any()):
        raise ValueError("groups of changes do not hold the blocks")
    rows = np.empty(len(steps), CHANGE_TYPE)
    for column, name in enumerate(GROUP_TYPE[:-1]):
        rows[name] = np.repeat(table[:, column], counts)
    sums = np.cumsum(steps, dtype=np.uint64)
    before = np.concatenate(([np.uint64(0)], sums[ends[:-1] - 1])) if count else sums
    rows["block"] = sums - np.repeat(before, counts)
    return LogChanges(described["seen_from"], rows)


def _decode_index(name: str, segment: LogSegment, plain: bytes) -> LogIndex:
    try:
        (length,) = struct.unpack_from("<I", plain)
        head: dict[str, Any] = json.loads(plain[4 : 4 + length])
        count = head["commits"]
        columns = np.frombuffer(plain, "<i8", 4 * count, 4 + length).reshape(4, count)
        points = tuple(RestorePoint(*point) for point in head["restore_points"])
        changes = _decode_changes(head.get("changes"), plain, 4 + length + columns.nbytes)
        index = LogIndex(
            commits=Commits(columns.astype(np.int64, copy=False)),
            restore_points=points,
            record_first=None if head["record_first"] is None else _integer(head, "record_first"),
            record_last=None if head["record_last"] is None else _integer(head, "record_last"),
            records_end=_integer(head, "records_end"),
            complete_until_us=_integer(head, "complete_until_us"),
            changes=changes,
            padding_bytes=_integer(head, "padding_bytes") if "padding_bytes" in head else 0,
        )
        named = (head["branch"], head["first"], head["last"])
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError, struct.error) as error:
        raise IntegrityError(f"object {name!r} is damaged", detail="Its index is malformed.") from error
    if named != (segment.branch, segment.first, segment.last):
        raise IntegrityError(f"object {name!r} is damaged", detail="Its index names another stretch of log.")
    return index


def _integer(head: dict[str, Any], name: str) -> int:
    """A field of the head. Raises: TypeError, KeyError."""
    if type(head[name]) is not int:
        raise TypeError(f"{name} is no integer")
    return int(head[name])
