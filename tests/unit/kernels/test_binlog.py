"""Kernels and Python alone read binlogs alike, right ones and wrong ones, however the bytes come."""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.binlog.dump import Dump, DumpRequest
from cloudsave.engines.binlog.format_event import ARTIFICIAL, HEARTBEAT, MYSQL_ANONYMOUS, QUERY, ROTATE, XID
from cloudsave.engines.binlog.indexer import BinlogIndexer
from cloudsave.engines.binlog.position import offset_of
from cloudsave.errors import CloudsaveError
from cloudsave.kernels.native import NativeKernels
from cloudsave.model.position import Position
from tests.unit.engines.binlog.synthetic import TIME, File, event
from tests.unit.kernels.built import built_kernels

PACKET_BYTES_MAX = 0xFFFFFF


@st.composite
def logs(draw: st.DrawFn) -> bytes:
    """Two files of transactions of all kinds, and events outside of any."""
    files = [File(), File()]
    for number, made in enumerate(files):
        for turn in range(draw(st.integers(0, 6))):
            rows = bytes(draw(st.integers(0, 300)))
            match draw(st.sampled_from("mMsqx")):
                case "m":
                    made.mysql(turn + 1, instant_us=TIME * 1_000_000 + turn, rows=rows)
                case "M":
                    made.mariadb(turn + 1, rows=rows)
                case "s":
                    made.mariadb(turn + 1, standalone=True)
                case "q":
                    made.add(QUERY, struct.pack("<IIBHH", 1, 0, 1, 0, 3) + b"abcd\0COMMIT")
                case _:
                    made.add(draw(st.sampled_from([XID, MYSQL_ANONYMOUS, 19])), rows)
        if not number:
            made.rotate(b"binlog.000008")
    log = bytearray(files[0].content + files[1].content)
    for _ in range(draw(st.integers(0, 2))):
        log[draw(st.integers(0, len(log) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(log)


def indexed(log: bytes, cuts: list[int], kernels: NativeKernels | None) -> list[object]:
    """What is found of each piece, and how it ends."""
    indexer = BinlogIndexer(Position("b", offset_of(7, 0)), kernels=kernels)
    told: list[object] = []
    try:
        for begin, end in itertools.pairwise(sorted({0, len(log), *(min(cut, len(log)) for cut in cuts)})):
            indexer.feed(log[begin:end])
            index = indexer.take()
            told.append((list(index.commits), index.record_first, index.record_last, index.records_end))
    except (CloudsaveError, struct.error) as error:
        told.append(str(error))
    return told


@given(log=logs(), cuts=st.lists(st.integers(0, 5000), max_size=5))
@settings(max_examples=300, deadline=None)
def test_an_index_is_the_same_with_kernels_and_without(log: bytes, cuts: list[int]) -> None:
    assert indexed(log, cuts, built_kernels()) == indexed(log, cuts, None)


def test_kernels_do_take_plain_events() -> None:
    """Control of the tests above: they would pass if kernels took nothing."""
    made = File()
    for number in range(1, 9000):
        made.mariadb(number)
    log = bytes(made.content)
    whole = indexed(log, [], built_kernels())
    assert whole == indexed(log, [], None)
    assert len(whole[0][0]) == 8999  # type: ignore[index]


# ---- packets


def packet(payload: bytes) -> bytes:
    """One or more packets that carry a payload."""
    parts = [payload[at : at + PACKET_BYTES_MAX] for at in range(0, len(payload) + 1, PACKET_BYTES_MAX)]
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


@contextmanager
def dump_of(kernels: NativeKernels | None, *, semi_sync: bool = False) -> Iterator[Dump]:
    """A connection whose other end hears the command and says nothing."""
    ours, theirs = socket.socketpair()
    session = SimpleNamespace(connection=SimpleNamespace(_sock=ours), close=ours.close)
    request = DumpRequest("binlog.000007", 4, 1, 0, semi_sync=semi_sync)
    dump = Dump(session, request, clock=SYSTEM_CLOCK, kernels=kernels)  # type: ignore[arg-type]
    with theirs:
        yield dump
        dump.close()


def unpacked(stream: bytes, cuts: list[int], kernels: NativeKernels | None, *, semi_sync: bool) -> object:
    """(file, bytes, whether an answer is wanted) with neighbours joined, and how it ends."""
    told: list[tuple[str, bytes, bool]] = []
    with dump_of(kernels, semi_sync=semi_sync) as dump:
        for begin, end in itertools.pairwise(
            sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
        ):
            dump._received += stream[begin:end]
            try:
                batch = dump._unpack()
            except CloudsaveError as error:
                return str(error)
            for one in batch:
                if told and not told[-1][2] and told[-1][0] == one.file:
                    told[-1] = (one.file, told[-1][1] + bytes(one.data), one.wants_answer)
                else:
                    told.append((one.file, bytes(one.data), one.wants_answer))
    return told


@st.composite
def streams(draw: st.DrawFn, *, semi_sync: bool) -> bytes:
    """What a server sends: events, signs of life, the begin of another file, perhaps an error at last."""
    sent = []
    place = 4
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["event"] * 4 + ["heartbeat", "file"]))
        answer = int(kind == "event" and draw(st.booleans()))
        if kind == "event":
            body = event(19, bytes(draw(st.integers(0, 200))), place)
            place += len(body)
        elif kind == "heartbeat":
            body = event(HEARTBEAT, b"binlog.000007", place, end=place)
        else:
            place = 4
            body = event(ROTATE, struct.pack("<Q", 4) + b"binlog.000008", 0, flags=ARTIFICIAL, end=0)
        sent.append(packet((b"\0\xef" + bytes([answer]) if semi_sync else b"\0") + body))
    if draw(st.booleans()):
        sent.append(packet(b"\xff" + struct.pack("<H", 1236) + b"#HY000it is over"))
    return b"".join(sent)


@pytest.mark.parametrize("semi_sync", [False, True])
@given(data=st.data(), cuts=st.lists(st.integers(0, 1500), max_size=4))
@settings(max_examples=100, deadline=None)
def test_packets_carry_the_same_events_with_kernels_and_without(
    semi_sync: bool, data: st.DataObject, cuts: list[int]
) -> None:
    stream = data.draw(streams(semi_sync=semi_sync))
    with_kernels = unpacked(stream, cuts, built_kernels(), semi_sync=semi_sync)
    assert with_kernels == unpacked(stream, cuts, None, semi_sync=semi_sync)


def test_kernels_do_take_plain_packets() -> None:
    """Control of the test above."""
    stream = b"".join(packet(b"\0" + event(19, bytes(100), 4)) for _ in range(1000))
    for kernels, batches in ((built_kernels(), 1), (None, 1000)):
        with dump_of(kernels) as dump:
            dump._received += stream
            assert len(dump._unpack()) == batches


def test_an_event_of_several_packets_is_one() -> None:
    big, small = event(19, bytes(PACKET_BYTES_MAX), 4), event(19, b"x", 4 + PACKET_BYTES_MAX)
    stream = packet(b"\0" + small) + packet(b"\0" + big) + packet(b"\0" + small)
    for kernels in (built_kernels(), None):
        with dump_of(kernels) as dump:
            dump._received += stream
            assert b"".join(bytes(one.data) for one in dump._unpack()) == small + big + small
