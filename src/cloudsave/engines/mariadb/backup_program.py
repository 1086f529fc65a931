"""
mariadb-backup as a child process whose stream is read here.

Towards its end the program keeps commits waiting (BACKUP STAGE BLOCK_COMMIT) while it still writes into the
pipe. A thread takes chunks off the pipe; up to then it waits for whoever uses them, afterwards it takes all
there is, so that a slow repository cannot make commits wait.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import tempfile
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cloudsave.clock import Clock
from cloudsave.engines.binlog.address import Address
from cloudsave.engines.mariadb.format_mbstream import (
    END,
    HEAD,
    PAYLOAD_HEAD,
    malformed,
    parse_head,
    parse_path,
    parse_payload_head,
)
from cloudsave.errors import CloudsaveError, EngineError, PermissionMissing

BACKUP_PROGRAMS = ("mariadb-backup", "mariabackup")
WAITING_BYTES_MAX = 32 << 20
"""Limit: chunks that wait to be used; none while commits wait for the program, which has little left then."""
PARALLEL = 2
"""Threads of the program that read."""
END_SECONDS_MAX = 60.0
ERROR_LINES = 12
_PIPE_BYTES = 1 << 20
_BLOCKS_DDL = "BACKUP STAGE BLOCK_DDL"
_BLOCKS_COMMIT = "Acquired locks for BACKUP STAGE BLOCK_COMMIT"
_RELEASES = "Executing BACKUP STAGE END"
_DONE = "completed OK!"
_DENIED = re.compile(r"access denied|missing required privilege", re.IGNORECASE)
_OVERTAKEN = re.compile(r"Was only able to copy log|log block numbers mismatch")
_NOISE = re.compile(r"^(?:\[\d+\] )?\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a file, or its end (`data` None)."""

    path: str
    offset: int
    data: bytearray | None


