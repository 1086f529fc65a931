"""
Feeds a server that replays log: a spool of log files, filled ahead and in order, and the tiny shell script
that the server runs for each file (starting Python for each would cost more than the replay).

The script's exit code is what keeps a server from losing data in silence: 1, "there is no such file", only
for names that the plan proves to be beyond its end and for history files that are not stored; 255, which
makes the server stop, for every trouble: a feeder that died, an error, a name that cannot be answered.

The server gets a file by a second name for the same bytes where both are on one file system: it waits while
the script runs, and copying would be a tenth of the replay. Neither side ever writes into such a file: the
feeder puts new ones, and a server leaves a branch by a copy. (Source: XLogInitNewTimeline(), xlog.c.)

    spool/ready/NAME     a whole log or history file, put there by rename
    spool/absent/NAME    proved not to exist
    spool/wanted/NAME    the server asks for it
    spool/error          what went wrong
    spool/beat           a number that changes while the feeder lives
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.dialect_api import Dialect
from cloudsave.model.ledger import Extent, Stretch
from cloudsave.model.log import LogSegment
from cloudsave.recovery.plan import RecoveryPlan

AHEAD_FILES_MAX = 32
AHEAD_BYTES_MAX = 512 << 20
"""Limit: log files that wait in the spool; at least one, whatever its size."""
KEPT_BEHIND_FILES = 2
"""Files that stay after the server asked for a later one: it asks for the last one again."""
RECORD_LOOKAHEAD_BYTES = 1 << 14
"""So much of the next file is looked at with each, for records that cross into it."""
READERS = 3
READERS_DISTANT = 16
"""Where each object takes a round trip over a network."""
READY_MODE = 0o600
"""Of a file that the server takes over as it is, by a second name, without a copy of its bytes."""
CACHE_BYTES_MAX = 64 << 20
POLL_SECONDS = 0.05
QUICK_POLLS = 10
"""So often the script looks again at once: mostly a file is nearly ready."""
BEAT_EVERY_POLLS = 10
DEAD_AFTER_SECONDS = 60
"""The script gives up when the beat has not changed for so long."""

_SCRIPT = """\
#!/bin/sh
# Read by a shell whose arguments are NAME and DESTINATION.
# Exit codes: 0 done; 1 proved absent; 255 any trouble.
spool={spool}
case $1 in '' | *[!0-9A-Za-z._]*) exit 255 ;; esac
last= same=0 quick=0
while :; do
    echo > "$spool/wanted/$1" || exit 255
    if [ -f "$spool/ready/$1" ]; then
        ln -f "$spool/ready/$1" "$2" 2> /dev/null && exit 0
        rm -f "$2"
        cp "$spool/ready/$1" "$2" && exit 0
        [ -f "$spool/ready/$1" ] && exit 255
    fi
    [ -f "$spool/absent/$1" ] && exit 1
    [ -f "$spool/error" ] && {{ cat "$spool/error" >&2; exit 255; }}
    read -r beat < "$spool/beat" || beat=
    if [ "$beat" = "$last" ]; then same=$((same + 1)); else last=$beat same=0; fi
    [ "$same" -ge {polls_max} ] && {{ echo "cloudsave does not feed $spool any more" >&2; exit 255; }}
    if [ "$quick" -lt {quick_polls} ]; then quick=$((quick + 1)); sleep 0.01; else sleep 0.05; fi
