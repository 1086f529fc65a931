"""
The oracle: clients that commit numbered rows and note each acknowledgement outside the database.

A restore to a target is judged by that record alone: every row whose commit was acknowledged at or before the
target must be there; no row whose commit was sent after the target may be; what was under way at the target
is free. Each client writes two kinds of lines: `sent` before COMMIT leaves, `acked` after it was answered.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg

RECONNECT_SECONDS = 0.05
STOP_TIMEOUT_SECONDS = 60.0
PROBLEMS_SHOWN_MAX = 10

CREATE_LEDGER = """
    CREATE TABLE IF NOT EXISTS ledger (id bigint PRIMARY KEY, client int NOT NULL, payload text NOT NULL)
"""
INSERT_ROW = """
    INSERT INTO ledger (id, client, payload) VALUES (%s, %s, %s)
    RETURNING pg_current_xact_id()::text::bigint, pg_current_wal_insert_lsn()::text
"""


@dataclass(frozen=True)
class Commit:
    """
    One transaction as a client saw it.

    sent and acked are instants of this host's clock, which is also the server's. The commit record lies at or
    after lsn_before, and before lsn_after. acked and lsn_after are None when no answer came: in doubt.
    """

    id: int
    client: int
    xid: int
    sent: datetime
    lsn_before: int
    acked: datetime | None = None
    lsn_after: int | None = None


@dataclass(frozen=True)
class Expectation:
    """Ids that a restored ledger must have, must not have, and (all of these included) may have."""

    must_have: frozenset[int]
    must_not_have: frozenset[int]
    known: frozenset[int]


def payload_of(row_id: int, *, payload_bytes: int = 120) -> str:
    """The text that belongs to a row; hard to compress, equal in every run."""
    digest = hashlib.sha256(str(row_id).encode()).hexdigest()
    return (digest * (payload_bytes // len(digest) + 1))[:payload_bytes]


def lsn_number(text: str) -> int:
    """An LSN such as 0/16B3748 as a number."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) + int(low, 16)


# ---- the clients -------------------------------------------------------------------------------------------