class BackupProgram:
    """One run. Order: start, chunks to the end, finish; or abort at any time."""

    def __init__(self, program: Path, address: Address, data_directory: str, clock: Clock) -> None:
        self._program = program
        self._address = address
        self._data_directory = data_directory
        self._clock = clock
        self._scratch: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._said: deque[str] = deque(maxlen=ERROR_LINES)
        self._completed = False
        self._state = threading.Condition()
        self._waiting: deque[Chunk | None] = deque()
        """None: the stream has ended."""
        self._waiting_bytes = 0
        self._unlimited = False
        self._stopping = False
        self._error: BaseException | None = None
        self._blocked_at = 0.0
        self.blocked_seconds: float | None = None
        """How long commits waited; None where the program did not tell."""

    def start(self) -> None:
        """Start the program. Raises: EngineError."""
        self._scratch = Path(tempfile.mkdtemp(prefix="cloudsave-"))
        defaults = self._scratch / "client.cnf"
        defaults.touch(mode=0o600)
        defaults.write_text(self._address.for_programs())
        command = [
            str(self._program),
            f"--defaults-file={defaults}",
            "--backup",
            "--stream=mbstream",
            f"--parallel={PARALLEL}",
            f"--datadir={self._data_directory}",
            f"--target-dir={self._scratch / 'target'}",
        ]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/"
            )
        except OSError as error:
            self.abort()
            raise EngineError(
                f"could not run {self._program}", detail=f"{error.strerror or error}."
            ) from error
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        for work, stream in ((self._listen, self._process.stderr), (self._read, self._process.stdout)):
            thread = threading.Thread(target=work, args=(stream,), name="mariadb-backup", daemon=True)
            thread.start()
            self._threads.append(thread)

    def chunks(self) -> Iterator[Chunk]:
        """All that the program sends. Raises: EngineError; what it did wrong is known only by `finish`."""
        while True:
            with self._state:
                while not self._waiting:
                    self._state.wait()
                chunk = self._waiting.popleft()
                self._waiting_bytes -= len(chunk.data) if chunk and chunk.data else 0
                self._state.notify_all()
            if chunk is None:
                break
            yield chunk
        if isinstance(self._error, CloudsaveError):
            self._raise_failure()
            raise self._error
        if self._error is not None:
            raise EngineError("could not read what mariadb-backup sends", detail=f"{self._error}.")

    def finish(self) -> None:
        """See that the program has done what it should. Raises: EngineError."""
        self._raise_failure()
        self.abort()

    def abort(self) -> None:
        """End the program and remove what it needed. Never raises."""
        with self._state:
            self._stopping = True
            self._state.notify_all()
        process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(timeout=END_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for thread in self._threads:
            thread.join()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _raise_failure(self) -> None:
        """Raises: EngineError where the program has failed, by what it said itself."""
        assert self._process is not None
        try:
            status = self._process.wait(timeout=END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            raise EngineError(
                "mariadb-backup does not end", detail=f"It has closed its stream {END_SECONDS_MAX:.0f} s ago."
            ) from None
        self._threads[0].join()
        if status == 0 and self._completed:
            return
        said = "\n".join(self._said) or "It said nothing."
        if any(_DENIED.search(line) for line in self._said):
            raise PermissionMissing(
                "account may not take backups",
                detail=said,
                hints=["cloudsave check prints the rights it needs"],
            )
        if any(_OVERTAKEN.search(line) for line in self._said):
            raise EngineError(
                "server overwrote its redo log before mariadb-backup had read it",
                detail=said,
                hints=["raise innodb_log_file_size, or take backups when less is written"],
            )
        ended = f"was ended by signal {-status}" if status < 0 else f"exited with {status}"
        raise EngineError(f"mariadb-backup {ended}", detail=said)

    # ---- the program's two streams

    def _listen(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode("utf-8", "replace").rstrip()
            if _BLOCKS_DDL in line:
                with self._state:
                    self._unlimited = True
                    self._state.notify_all()
            elif _BLOCKS_COMMIT in line:
                self._blocked_at = self._clock.monotonic()
            elif _RELEASES in line and self._blocked_at:
                self.blocked_seconds = self._clock.monotonic() - self._blocked_at
            self._completed = self._completed or line.endswith(_DONE)
            if text := _NOISE.sub("", line):
                self._said.append(text)

    def _read(self, stream: IO[bytes]) -> None:
        try:
            while (chunk := _next_chunk(stream)) is not None:
                if not self._hand_over(chunk):
                    return
        except BaseException as error:  # noqa: BLE001 - carried to the thread that takes the chunks
            self._error = error
        finally:
            with self._state:
                self._waiting.append(None)
                self._state.notify_all()

    def _hand_over(self, chunk: Chunk) -> bool:
        """Whether somebody will take it."""
        with self._state:
            while self._waiting_bytes > WAITING_BYTES_MAX and not self._unlimited and not self._stopping:
                self._state.wait()
            self._waiting.append(chunk)
            self._waiting_bytes += len(chunk.data) if chunk.data else 0
            self._state.notify_all()
            return not self._stopping


def _next_chunk(stream: IO[bytes]) -> Chunk | None:
    """The next chunk, its checksum found right; None at the end of the stream. Raises: EngineError."""
    first = _exactly(stream, HEAD.size, may_end=True)
    if not first:
        return None
    head = parse_head(first)
    path = parse_path(_exactly(stream, head.path_bytes))
    if head.kind == END:
        return Chunk(path, 0, None)
    payload = parse_payload_head(_exactly(stream, PAYLOAD_HEAD.size))
    data = _exactly(stream, payload.length)
    if zlib.crc32(data) != payload.checksum:
        raise malformed(f"a checksum of {path!r} is wrong")
    return Chunk(path, payload.offset, data)


def _exactly(stream: IO[bytes], count: int, *, may_end: bool = False) -> bytearray:
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        part = stream.readinto(view[got:])  # type: ignore[attr-defined]
        if not part:
            if may_end and not got:
                return bytearray()
            raise malformed("it ends within a chunk")
        got += part
    return data
