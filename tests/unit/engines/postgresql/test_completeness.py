"""What a server says of how far its log goes, and when that becomes an instant."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cloudsave.engines.postgresql.completeness import (
    ANSWER_SECONDS_MAX,
    ASK_SECONDS,
    ASK_SECONDS_MAX,
    RETRY_SECONDS,
    Completeness,
    end_of_last_record,
)
from cloudsave.engines.postgresql.replication import Rows
from cloudsave.errors import EngineUnavailable
from tests.fake_clock import FakeClock

SEGMENT = 16 << 20
HERE = 5 * SEGMENT + 1000
COLUMNS = ("instant_us", "inserted", "branch")


class Server:
    """Answers questions when it likes; its own connection."""

    def __init__(self) -> None:
        self.inserted = "0/50003E8"
        self.branch: str | None = "00000001"
        self.instant_us = 111
        self.questions = 0
        self.connects = 0
        self.mute = False
        self.error: EngineUnavailable | None = None

    def connect(self) -> Server:
        self.connects += 1
        if self.error:
            raise self.error
        return self

    def begin_query(self, sql: str) -> None:
        assert "pg_current_wal_insert_lsn" in sql
        self.questions += 1

    def poll_query(self) -> list[Rows] | None:
        if self.error:
            raise self.error
        row = (str(self.instant_us), self.inserted if self.branch else None, self.branch)
        return None if self.mute else [Rows(COLUMNS, (row,))]

    def close(self) -> None:
        """Nothing is kept."""


class Stream:
    """A stream that asks at each of its turns."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.server = Server()
        connect: Callable[[], object] = self.server.connect
        self.completeness = Completeness(
            connect,  # type: ignore[arg-type]
            branch="00000001",
            log_file_bytes=SEGMENT,
            clock=self.clock,
        )

    def turns(self, received: int, *, seconds: float) -> list[int]:
        """What was said in so many seconds, in turns of a tenth."""
        said = []
        for _ in range(round(seconds * 10)):
            self.clock.sleep(0.1)
            said.append(self.completeness.until_us(received, now=self.clock.monotonic()))
        return [one for one in said if one]


@pytest.fixture
def stream() -> Stream:
    return Stream()


def test_an_instant_is_told_when_the_log_has_come_and_not_before(stream: Stream) -> None:
    assert stream.turns(HERE - 1, seconds=5) == []
    assert stream.server.questions == 1
    assert stream.turns(HERE, seconds=0.1) == [111]


def test_log_that_keeps_coming_is_asked_about_steadily(stream: Stream) -> None:
    for number in range(10):
        stream.turns(HERE + number, seconds=1)
    assert 10 / ASK_SECONDS * 0.5 <= stream.server.questions <= 10 / ASK_SECONDS
    assert stream.server.connects == 1


def test_a_server_without_new_log_is_asked_ever_less(stream: Stream) -> None:
    stream.turns(HERE, seconds=600)
    assert stream.server.questions < 20
    quiet = stream.server.questions
    stream.turns(HERE, seconds=ASK_SECONDS_MAX - 1)
    assert stream.server.questions <= quiet + 1
    assert 111 in stream.turns(HERE + 8, seconds=1)


@pytest.mark.parametrize("branch", ["00000002", None], ids=["another branch", "a standby"])
def test_what_is_no_answer_proves_nothing(stream: Stream, branch: str | None) -> None:
    stream.server.branch = branch
    assert stream.turns(HERE, seconds=10) == []
    stream.server.branch = "00000001"
    assert 111 in stream.turns(HERE + 8, seconds=2)


def test_a_server_that_refuses_is_asked_again_later(stream: Stream) -> None:
    stream.server.error = EngineUnavailable("could not connect to the server", detail="too many clients")
    assert stream.turns(HERE, seconds=RETRY_SECONDS - 1) == []
    assert stream.server.connects == 1
    stream.server.error = None
    assert 111 in stream.turns(HERE, seconds=3)
    assert stream.server.connects == 2


def test_a_server_that_does_not_answer_is_connected_to_anew(stream: Stream) -> None:
    stream.server.mute = True
    assert stream.turns(HERE, seconds=ANSWER_SECONDS_MAX + 2) == []
    stream.server.mute = False
    assert 111 in stream.turns(HERE, seconds=RETRY_SECONDS + 2)
    assert stream.server.connects == 2


@pytest.mark.parametrize(
    ("shown", "needed"),
    [
        (5 * SEGMENT + 40, 5 * SEGMENT),
        (5 * SEGMENT + 8192 + 24, 5 * SEGMENT + 8192),
        (5 * SEGMENT + 8192 + 40, 5 * SEGMENT + 8192 + 40),
        (5 * SEGMENT + 8192 + 32, 5 * SEGMENT + 8192 + 32),
        (5 * SEGMENT + 48, 5 * SEGMENT + 48),
        (5 * SEGMENT + 1000, 5 * SEGMENT + 1000),
    ],
)
def test_the_header_of_a_page_that_is_not_begun_is_not_waited_for(shown: int, needed: int) -> None:
    assert end_of_last_record(shown, log_file_bytes=SEGMENT) == needed
