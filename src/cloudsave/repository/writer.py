"""
Writes a base backup: pieces of files in, frames in packs out, maps and at last the manifest.

A bounded pool of workers takes pieces from a bounded queue. Each worker reads into a buffer of its own (one
frame), drops blocks that are zero or already stored, and seals the frame when it is full: scattered blocks
of many files share frames. A full pack is put by a thread of its own while its worker goes on with the next
one. Memory = workers x frame + (workers + 1) x pack + the queue + maps of files in flight.

Invariant: the manifest is put when all packs and maps that it names are durable; before that the backup
does not exist.
Invariant: nothing is reused that was not claimed (`claim.py`).
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from cloudsave.errors import GenerationFenced, IntegrityError, ObjectExists
from cloudsave.kernels.pages import FingerprintKey, fingerprints
from cloudsave.model.item import ContentPiece, Item, Piece, is_last
from cloudsave.model.manifest import BackupStatistics, FileEntry, Manifest
from cloudsave.repository.claim import Claim, claim
from cloudsave.repository.container import Arena, FrameRef
from cloudsave.repository.crypto import ZSTD_LEVEL
from cloudsave.repository.file_maps import Blocks, FileState, MapWriter, Slot, runs_of
from cloudsave.repository.head import KEYS, REPOSITORY_OBJECT
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.maps import BLOCK_BYTES, Fingerprints, block_count
from cloudsave.repository.packs import PACK_BYTES_TARGET, PackBuilder, Stretch
from cloudsave.repository.priors import ParentMap, Priors, read_block
from cloudsave.repository.trust import Trust

FRAME_BYTES = 1 << 20
QUEUE_PIECES_PER_WORKER = 2
PUTS_MAX = 64
"""Limit: packs that are put at once; fewer where there are fewer workers, by the memory that packs have."""
PROOF_EVERY_FRAMES = 16
"""Of so many data frames one is opened again and compared before it leaves (all of them with `paranoid`)."""
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """How to write."""

    workers: int
    level: int = ZSTD_LEVEL
    paranoid: bool = False
    pack_bytes: int = PACK_BYTES_TARGET
    workers_now: Callable[[], int] | None = None
    """How many may work at the moment, asked again and again; None: `workers`."""
    renew: Callable[[Iterable[str]], None] | None = None
    """Locks stored objects anew, by their full names; None: the store locks none."""

    @property
    def active(self) -> int:
        """How many may work now."""
        return self.workers_now() if self.workers_now else self.workers


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
class _Reading:
    """Blocks of one piece that were read one behind the other into a frame."""

    spans: list[tuple[int, int]] = field(default_factory=list)
    """[first, end), ascending."""
    blocks: int = 0
    bytes: int = 0
    end_bytes: int = 0

    def add(self, offset: int, got: int) -> None:
        """`got` bytes were read from `offset` of the file; less than whole blocks only at its end."""
        if got:
            first, count = offset // BLOCK_BYTES, block_count(got)
            self.spans.append((first, first + count))
            self.blocks += count
            self.bytes += got
            self.end_bytes = offset + got


@dataclass(slots=True)
class _Worker:
    """What one thread holds: the frame being gathered, and the arena with the pack being built."""

    buffer: memoryview
    arena: Arena | None = None
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
        self._arenas_made = 0
        self._arenas: queue.SimpleQueue[Arena] = queue.SimpleQueue()
        self._putting = ThreadPoolExecutor(PUTS_MAX, thread_name_prefix="backup-put")
        self._sequence = itertools.count()
        self._generation = 0
        self.claimed: Claim | None = None
        """What it may reuse, once open."""
        self._counts = _Counts()
        self._incomplete: dict[str, FileState] = {}
        """Files of which more pieces are to come, by path."""
        self._trust: Trust | None = None
        self.bytes_unread = 0
        """Blocks taken from the parent without being read, so far."""
        self._stopping = False
        self._draining = False

    # ---- life cycle
    # -------------------------------------------------------------------------------------------

    def open(self) -> int:
        """
        Claim a generation, pin what may be reused, start the workers. Returns the number of adopted packs.
        """
        parent = self._parent.backup_id if self._parent else ""
        taken = self.claimed = claim(self._lineage, self.backup_id, parent=parent)
        self._generation, usable, condemned = taken.generation, taken.usable, taken.condemned.objects
        zero_print = np.empty(1, np.uint64)
        fingerprints(bytes(BLOCK_BYTES), page_bytes=BLOCK_BYTES, key=self._key, out=zero_print)
        self._priors = Priors(self._lineage, self._parent, usable, condemned, zero_print=int(zero_print[0]))
        self._maps = MapWriter(self._lineage, generation=self._generation)
        wanted = {f"{generation:08x}" for generation in taken.adopts}
        adopted = self._priors.adopt(
            [(n, s) for n, s in sorted(usable.items()) if n.partition("-")[0] in wanted]
        )
        self._priors.read_ahead()
        self._start_workers(self._options.workers)
        return adopted

    @property
    def generation(self) -> int:
        """Which writer of the lineage this is, once open; later ones have greater numbers."""
        return self._generation

    def trust(self, trust: Trust) -> None:
        """Before the first piece: what is known of the source's blocks."""
        self._trust = trust

    def store(self, piece: Piece) -> None:
        """
        Take a piece; pieces of other files may stand between those of one. Blocks while the queue is full.
        """
        self._start_workers(self._options.active)
        path = piece.item.path
        state = self._incomplete.get(path)
        if state is None:
            if piece.offset:
                raise _incomplete(path, f"a piece from byte {piece.offset} on came first")
            state = self._incomplete[path] = self._new_state(piece.item)
        if not self._skip(state, piece):
            with self._lock:
                state.pending += 1
            with self._read:
                self._unread += 1
            self._submit(_Task(piece, state))
        if is_last(piece):
            del self._incomplete[path]
            with self._lock:
                state.closed = True
                self._finish_if_complete(state)

    def store_content(self, item: Item, content: bytes) -> None:
        """A whole small file whose bytes are at hand."""
        self.store(ContentPiece(item, content))

    def add_entry(self, item: Item) -> None:
        """A directory, link or file without content."""
        self._maps.add_entry(_entry(item))

    def settle(self) -> None:
        """Wait until all pieces given so far have been read (their frames may still be open)."""
        self._see_that_files_are_complete()
        with self._read:
            while self._unread:
                self._raise_error()
                self._read.wait(POLL_SECONDS)
        self._raise_error()

    def drain(self) -> None:
        """Wait until all that was given is durable in packs. Raises: IntegrityError where pieces lack."""
        self._see_that_files_are_complete()
        self._draining = True
        for _ in self._threads:
            self._submit(None)
        for thread in self._threads:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
        self._putting.shutdown()
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
        counts = asdict(self._counts)
        counts["bytes_stored"] += self._maps.bytes_stored
        statistics = BackupStatistics(seconds=(draft.finished_us - draft.started_us) / 1e6, **counts)
        manifest = self._maps.complete(replace(draft, statistics=statistics))
        if self._options.renew is not None:
            # Before the commit: a committed backup is locked as a whole, for as long as its manifest.
            self._options.renew(self._needed(manifest))
        try:
            self._lineage.put_manifest(manifest)
        except ObjectExists as error:
            raise GenerationFenced(
                f"backup {self.backup_id!r} was revoked while it was written",
                detail="Garbage collection took it for dead and reserved its name.",
                hints=["run the backup again; was this process suspended for a long time?"],
            ) from error
        return manifest

    def _needed(self, manifest: Manifest) -> list[str]:
        """Full names of what this backup needs to be restored and was not stored by itself."""
        store, root, own = self._lineage.store, self._lineage.root, f"{self.generation:08x}-"
        names = [f"packs/{pack}" for pack in manifest.packs if not pack.startswith(own)]
        names += [f"maps/{one}" for one in manifest.maps if not one.startswith(own)]
        branches = self._lineage.branches_with_history()
        names += ["identity", *(f"logs/{branch}/history" for branch in branches)]
        plain = [info.name for info in store.list(KEYS)]
        return [REPOSITORY_OBJECT, *plain, *(root + name for name in names)]

    def abort(self) -> None:
        """Stop the workers; nothing is committed. Harmless at any time."""
        self._stopping = True
        for thread in self._threads:
            thread.join()
        self._putting.shutdown(cancel_futures=True)
        self._threads = []

    # ---- before the first piece
    # -------------------------------------------------------------------------------

    def _new_state(self, item: Item) -> FileState:
        named = self._priors.named(item.path) if self._trust else None
        if named is not None and self._is_unchanged(item, named):
            return FileState.of_unchanged(item, named)
        found = self._priors.find(item.path)
        state = FileState(item, found.files, found.named)
        blocks = min(found.parent_bytes, item.size_bytes) // BLOCK_BYTES
        unchanged = self._trust.unchanged(item, blocks) if self._trust and blocks else None
        if self._trust and unchanged is not None:
            state.skip(unchanged & found.files[0].known[:blocks], self._trust.proved(item, blocks))
        if found.parent_bytes:
            wanted = np.ones(found.files[0].blocks, bool)
            if state.skipped is not None:
                wanted[:blocks] = ~state.skipped
            self._priors.look_up(item.path, found.files[0], wanted)
        return state

    def _is_unchanged(self, item: Item, named: ParentMap) -> bool:
        """Whether a whole file is known to be as the parent has it, and nothing of it is to be proved."""
        blocks = item.size_bytes // BLOCK_BYTES
        if self._trust is None or named.file_bytes != item.size_bytes or item.size_bytes % BLOCK_BYTES:
            return False
        unchanged = self._trust.unchanged(item, blocks)
        return unchanged is not None and bool((unchanged & ~self._trust.proved(item, blocks)).all())

    def _skip(self, state: FileState, piece: Piece) -> bool:
        """Count the blocks of a piece that are not read; whether there is nothing else in it."""
        wanted = state.wanted(piece.offset, piece.length)
        skipped = piece.length - sum(end - begin for begin, end in wanted)
        if skipped:
            blocks = skipped // BLOCK_BYTES
            self.bytes_unread += skipped
            with self._lock:
                self._counts.blocks_total += blocks
                self._counts.blocks_reused += blocks
            self._advance(skipped)
        return not wanted

    def _see_that_files_are_complete(self) -> None:
        for path in self._incomplete:
            raise _incomplete(path, "its last piece never came")

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

    def _start_workers(self, count: int) -> None:
        for number in range(len(self._threads), count):
            thread = threading.Thread(
                target=self._work, args=(number,), name=f"backup-worker-{number}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def _work(self, number: int) -> None:
        worker = _Worker(memoryview(bytearray(FRAME_BYTES)))
        try:
            while not self._stopping:
                if number >= self._options.active and not self._draining:
                    self._lineage.clock.sleep(POLL_SECONDS)
                    continue
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
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._stopping = True

    def _take(self, worker: _Worker, task: _Task) -> None:
        piece, state, reading, short = task.piece, task.state, _Reading(), False
        for done, end in state.wanted(piece.offset, piece.length):
            begin = done
            while begin < end and not short and not self._stopping:
                at = (worker.blocks_used + reading.blocks) * BLOCK_BYTES
                want = min(FRAME_BYTES - at, end - begin)
                got = piece.read_into(worker.buffer[at : at + want], offset=begin)
                reading.add(piece.offset + begin, got)
                begin, short = begin + got, got < want
                if worker.room == reading.blocks * BLOCK_BYTES:
                    self._gather(worker, state, reading)
                    reading = _Reading()
                    if worker.room == 0:
                        self._seal(worker)
        self._gather(worker, state, reading)
        piece.close()
        if self._stopping:
            return
        with self._lock:
            state.pending -= 1
            state.shrank = state.shrank or short
            self._finish_if_complete(state)

    def _gather(self, worker: _Worker, state: FileState, reading: _Reading) -> None:
        """What was read of `state` stands in the buffer behind what is gathered: keep what is new."""
        count = reading.blocks
        if not count:
            return
        begin = worker.blocks_used * BLOCK_BYTES
        pages = worker.buffer[begin : begin + count * BLOCK_BYTES]
        short = -reading.bytes % BLOCK_BYTES
        if short:
            pages[len(pages) - short :] = bytes(short)
        blocks = np.concatenate([np.arange(first, end) for first, end in reading.spans])
        prints = np.empty(count, np.uint64)
        zero = fingerprints(pages, page_bytes=BLOCK_BYTES, key=self._key, out=prints).astype(bool)
        placement = state.match(blocks, prints, zero)
        self._see_missed(state, blocks, pages, placement.missed)
        keep = placement.keep
        kept = int(keep.sum())
        if 0 < kept < count:
            rows = np.frombuffer(pages, np.uint8).reshape(count, BLOCK_BYTES)
            rows[:kept] = rows[keep]
        stretches = self._stretches(state.item.path, blocks[keep], prints[keep], worker.blocks_used)
        worker.gathered += [(state, stretch) for stretch in stretches]
        worker.blocks_used += kept
        with self._lock:
            state.note(reading.end_bytes, placement)
            state.pending += len(stretches)
            counts = self._counts
            counts.bytes_read += reading.bytes
            counts.blocks_total += count
            counts.blocks_stored += kept
            counts.blocks_zero += len(placement.zero)
            counts.blocks_reused += count - kept - len(placement.zero)
        self._advance(reading.bytes)

    def _see_missed(
        self, state: FileState, blocks: Blocks, pages: memoryview, missed: npt.NDArray[np.bool_]
    ) -> None:
        for place in np.flatnonzero(missed).tolist():
            assert self._trust is not None  # Without it nothing counts as unchanged.
            block = int(blocks[place])
            found = bytes(pages[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES])
            stored = partial(read_block, self._lineage, state.priors[0], block)
            self._trust.differs(state.item, block, found, stored)

    @staticmethod
    def _stretches(path: str, blocks: Blocks, prints: Fingerprints, used: int) -> list[Stretch]:
        """Runs of the blocks that are kept, which stand in the frame from its `used`th block on."""
        stretches, done = [], 0
        for begin, end in runs_of(blocks):
            count = end - begin
            place = (used + done) * BLOCK_BYTES
            stretches.append(Stretch(path, begin, count, place, prints[done : done + count]))
            done += count
        return stretches

    def _seal(self, worker: _Worker) -> None:
        """Turn what is gathered into a frame, and put the pack when it is full."""
        if not worker.blocks_used:
            return
        if worker.pack is None:
            worker.arena = self._lend_arena()
            if worker.arena is None:
                return
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

    def _lend_arena(self) -> Arena | None:
        """Memory for a pack: waits while the puts are behind. None when the backup is being stopped."""
        with self._lock:
            make = self._arenas.empty() and self._arenas_made <= len(self._threads)
            self._arenas_made += make
        if make:
            # Room for what lies behind the mark at which a pack is full: a frame, and a usual trailer.
            return Arena(self._options.pack_bytes + 2 * FRAME_BYTES)
        while not self._stopping:
            try:
                return self._arenas.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
        return None

    def _close_pack(self, worker: _Worker) -> None:
        pack, worker.pack = worker.pack, None
        if pack is not None:
            assert worker.arena is not None
            self._putting.submit(self._put, pack, worker.arena)

    def _put(self, pack: PackBuilder, arena: Arena) -> None:
        try:
            stored = pack.put(self._lineage.store)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits
            self._fail(error)
            return
        with self._lock:
            self._counts.bytes_stored += stored
        self._arenas.put(arena)

    def _finish_if_complete(self, state: FileState) -> None:
        """With the lock held: a file whose last block has its place gets its map."""
        if state.closed and state.pending == 0 and not state.finished:
            state.finished = True
            self._maps.add_file(state, _entry(state.item))


def _incomplete(path: str, why: str) -> IntegrityError:
    return IntegrityError(f"file {path!r} was not given as a whole", detail=f"Of its pieces, {why}.")


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
