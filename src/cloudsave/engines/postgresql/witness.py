"""
A witness of commits: a client that writes rows and remembers, outside the database, which commits were
acknowledged.

After a restore it can say without asking the database what must be there and what must not.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import psycopg

from cloudsave.clock import Clock
from cloudsave.engines.postgresql.connection import connect
from cloudsave.model.log import us_from_instant

TABLE = "public.witness"
INSERT = "insert into public.witness values (%s, %s)"
PAUSE_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class Testimony:
    """
    One commit: sent not before `sent_us`, acknowledged not after `acknowledged_us` (microseconds since
    1970).
    """

    row: int
    sent_us: int
    acknowledged_us: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a restored table compares with what the witness saw, for a target instant."""

    expected: int
    """Commits acknowledged at or before the instant."""
    missing: int
    unexpected: int
    """Rows whose commit was sent only after the instant, or that the witness never wrote."""

    @property
    def holds(self) -> bool:
        """Every expected row is there and no other."""
        return self.missing == 0 and self.unexpected == 0


@dataclass(slots=True)
class Witness:
    """Writes rows in a thread of its own until told to stop."""

    url: str
    clock: Clock
    testimonies: list[Testimony] = field(default_factory=list)
    error: Exception | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Create the table and begin."""
        with connect(self.url, application_name="cloudsave witness") as connection:
            connection.execute(f"create table if not exists {TABLE} (row bigint primary key, note text)")
        self._thread = threading.Thread(target=self._run, name="witness", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End; what was acknowledged until now is in `testimonies`."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def slowest_ms(self, *, begin_us: int, end_us: int) -> float:
        """The longest time that one commit took within a span."""
        spans = [t.acknowledged_us - t.sent_us for t in self.testimonies if begin_us <= t.sent_us < end_us]
        return max(spans, default=0) / 1000

    def judge(self, rows: set[int], target_us: int) -> Verdict:
        """
        Compare restored rows with the commits around `target_us`; those under way at that instant may be
        either.
        """
        must = {t.row for t in self.testimonies if t.acknowledged_us <= target_us}
        may = {t.row for t in self.testimonies if t.sent_us <= target_us}
        return Verdict(len(must), len(must - rows), len(rows - may))

    def _run(self) -> None:
        try:
            with connect(self.url, application_name="cloudsave witness") as connection:
                row = 0
                while not self._stop.is_set():
                    row += 1
                    sent = us_from_instant(self.clock.now())
                    connection.execute(INSERT, (row, f"row {row}"))
                    self.testimonies.append(Testimony(row, sent, us_from_instant(self.clock.now())))
                    self.clock.sleep(PAUSE_SECONDS)
        except psycopg.Error as error:
            if not self._stop.is_set():
                self.error = error


def witnessed_rows(url: str) -> set[int]:
    """The rows that a server holds."""
    with connect(url, application_name="cloudsave witness") as connection:
        return {row for (row,) in connection.execute(f"select row from {TABLE}")}  # noqa: S608


def balances_agree(url: str) -> bool:
    """Whether pgbench's four sums are equal, as they are after every whole transaction."""
    query = """
        with history as (select coalesce(sum(delta), 0) as total from public.pgbench_history)
        select (select sum(abalance) from public.pgbench_accounts) = total
           and (select sum(bbalance) from public.pgbench_branches) = total
           and (select sum(tbalance) from public.pgbench_tellers) = total
        from history
    """
    with connect(url, application_name="cloudsave witness") as connection:
        (answer,) = connection.execute(query).fetchone() or (False,)
        return bool(answer)


def table_exists(url: str, name: str) -> bool:
    """Whether a table of that name is visible."""
    with connect(url, application_name="cloudsave witness") as connection:
        (answer,) = connection.execute("select to_regclass(%s) is not null", (name,)).fetchone() or (False,)
        return bool(answer)
