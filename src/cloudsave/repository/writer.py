"""
Writes a base backup: pieces of files in, frames in packs out, maps and at last the manifest.

A bounded pool of workers takes pieces from a bounded queue. Each worker reads into a buffer of its own (one
frame), drops blocks that are zero or already stored, and seals the frame when it is full: scattered blocks
of many files share frames. Memory = workers x (frame + pack in the making) + the queue + maps of files in
flight.

Invariant: the manifest is put when all packs and maps that it names are durable; before that the backup
does not exist.
Invariant: pin, then list tombs, then list packs, and only then reuse: garbage collection either sees the
pin or the writer sees its tomb. (Checked by exhaustive exploration of a model; decision 0004.)
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from cloudsave.errors import GenerationFenced, IntegrityError, ObjectExists
from cloudsave.kernels.pages import FingerprintKey, fingerprints
from cloudsave.model.item import ContentPiece, Item, Piece
from cloudsave.model.manifest import BackupStatistics, FileEntry, Manifest
from cloudsave.repository.container import Arena, FrameRef
from cloudsave.repository.crypto import ZSTD_LEVEL
from cloudsave.repository.file_maps import FileState, MapWriter, Slot
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.maps import BLOCK_BYTES, Fingerprints
from cloudsave.repository.packs import PACK_BYTES_TARGET, PackBuilder, Stretch
from cloudsave.repository.priors import Priors

FRAME_BYTES = 1 << 20
QUEUE_PIECES_PER_WORKER = 2
PROOF_EVERY_FRAMES = 16
"""Of so many data frames one is opened again and compared before it leaves (all of them with `paranoid`)."""
GENERATION_TRIES_MAX = 100
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """How to write."""

    workers: int
    level: int = ZSTD_LEVEL
    paranoid: bool = False
    pack_bytes: int = PACK_BYTES_TARGET


@dataclass(slots=True)
class _Task:
    piece: Piece
    state: FileState


@dataclass(slots=True)
class _Counts:
    """What `BackupStatistics` tells at the end. Guarded by the writer's lock."""

    bytes_read: int = 0
    bytes_stored: int = 0
    blocks_total: int = 0
    blocks_stored: int = 0
    blocks_zero: int = 0
    blocks_reused: int = 0


@dataclass(slots=True)
class _Worker:
    """What one thread holds: the frame being gathered, and the arena with the pack being built."""

    buffer: memoryview
    arena: Arena
    blocks_used: int = 0
    gathered: list[tuple[FileState, Stretch]] = field(default_factory=list)
    pack: PackBuilder | None = None
    frames: int = 0

    @property
    def room(self) -> int:
        return FRAME_BYTES - self.blocks_used * BLOCK_BYTES