done
"""


@dataclass(frozen=True, slots=True)
class LogFile:
    """One file as the server asks for it: bytes [begin, begin + log_file_bytes) of the path."""

    name: str
    begin: int


@dataclass(frozen=True, slots=True)
class ReplayLog:
    """The log of a plan, cut into files."""

    files: tuple[LogFile, ...]
    extents: tuple[Extent, ...]
    file_bytes: int

    def compose(self, file: LogFile, read: Callable[[LogSegment], bytes], *, beyond: int = 0) -> bytearray:
        """
        The bytes of one file, and of `beyond` bytes after it; zeros, which end replay, where the plan needs
        no log (after its end).
        """
        content = bytearray(self.file_bytes + beyond)
        end = file.begin + len(content)
        at = bisect_right(self.extents, file.begin, key=lambda extent: extent.last)
        while at < len(self.extents) and self.extents[at].first < end:
            extent = self.extents[at]
            first, last = max(extent.first, file.begin), min(extent.last, end)
            log = memoryview(read(extent.segment))
            base = extent.segment.first
            content[first - file.begin : last - file.begin] = log[first - base : last - base]
            at += 1
        return content


def replay_log(plan: RecoveryPlan, dialect: Dialect) -> ReplayLog:
    """
    The files of a plan. A file that holds a switch point bears the name of the later branch, as on a server.

    Source: XLogFileReadAnyTLI(), src/backend/access/transam/xlogrecovery.c: the newest timeline that began in
    or before the file is asked for first.
    """
    size = plan.backup.log_file_bytes
    begin = plan.log_begin - plan.log_begin % size
    files = []
    for offset in range(begin, max(plan.stop.log_end, plan.log_begin + 1), size):
        branch = _branch_of_file(plan.path, offset + size)
        files.append(LogFile(dialect.log_file_name(branch, offset, log_file_bytes=size), offset))
    return ReplayLog(tuple(files), plan.extents, size)


def _branch_of_file(path: tuple[Stretch, ...], file_end: int) -> str:
    return next(branch for branch, begin, _ in reversed(path) if begin < file_end)


class SegmentCache:
    """Reads stored segments; those read last are kept, since a segment may reach into the next file."""

    def __init__(self, read: Callable[[LogSegment], bytes]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._kept: OrderedDict[LogSegment, bytes] = OrderedDict()
        self._bytes = 0

    def __call__(self, segment: LogSegment) -> bytes:
        """The log bytes of a segment. Raises: IntegrityError, StoreError."""
        with self._lock:
            found = self._kept.get(segment)
        if found is None:
            found = self._read(segment)
            with self._lock:
                if segment not in self._kept:
                    self._kept[segment] = found
                    self._bytes += len(found)
                while self._bytes > CACHE_BYTES_MAX:
                    _, dropped = self._kept.popitem(last=False)
                    self._bytes -= len(dropped)
        return found


class Feeder:
    """
    Fills a spool directory until closed. Order: open, then (by the server) fetches, then close.

    The spool belongs to the user that runs the server; the feeder may be root.
    """

    def __init__(
        self,
        log: ReplayLog,
        read: Callable[[LogSegment], bytes],
        *,
        spool: Path,
        dialect: Dialect,
        check: Callable[[int, bytearray], None],
        readers: int = READERS,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """
        `check` sees the begin of each log file, its bytes and a little of the next before the server does;
        what it raises stops the server.
        """
        self._log = log
        self._check = check
        self._readers = readers
        self._read = SegmentCache(read)
        self._dialect = dialect
        self._clock = clock
        self.spool = Path(spool).absolute()
        self._numbers = {file.name: number for number, file in enumerate(log.files)}
        ahead = max(1, min(AHEAD_FILES_MAX, AHEAD_BYTES_MAX // log.file_bytes))
        self._ahead = ahead
        self._position = 0
        self._pending: dict[int, Future[None]] = {}
        self._stop = threading.Event()
        self._beats = 0
        self._thread = threading.Thread(target=self._run, name="log-feeder", daemon=True)
        self.error: BaseException | None = None

    def open(self, histories: Mapping[str, bytes], *, uid: int = -1, gid: int = -1) -> None:
        """Make the spool and begin to fill it. `uid`, `gid`: the user of the server, where root feeds it."""
        self._remove_old()
        self.spool.mkdir(mode=0o700, parents=True)
        for name in ("ready", "absent", "wanted"):
            (self.spool / name).mkdir(mode=0o700)
        for branch, content in histories.items():
            (self.spool / "ready" / f"{branch}.history").write_bytes(content)
        self._beat()
        script = _SCRIPT.format(
            spool=shlex.quote(str(self.spool)),
            polls_max=int(DEAD_AFTER_SECONDS / POLL_SECONDS) + QUICK_POLLS,
            quick_polls=QUICK_POLLS,
        )
        (self.spool / "fetch").write_text(script)
        for one in (self.spool, *self.spool.rglob("*")):
            os.chown(one, uid, gid)
        self._thread.start()

    def command(self) -> str:
        """
        The restore command: `%f` the name, `%p` the destination. Whatever goes wrong with the script itself
        (a shell says 2 or 127) must not look like a missing file: every code but 0 and 1 becomes 255.
        """
        script = shlex.quote(str(self.spool / "fetch")).replace("%", "%%")
        return f'(set -- "%f" "%p"; . {script}); rc=$?; [ $rc -le 1 ] || rc=255; exit $rc'

    def position(self) -> int:
        """Offset of the last log file that the server asked for."""
        return self._log.files[self._position].begin if self._log.files else 0

    def close(self) -> None:
        """Stop and remove the spool. Harmless at any time."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        shutil.rmtree(self.spool, ignore_errors=True)

    # ---- the thread

    def _run(self) -> None:
        polls = 0
        with ThreadPoolExecutor(self._readers, thread_name_prefix="log-reader") as pool:
            try:
                while not self._stop.is_set():
                    self._answer()
                    self._fill(pool)
                    if polls % BEAT_EVERY_POLLS == 0:
                        self._beat()
                    polls += 1
                    self._stop.wait(POLL_SECONDS)
            except BaseException as error:  # noqa: BLE001 - told to the server's script and to the restore
                self.error = error
                self._put(self.spool / "error", f"cloudsave could not feed the log: {error}\n".encode())
            for future in self._pending.values():
                future.cancel()

    def _answer(self) -> None:
        """Take note of what the server asks for; it asks again until it is answered."""
        asked = []
        for one in (self.spool / "wanted").iterdir():
            asked_at = one.stat().st_mtime_ns
            one.unlink()
            ready = (self.spool / "ready" / one.name).exists()
            number = self._numbers.get(one.name)
            if number is not None:
                # The server waits for one file at most, the last it asked for; the others have been fetched.
                asked.append((not ready, asked_at, number))
            elif not ready:
                self._put(self.spool / "absent" / one.name, self._proof_of_absence(one.name))
        if asked:
            self._position = max(asked)[2]

    def _proof_of_absence(self, name: str) -> bytes:
        """Why there is no such file. Raises: LookupError where that is not proved."""
        if name.endswith((".history", ".backup", ".partial")):
            return b"not stored\n"
        place = self._dialect.parse_log_file_name(name, log_file_bytes=self._log.file_bytes)
        if place is None or not self._log.files or place.offset <= self._log.files[-1].begin:
            raise LookupError(f"the server asks for {name}, which is not part of the plan")
        return b"beyond the end of the plan\n"

    def _fill(self, pool: ThreadPoolExecutor) -> None:
        first = max(0, self._position - KEPT_BEHIND_FILES)
        last = min(len(self._log.files), self._position + 1 + self._ahead)
        for number in [one for one in self._pending if not first <= one < last]:
            self._drop_done(number)
        for number in range(first, last):
            if number not in self._pending:
                self._pending[number] = pool.submit(self._make, self._log.files[number])
        for future in self._pending.values():
            if future.done() and not future.cancelled():
                future.result()

    def _drop_done(self, number: int) -> None:
        future = self._pending.get(number)
        if future is not None and (future.cancel() or future.done()):
            del self._pending[number]
            (self.spool / "ready" / self._log.files[number].name).unlink(missing_ok=True)

    def _make(self, file: LogFile) -> None:
        content = self._log.compose(file, self._read, beyond=RECORD_LOOKAHEAD_BYTES)
        self._check(file.begin, content)
        del content[self._log.file_bytes :]
        self._put(self.spool / "ready" / file.name, content)

    def _remove_old(self) -> None:
        """
        What a killed run left. A script of its server may still be asking there, so that the directory would
        not become empty: under another name it does.
        """
        old = self.spool.with_name(f"{self.spool.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self.spool.rename(old)
        shutil.rmtree(old, ignore_errors=True)

    def _put(self, place: Path, content: bytes | bytearray) -> None:
        """A file that appears as a whole, readable for the owner of the spool."""
        new = place.with_name(place.name + ".new")
        new.write_bytes(content)
        new.chmod(READY_MODE)
        owner = self.spool.stat()
        os.chown(new, owner.st_uid, owner.st_gid)
        new.replace(place)

    def _beat(self) -> None:
        self._beats += 1
        self._put(self.spool / "beat", f"{self._beats}\n".encode())


def later_fetch_command(program: Sequence[str], source: str) -> str:
    """The restore command of a server that is started later; `program` is how cloudsave is run."""
    words = [*program, "logs", "fetch", source]
    return " ".join(shlex.quote(word).replace("%", "%%") for word in words) + ' "%f" "%p"'