class LedgerClients:
    """
    Several clients, one thread and connection each, that commit rows until stopped.

    Args:
        url: Gives the URL to connect to, asked again at each reconnect, so that it may follow a fail-over.
        path: The record outside the database; appended to.
        first_id: Ids count up from here; a second run on the same record needs a place of its own.
    """

    def __init__(self, url: Callable[[], str], path: Path, *, clients: int = 3, first_id: int = 1) -> None:
        self._url = url
        self._path = path
        self._ids = itertools.count(first_id)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._progress = threading.Condition()
        self._acked_count = 0
        self._failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._guarded, args=(number,), name=f"ledger-{number}", daemon=True)
            for number in range(clients)
        ]

    def __enter__(self) -> Self:
        with psycopg.connect(self._url(), autocommit=True) as connection:
            connection.execute(CREATE_LEDGER)
        self._file = self._path.open("a", buffering=1)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End all clients and close the record. Raises: the first thing that went wrong in a client."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(STOP_TIMEOUT_SECONDS)
        if any(thread.is_alive() for thread in self._threads):
            raise AssertionError("a ledger client did not end")
        self._file.close()
        if self._failures:
            raise self._failures[0]

    def wait_for(self, count: int, *, timeout_seconds: float = 60.0) -> None:
        """Return when that many more commits were acknowledged than now. Raises: AssertionError."""
        with self._progress:
            wanted = self._acked_count + count
            reached = self._progress.wait_for(
                lambda: self._acked_count >= wanted or bool(self._failures), timeout_seconds
            )
        if self._failures:
            raise self._failures[0]
        assert reached, f"no {count} further commits within {timeout_seconds} s"

    def _guarded(self, number: int) -> None:
        try:
            self._work(number)
        except BaseException as error:  # noqa: BLE001  handed to the test by stop()
            self._failures.append(error)

    def _work(self, number: int) -> None:
        while not self._stopping.is_set():
            try:
                with psycopg.connect(self._url(), autocommit=True) as connection:
                    while not self._stopping.is_set():
                        self._commit_one(connection, number)
            except psycopg.OperationalError:
                self._stopping.wait(RECONNECT_SECONDS)

    def _commit_one(self, connection: psycopg.Connection[Any], number: int) -> None:
        row_id = next(self._ids)
        connection.execute("BEGIN")
        row = connection.execute(INSERT_ROW, (row_id, number, payload_of(row_id))).fetchone()
        assert row is not None
        entry: dict[str, Any] = {"id": row_id, "client": number, "xid": row[0], "lsn_before": row[1]}
        self._write({"event": "sent", **entry, "sent": _now()})
        connection.execute("COMMIT")
        acked = _now()
        after = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
        assert after is not None
        self._write({"event": "acked", "id": row_id, "acked": acked, "lsn_after": after[0]})
        with self._progress:
            self._acked_count += 1
            self._progress.notify_all()

    def _write(self, entry: Mapping[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(entry) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


# ---- what was acknowledged ---------------------------------------------------------------------------------


class Ledger:
    """The record, read back."""

    def __init__(self, commits: Mapping[int, Commit]) -> None:
        self.commits = commits

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Read a record; a last line cut off by a kill is dropped."""
        commits: dict[int, Commit] = {}
        for entry in _entries(path):
            if entry["event"] == "sent":
                commits[entry["id"]] = Commit(
                    entry["id"],
                    entry["client"],
                    entry["xid"],
                    datetime.fromisoformat(entry["sent"]),
                    lsn_number(entry["lsn_before"]),
                )
            else:
                sent = commits[entry["id"]]
                acked, after = datetime.fromisoformat(entry["acked"]), lsn_number(entry["lsn_after"])
                commits[sent.id] = Commit(
                    sent.id, sent.client, sent.xid, sent.sent, sent.lsn_before, acked, after
                )
        return cls(commits)

    def acknowledged(self) -> list[Commit]:
        """The commits that were answered, by instant of the answer."""
        answered = [commit for commit in self.commits.values() if commit.acked is not None]
        return sorted(answered, key=lambda commit: commit.acked or commit.sent)

    def expected_ids(self, target: datetime) -> Expectation:
        """Restore to an instant: acked at or before it must be there, sent after it must not."""
        return self._expect(
            lambda commit: commit.acked is not None and commit.acked <= target,
            lambda commit: commit.sent > target,
        )

    def expected_at_position(self, lsn: str) -> Expectation:
        """Restore to a log position: by where the commit record can lie."""
        target = lsn_number(lsn)
        return self._expect(
            lambda commit: commit.lsn_after is not None and commit.lsn_after <= target,
            lambda commit: commit.lsn_before >= target,
        )

    def expected_at_transaction(self, xid: int, *, inclusive: bool = True) -> Expectation:
        """Restore to an acknowledged transaction, with or without it."""
        (target,) = [commit for commit in self.commits.values() if commit.xid == xid and commit.acked]
        assert target.acked is not None
        around = self._expect(
            lambda commit: commit.acked is not None and commit.acked <= target.sent,
            lambda commit: commit.sent >= (target.acked or target.sent),
        )
        own = frozenset([target.id])
        if inclusive:
            return Expectation(around.must_have | own, around.must_not_have, around.known)
        return Expectation(around.must_have, around.must_not_have | own, around.known)

    def expected_latest(self) -> Expectation:
        """Restore to the end: everything acknowledged."""
        return self._expect(lambda commit: commit.acked is not None, lambda commit: False)

    def quiet_instant(self, *, fraction: float = 0.5) -> datetime:
        """An instant with acknowledged commits on both sides, `fraction` of the way through the record."""
        answered = self.acknowledged()
        assert len(answered) > PROBLEMS_SHOWN_MAX, "too few commits to choose an instant among"
        chosen = answered[int(len(answered) * fraction)].acked
        assert chosen is not None
        return chosen + timedelta(microseconds=1)

    def _expect(self, must: Callable[[Commit], bool], must_not: Callable[[Commit], bool]) -> Expectation:
        commits = self.commits.values()
        return Expectation(
            frozenset(commit.id for commit in commits if must(commit)),
            frozenset(commit.id for commit in commits if must_not(commit)),
            frozenset(self.commits),
        )


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


# ---- the judgement -----------------------------------------------------------------------------------------


def problems_of(rows: Mapping[int, str], expectation: Expectation) -> list[str]:
    """Compare restored rows (id to payload) with what is expected. Pure. An empty list means: as promised."""
    found = frozenset(rows)
    problems = [f"acknowledged row {row_id} is missing" for row_id in sorted(expectation.must_have - found)]
    later = sorted(expectation.must_not_have & found)
    problems += [f"row {row_id}, committed after the target, is there" for row_id in later]
    problems += [f"row {row_id} was never sent" for row_id in sorted(found - expectation.known)]
    wrong = sorted(row_id for row_id, payload in rows.items() if payload != payload_of(row_id))
    return problems + [f"row {row_id} has another content" for row_id in wrong]


def assert_ledger(connection: psycopg.Connection[Any], expectation: Expectation) -> None:
    """
    The restored ledger is what the record promises, and this check would have seen it otherwise.

    Raises: AssertionError with the first problems; also when the expectation is too weak to judge anything.
    """
    assert expectation.must_have, "the record has no commit before the target: nothing would be proved"
    rows = {row[0]: row[1] for row in connection.execute("SELECT id, payload FROM ledger").fetchall()}
    problems = problems_of(rows, expectation)
    shown = "\n".join(problems[:PROBLEMS_SHOWN_MAX])
    assert not problems, f"{len(problems)} problems in {len(rows)} restored rows:\n{shown}"
    assert_check_can_fail(rows, expectation)


def assert_check_can_fail(rows: Mapping[int, str], expectation: Expectation) -> None:
    """Negative control: each kind of loss, put into these very rows, is found."""
    victim = max(expectation.must_have)
    lost = {row_id: payload for row_id, payload in rows.items() if row_id != victim}
    assert problems_of(lost, expectation), "a lost row went unseen"
    assert problems_of({**rows, victim: "torn"}, expectation), "a damaged row went unseen"
    stranger = max(expectation.known) + 1
    assert problems_of({**rows, stranger: payload_of(stranger)}, expectation), "an unknown row went unseen"
    for row_id in sorted(expectation.must_not_have)[:1]:
        later = {**rows, row_id: payload_of(row_id)}
        assert problems_of(later, expectation), "a row from after the target went unseen"


def assert_pgbench_consistent(connection: psycopg.Connection[Any]) -> None:
    """Pgbench's invariant: the sums over accounts, tellers, branches and history are equal. Needs history."""
    row = connection.execute(
        """
        SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
               (SELECT sum(bbalance) FROM pgbench_branches), (SELECT sum(delta) FROM pgbench_history)
        """
    ).fetchone()
    assert row is not None
    assert row[3] is not None, "pgbench_history is empty: nothing would be proved"
    assert len(set(row)) == 1, f"accounts, tellers, branches, history: {row}"