class BackupWriter:
    """One backup being written. Order: open, store..., drain, commit; or abort at any time."""

    def __init__(
        self,
        lineage: Lineage,
        backup_id: str,
        *,
        parent: Manifest | None,
        options: WriterOptions,
        advance: Callable[[int], None],
    ) -> None:
        self.backup_id = backup_id
        self._lineage = lineage
        self._parent = parent
        self._options = options
        self._advance = advance
        self._key = FingerprintKey.from_bytes(lineage.keys.fingerprint_seed(), page_bytes=BLOCK_BYTES)
        self._queue: queue.Queue[_Task | None] = queue.Queue(options.workers * QUEUE_PIECES_PER_WORKER)
        self._lock = threading.Lock()
        self._read = threading.Condition()
        self._unread = 0
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._sequence = itertools.count()
        self._generation = 0
        self._counts = _Counts()
        self._current: FileState | None = None
        self._stopping = False

    # ---- life cycle
    # -------------------------------------------------------------------------------------------

    def open(self) -> int:
        """
        Claim a generation, pin what may be reused, start the workers. Returns the number of adopted packs.
        """
        self._generation = self._claim_generation()
        unfinished = self._unfinished_generations()
        self._lineage.put_record_json(
            f"pins/{self.backup_id}",
            {
                "generation": self._generation,
                "parents": [self._parent.backup_id] if self._parent else [],
                "adopts": unfinished,
                "created_utc": self._lineage.clock.now().isoformat(timespec="seconds"),
            },
        )
        condemned = self._lineage.condemned()
        prefix = self._lineage.root + "packs/"
        sizes = {info.name[len(prefix) :]: info.size_bytes for info in self._lineage.store.list(prefix)}
        usable = {name: size for name, size in sizes.items() if f"packs/{name}" not in condemned}
        self._priors = Priors(self._lineage, self._parent, usable, condemned)
        self._maps = MapWriter(self._lineage, generation=self._generation)
        wanted = {f"{generation:08x}" for generation in unfinished}
        adopted = self._priors.adopt(
            [(n, s) for n, s in sorted(usable.items()) if n.partition("-")[0] in wanted]
        )
        for number in range(self._options.workers):
            thread = threading.Thread(target=self._work, name=f"backup-worker-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return adopted

    def store(self, piece: Piece) -> None:
        """Take a piece; all pieces of a file come one after the other. Blocks while the queue is full."""
        state = self._current
        if state is None or state.item.path != piece.item.path:
            self._close_current()
            state = self._current = self._new_state(piece.item)
        with self._lock:
            state.pending += 1
        with self._read:
            self._unread += 1
        self._submit(_Task(piece, state))

    def store_content(self, item: Item, content: bytes) -> None:
        """A whole small file whose bytes are at hand."""
        self.store(ContentPiece(replace(item, size_bytes=len(content)), content))

    def add_entry(self, item: Item) -> None:
        """A directory, link or file without content."""
        self._maps.add_entry(_entry(item))

    def settle(self) -> None:
        """Wait until all pieces given so far have been read (their frames may still be open)."""
        self._close_current()
        with self._read:
            while self._unread:
                self._raise_error()
                self._read.wait(POLL_SECONDS)
        self._raise_error()

    def drain(self) -> None:
        """Wait until all that was given is durable in packs."""
        self._close_current()
        for _ in self._threads:
            self._submit(None)
        for thread in self._threads:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
        self._raise_error()
        self._threads = []

    def commit(self, draft: Manifest) -> Manifest:
        """
        Put the manifest: `draft` completed with files, maps, packs and counts. The backup exists from here
        on.

        Raises: GenerationFenced where this backup was revoked in the meantime.
        """
        with self._lock:
            self._maps.flush()
        counts = self._counts
        statistics = BackupStatistics(
            seconds=(draft.finished_us - draft.started_us) / 1e6,
            bytes_read=counts.bytes_read,
            bytes_stored=counts.bytes_stored + self._maps.bytes_stored,
            blocks_total=counts.blocks_total,
            blocks_stored=counts.blocks_stored,
            blocks_zero=counts.blocks_zero,
            blocks_reused=counts.blocks_reused,
        )
        manifest = self._maps.complete(replace(draft, statistics=statistics))
        try:
            self._lineage.put_manifest(manifest)
        except ObjectExists as error:
            raise GenerationFenced(
                f"backup {self.backup_id!r} was revoked while it was written",
                detail="Garbage collection took it for dead and reserved its name.",
                hints=["run the backup again; was this process suspended for a long time?"],
            ) from error
        return manifest

    def abort(self) -> None:
        """Stop the workers; nothing is committed. Harmless at any time."""
        self._stopping = True
        for thread in self._threads:
            thread.join()
        self._threads = []

    # ---- before the first piece
    # -------------------------------------------------------------------------------

    def _claim_generation(self) -> int:
        prefix = self._lineage.root + "generations/"
        taken = [int(info.name[len(prefix) :], 16) for info in self._lineage.store.list(prefix)]
        following = max(taken, default=0) + 1
        for generation in range(following, following + GENERATION_TRIES_MAX):
            try:
                self._lineage.put_record_json(f"generations/{generation:08x}", {"backup": self.backup_id})
            except ObjectExists:
                continue
            return generation
        raise GenerationFenced("could not claim a writer generation: others are faster", hints=["try again"])

    def _unfinished_generations(self) -> list[int]:
        """Generations of pins whose backup was neither committed nor revoked."""
        decided = self._lineage.decided_backup_ids()
        prefix = self._lineage.root + "pins/"
        pinned = [info.name[len(prefix) :] for info in self._lineage.store.list(prefix)]
        generations = []
        for backup_id in pinned:
            if backup_id in decided:
                continue
            try:
                generations.append(int(self._lineage.get_record_json(f"pins/{backup_id}")["generation"]))
            except IntegrityError:
                # Only what that backup had stored is lost to us; the pin itself still counts for collectors.
                continue
        return generations

    def _new_state(self, item: Item) -> FileState:
        return FileState(item, *self._priors.find(item.path))

    def _close_current(self) -> None:
        state, self._current = self._current, None
        if state is None:
            return
        with self._lock:
            state.closed = True
            self._finish_if_complete(state)

    # ---- workers
    # ----------------------------------------------------------------------------------------------

    def _submit(self, task: _Task | None) -> None:
        while True:
            self._raise_error()
            try:
                self._queue.put(task, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        # Room for what lies behind the mark at which a pack is full: a frame, and a usual trailer.
        arena = Arena(self._options.pack_bytes + 2 * FRAME_BYTES)
        worker = _Worker(memoryview(bytearray(FRAME_BYTES)), arena)
        try:
            while not self._stopping:
                try:
                    task = self._queue.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if task is None:
                    self._seal(worker)
                    self._close_pack(worker)
                    return
                self._take(worker, task)
                with self._read:
                    self._unread -= 1
                    self._read.notify_all()
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits
            self._error = self._error or error
            self._stopping = True

    def _take(self, worker: _Worker, task: _Task) -> None:
        piece, done, short = task.piece, 0, False
        while done < piece.length and not self._stopping:
            want = min(worker.room, piece.length - done)
            begin = worker.blocks_used * BLOCK_BYTES
            got = piece.read_into(worker.buffer[begin : begin + want], offset=done)
            if got:
                self._gather(worker, task.state, piece.offset + done, got)
                self._advance(got)
            done += got
            if worker.room == 0:
                self._seal(worker)
            if got < want:
                short = True
                break
        if self._stopping:
            return
        with self._lock:
            task.state.pending -= 1
            task.state.shrank = task.state.shrank or short
            self._finish_if_complete(task.state)

    def _gather(self, worker: _Worker, state: FileState, offset: int, got: int) -> None:
        """
        `got` bytes of `state` from `offset` stand in the buffer behind what is gathered: keep what is new.
        """
        begin, count = worker.blocks_used * BLOCK_BYTES, -(-got // BLOCK_BYTES)
        worker.buffer[begin + got : begin + count * BLOCK_BYTES] = bytes(count * BLOCK_BYTES - got)
        pages = worker.buffer[begin : begin + count * BLOCK_BYTES]
        prints = np.empty(count, np.uint64)
        zero = fingerprints(pages, page_bytes=BLOCK_BYTES, key=self._key, out=prints).astype(bool)
        block = offset // BLOCK_BYTES
        placement = state.match(block, prints, zero)
        keep = placement.keep
        kept = int(keep.sum())
        if 0 < kept < count:
            rows = np.frombuffer(pages, np.uint8).reshape(count, BLOCK_BYTES)
            rows[:kept] = rows[keep]
        stretches = self._stretches(state.item.path, block, prints, keep, worker.blocks_used)
        worker.gathered += [(state, stretch) for stretch in stretches]
        worker.blocks_used += kept
        with self._lock:
            state.note(block, offset + got, prints, placement)
            state.pending += len(stretches)
            counts = self._counts
            counts.bytes_read += got
            counts.blocks_total += count
            counts.blocks_stored += kept
            counts.blocks_zero += placement.zero_blocks
            counts.blocks_reused += placement.reused_blocks

    @staticmethod
    def _stretches(
        path: str,
        block: int,
        prints: Fingerprints,
        keep: np.ndarray[tuple[int], np.dtype[np.bool_]],
        used: int,
    ) -> list[Stretch]:
        """Runs of kept blocks, with their places in the frame."""
        places = np.flatnonzero(keep)
        if not len(places):
            return []
        if len(places) == len(keep):
            return [Stretch(path, block, len(keep), used * BLOCK_BYTES, prints)]
        stretches = []
        for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
            first, count = int(run[0]), len(run)
            stretches.append(
                Stretch(path, block + first, count, used * BLOCK_BYTES, prints[first : first + count])
            )
            used += count
        return stretches

    def _seal(self, worker: _Worker) -> None:
        """Turn what is gathered into a frame, and put the pack when it is full."""
        if not worker.blocks_used:
            return
        if worker.pack is None:
            name = f"{self._generation:08x}-{next(self._sequence):08x}"
            worker.pack = PackBuilder.open(
                self._lineage.keys,
                name,
                clock=self._lineage.clock,
                level=self._options.level,
                bytes_target=self._options.pack_bytes,
                arena=worker.arena,
            )
        proof = self._options.paranoid or worker.frames % PROOF_EVERY_FRAMES == 0
        plain = worker.buffer[: worker.blocks_used * BLOCK_BYTES]
        frame = worker.pack.add(plain, [stretch for _, stretch in worker.gathered], proof=proof)
        gathered, worker.gathered, worker.blocks_used = worker.gathered, [], 0
        worker.frames += 1
        self._place(worker.pack.name, frame, gathered)
        if worker.pack.is_full:
            self._close_pack(worker)

    def _place(self, pack: str, frame: FrameRef, gathered: list[tuple[FileState, Stretch]]) -> None:
        with self._lock:
            for state, stretch in gathered:
                state.slots.append(Slot(stretch.block, stretch.count, pack, frame, stretch.frame_offset))
                state.pending -= 1
                self._finish_if_complete(state)

    def _close_pack(self, worker: _Worker) -> None:
        if worker.pack is None:
            return
        stored = worker.pack.put(self._lineage.store)
        worker.pack = None
        with self._lock:
            self._counts.bytes_stored += stored

    def _finish_if_complete(self, state: FileState) -> None:
        """With the lock held: a file whose last block has its place gets its map."""
        if state.closed and state.pending == 0 and not state.finished:
            state.finished = True
            self._maps.add_file(state, _entry(state.item))


def _entry(item: Item) -> FileEntry:
    return FileEntry(
        path=item.path,
        kind=item.kind,
        mode=item.mode,
        modified_us=item.modified_us,
        page_bytes=item.page_bytes,
        link_target=item.link_target,
        outside=item.outside,
    )
