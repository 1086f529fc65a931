"""
What every store must do, as plain functions: our tests run them, and users on their own store by
`cloudsave store validate URL`. Nothing here depends on a test framework, nor on `assert`, which may be
switched off.

Each check gets a store and a prefix of its own, and raises ContractBroken with what it saw.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.errors import CloudsaveError, IntegrityError, ObjectExists, ObjectMissing, StoreError
from cloudsave.store.api import NAME_BYTES_MAX, Buffer, ObjectInfo, ObjectStore, StoreCapabilities

RACE_ROUNDS = 8
LARGE_BYTES = 5 * 1024 * 1024 + 1
CLOCK_SKEW_MAX = timedelta(hours=1)
"""Limit: how far a store's clock may be from ours; retention counts in days."""
_THREAD_SECONDS_MAX = 120.0

_BAD_NAMES = (
    "",
    "/",
    "/etc/passwd",
    "a//b",
    "a/",
    ".",
    "..",
    "../a",
    "a/../../b",
    "a/./b",
    ".tmp/a",
    "a/.b",
    "a b",
    "a\\b",
    "a\0b",
    "a\n",
    "ä",
    "a%2fb",
    "a" * (NAME_BYTES_MAX + 1),
    "a" * 201,
)


class ContractBroken(Exception):
    """A store did not do what the contract says."""


@dataclass(frozen=True, slots=True)
class ContractResult:
    """The outcome of one check; `detail` is empty where it passed."""

    name: str
    passed: bool
    detail: str


Check = Callable[[ObjectStore, str], None]


def run_contract(store: ObjectStore, prefix: str) -> list[ContractResult]:
    """
    Run all checks below `prefix`, which ends in "/" and holds nothing, and delete what they stored.

    One result per check and one for the clean-up. Nothing is raised for a store that fails.
    """
    recording = _Recording(store)
    results = [
        _outcome(check.__name__.removeprefix("check_"), check, recording, f"{prefix}{number:02}/")
        for number, check in enumerate(CHECKS)
    ]

    def clean_up(store: ObjectStore, prefix: str) -> None:
        for name in recording.names():
            store.delete(name)
        left = [info.name for info in store.list(prefix)]
        _require(not left, f"still listed after deletion: {left[:3]}")

    results.append(_outcome("clean_up", clean_up, store, prefix))
    return results


def _outcome(name: str, check: Check, store: ObjectStore, prefix: str) -> ContractResult:
    try:
        check(store, prefix)
    except (ContractBroken, CloudsaveError) as error:
        return ContractResult(name, passed=False, detail=str(error))
    except Exception as error:  # noqa: BLE001 - a driver's exception that leaks is itself a broken promise
        return ContractResult(name, passed=False, detail=f"leaked {type(error).__name__}: {error}")
    return ContractResult(name, passed=True, detail="")


# ---- put and get -----------------------------------------------------------------------------------------


def check_put_then_get(store: ObjectStore, prefix: str) -> None:
    """All kinds of parts arrive, concatenated."""
    _put(store, prefix + "a", b"one", bytearray(b"two"), memoryview(b"_three_")[1:6], b"")
    _same(store.get(prefix + "a"), b"onetwothree", "content of an object")


def check_put_of_many_parts(store: ObjectStore, prefix: str) -> None:
    """More parts than one system call takes."""
    parts = [number.to_bytes(2, "big") for number in range(5000)]
    store.put(prefix + "a", parts)
    _same(store.get(prefix + "a"), b"".join(parts), "content of an object of 5000 parts")


def check_empty_object(store: ObjectStore, prefix: str) -> None:
    """Nothing is something: no parts, and an empty part."""
    store.put(prefix + "a", [])
    store.put(prefix + "b", [b""])
    for name in ("a", "b"):
        _same(store.get(prefix + name), b"", "content of an empty object")
        _same(bytes(store.get_range(prefix + name, offset=0, length=0)), b"", "range of an empty object")
    _same([info.size_bytes for info in store.list(prefix)], [0, 0], "listed sizes of empty objects")


def check_large_object(store: ObjectStore, prefix: str) -> None:
    """Over 5 MiB, where clients begin to split uploads."""
    content = _pattern(LARGE_BYTES)
    _put(store, prefix + "a", memoryview(content)[:3_000_001], memoryview(content)[3_000_001:])
    _require(store.get(prefix + "a") == content, "a large object was changed")
    tail = bytes(store.get_range(prefix + "a", offset=LARGE_BYTES - 70_000, length=70_000))
    _require(tail == content[-70_000:], "the tail of a large object was changed")
    _raises(ObjectExists, "second put of a large object", lambda: _put(store, prefix + "a", content))


def check_put_refuses_an_existing_name(store: ObjectStore, prefix: str) -> None:
    """The first content stays, also when the second is the same or empty."""
    _put(store, prefix + "a", b"first")
    for content in (b"other", b"first", b""):
        _raises(ObjectExists, "put of an existing name", partial(_put, store, prefix + "a", content))
    _same(store.get(prefix + "a"), b"first", "content after refused puts")


def check_one_of_two_racing_puts_wins(store: ObjectStore, prefix: str) -> None:
    """Two threads, one name: one succeeds, one learns that it exists, the content is the winner's."""
    for number in range(RACE_ROUNDS):
        _race(store, f"{prefix}{number}")


def _race(store: ObjectStore, name: str) -> None:
    barrier = threading.Barrier(2)
    contents = (b"A" * 65_536, b"B" * 65_537)
    outcomes: dict[int, BaseException | None] = {}

    def put(who: int) -> None:
        barrier.wait(_THREAD_SECONDS_MAX)
        try:
            store.put(name, [contents[who]])
            outcomes[who] = None
        except Exception as error:  # noqa: BLE001 - judged below, in the thread that runs the check
            outcomes[who] = error

    threads = [threading.Thread(target=put, args=(who,), daemon=True) for who in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_THREAD_SECONDS_MAX)
    _require(len(outcomes) == 2, "a racing put did not return")
    winners = [who for who, error in outcomes.items() if error is None]
    _require(len(winners) == 1, f"{len(winners)} of two racing puts succeeded: {outcomes}")
    loser = outcomes[1 - winners[0]]
    _require(isinstance(loser, ObjectExists), f"the loser of a race got {loser!r}, not ObjectExists")
    _require(store.get(name) == contents[winners[0]], "the object does not hold the winner's content")


# ---- ranges ----------------------------------------------------------------------------------------------


def check_ranges(store: ObjectStore, prefix: str) -> None:
    """First, middle, last, all and no bytes."""
    content = _pattern(1000)
    _put(store, prefix + "a", content)
    for offset, length in ((0, 1), (0, 1000), (1, 998), (999, 1), (500, 0), (0, 0), (1000, 0)):
        got = bytes(store.get_range(prefix + "a", offset=offset, length=length))
        _same(got, content[offset : offset + length], f"range {offset}+{length}")


def check_range_beyond_the_end(store: ObjectStore, prefix: str) -> None:
    """Never fewer bytes than were asked for."""
    _put(store, prefix + "a", b"0123456789")
    for offset, length in ((0, 11), (9, 2), (10, 1), (5000, 1), (11, 0)):
        _raises(
            IntegrityError,
            f"range {offset}+{length} of 10 bytes",
            partial(store.get_range, prefix + "a", offset=offset, length=length),
        )


def check_negative_range(store: ObjectStore, prefix: str) -> None:
    """A negative number is refused, not counted from the end."""
    _put(store, prefix + "a", b"0123456789")
    _raises(StoreError, "negative offset", lambda: store.get_range(prefix + "a", offset=-1, length=1))
    _raises(StoreError, "negative length", lambda: store.get_range(prefix + "a", offset=5, length=-1))


# ---- missing objects, deletion ---------------------------------------------------------------------------


def check_missing_object(store: ObjectStore, prefix: str) -> None:
    """Missing is said as such, also where only the directory exists and where nothing does."""
    _put(store, prefix + "there/a", b"x")
    for name in ("there/b", "gone/a", "there", "there/a/b"):
        _raises(ObjectMissing, f"get of missing {name}", partial(store.get, prefix + name))
        _raises(
            ObjectMissing,
            f"range of missing {name}",
            partial(store.get_range, prefix + name, offset=0, length=1),
        )
        _raises(
            ObjectMissing,
            f"empty range of missing {name}",
            partial(store.get_range, prefix + name, offset=0, length=0),
        )


def check_delete(store: ObjectStore, prefix: str) -> None:
    """Gone after the first, no error at the second; neighbours stay; the name is free again."""
    _put(store, prefix + "a", b"old")
    _put(store, prefix + "ab", b"neighbour")
    store.delete(prefix + "a")
    _raises(ObjectMissing, "get of a deleted object", lambda: store.get(prefix + "a"))
    _same([info.name for info in store.list(prefix)], [prefix + "ab"], "names after a deletion")
    store.delete(prefix + "a")
    store.delete(prefix + "never/was")
    _put(store, prefix + "a", b"new")
    _same(store.get(prefix + "a"), b"new", "content of a name used again")


# ---- listing ---------------------------------------------------------------------------------------------


def check_list_order(store: ObjectStore, prefix: str) -> None:
    """The order is that of the bytes of whole names: "a-b" < "a.b" < "a/b" < "a0"."""
    leaves = ("a-b/z", "a.b", "a/b", "a/b-", "a0", "A", "Z/a", "_", "a=b", "a/c/d/e", "a/c-", "b", "0", "-")
    names = [prefix + leaf for leaf in leaves]
    for name in names:
        _put(store, name, name.encode())
    listed = list(store.list(prefix))
    _same([info.name for info in listed], sorted(names), "order of listed names")
    _same([info.size_bytes for info in listed], [len(name) for name in sorted(names)], "listed sizes")


def check_list_by_prefix(store: ObjectStore, prefix: str) -> None:
    """A prefix is a directory and all below it, not its namesakes; a missing one is empty."""
    for leaf in ("a/1", "a/2/3", "ab/1", "a-/1", "b"):
        _put(store, prefix + leaf, b"x")
    _same(_names(store, prefix + "a/"), [prefix + "a/1", prefix + "a/2/3"], "names below a/")
    _same(_names(store, prefix + "missing/"), [], "names below a missing prefix")
    _same(_names(store, prefix + "b/"), [], "names below an object")
    for bad in (prefix + "a", "/", "../", "a//", ".tmp/"):
        _raises(StoreError, f"listing by prefix {bad!r}", partial(_names, store, bad))


def check_list_everything(store: ObjectStore, prefix: str) -> None:
    """The empty prefix lists the whole store, in order."""
    _put(store, prefix + "a", b"x")
    names = _names(store, "")
    _require(prefix + "a" in names, "an object is missing from the listing of the whole store")
    _same(names, sorted(names), "order of the whole store")


def check_list_after_write(store: ObjectStore, prefix: str) -> None:
    """Each put is in the next listing and readable at once, each deletion is not."""
    expected: list[str] = []
    for number in range(20):
        name = f"{prefix}{number % 3}/{number:03}"
        _put(store, name, b"%d" % number)
        expected = sorted([*expected, name])
        _same(_names(store, prefix), expected, "names listed after a put")
        _same(store.get(name), b"%d" % number, "content read after a put")
    for name in list(expected):
        store.delete(name)
        expected.remove(name)
        _same(_names(store, prefix), expected, "names listed after a deletion")


def check_list_after_concurrent_writes(store: ObjectStore, prefix: str) -> None:
    """Nothing that several threads put at once is missing from the listing."""
    failures: list[BaseException] = []

    def put_some(who: int) -> None:
        try:
            for number in range(12):
                _put(store, f"{prefix}{number % 4}/{who}-{number}", b"x")
        except Exception as error:  # noqa: BLE001 - judged below, in the thread that runs the check
            failures.append(error)

    threads = [threading.Thread(target=put_some, args=(who,), daemon=True) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_THREAD_SECONDS_MAX)
    _require(not failures, f"a put among concurrent puts failed: {failures}")
    expected = sorted(f"{prefix}{number % 4}/{who}-{number}" for who in range(4) for number in range(12))
    _same(_names(store, prefix), expected, "names listed after concurrent puts")


def check_modification_time(store: ObjectStore, prefix: str) -> None:
    """The listed instant is aware and near ours: retention rests on the store's clock."""
    _put(store, prefix + "a", b"x")
    modified = next(iter(store.list(prefix))).modified_utc
    _require(modified.tzinfo is not None, "a listed instant has no zone")
    skew = abs(modified - SYSTEM_CLOCK.now())
    _require(skew < CLOCK_SKEW_MAX, f"the store's clock is {skew} away from this machine's")


# ---- names -----------------------------------------------------------------------------------------------


def check_bad_names(store: ObjectStore, prefix: str) -> None:
    """Names that break the rules are refused by every method and leave nothing behind."""
    for bad in _BAD_NAMES:
        _raises(StoreError, f"put of {bad!r}", partial(_put, store, bad, b"x"))
        _raises(StoreError, f"get of {bad!r}", partial(store.get, bad), but_not=ObjectMissing)
        _raises(
            StoreError,
            f"range of {bad!r}",
            partial(store.get_range, bad, offset=0, length=1),
            but_not=ObjectMissing,
        )
        _raises(StoreError, f"delete of {bad!r}", partial(store.delete, bad))
    _same(_names(store, prefix), [], "names after refused puts")


def check_long_names(store: ObjectStore, prefix: str) -> None:
    """The longest name works, and all characters do."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._=-"
    rest = NAME_BYTES_MAX - len(prefix)
    long = prefix + "/".join(["c" * 99] * 10)[: rest - 1].rstrip("/")
    names = sorted([long + "d" * (NAME_BYTES_MAX - len(long)), prefix + "x" + alphabet])
    for name in names:
        _put(store, name, name.encode())
        _same(store.get(name), name.encode(), "content under a long name")
    _same(_names(store, prefix), names, "listed long names")


CHECKS: Sequence[Check] = (
    check_put_then_get,
    check_put_of_many_parts,
    check_empty_object,
    check_large_object,
    check_put_refuses_an_existing_name,
    check_one_of_two_racing_puts_wins,
    check_ranges,
    check_range_beyond_the_end,
    check_negative_range,
    check_missing_object,
    check_delete,
    check_list_order,
    check_list_by_prefix,
    check_list_everything,
    check_list_after_write,
    check_list_after_concurrent_writes,
    check_modification_time,
    check_bad_names,
    check_long_names,
)


# ---- tools of the checks ---------------------------------------------------------------------------------


class _Recording:
    """Remembers the names that were put, since a store that loses listings is not cleaned by listing."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._names: set[str] = set()

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def capabilities(self) -> StoreCapabilities:
        return self._store.capabilities

    def names(self) -> Sequence[str]:
        return sorted(self._names)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        self._store.put(name, parts)
        self._names.add(name)

    def get(self, name: str) -> bytes:
        return self._store.get(name)

    def get_range(self, name: str, *, offset: int, length: int) -> Buffer:
        return self._store.get_range(name, offset=offset, length=length)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._store.list(prefix)

    def delete(self, name: str) -> None:
        self._store.delete(name)


def _put(store: ObjectStore, name: str, *parts: Buffer) -> None:
    store.put(name, parts)


def _names(store: ObjectStore, prefix: str) -> list[str]:
    return [info.name for info in store.list(prefix)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractBroken(message)


def _same(seen: object, expected: object, what: str) -> None:
    _require(seen == expected, f"{what}: {_short(seen)} instead of {_short(expected)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]} ... ({len(text)} characters)"


def _raises(
    wanted: type[CloudsaveError],
    what: str,
    action: Callable[[], object],
    *,
    but_not: type[CloudsaveError] | None = None,
) -> None:
    """`action` raises `wanted`; any other error goes through to the outcome of the check."""
    try:
        action()
    except wanted as error:
        if but_not is not None and isinstance(error, but_not):
            raise ContractBroken(f"{what} raised {type(error).__name__}") from error
        return
    raise ContractBroken(f"{what} was accepted; {wanted.__name__} was expected")


def _pattern(size_bytes: int) -> bytes:
    """Bytes that differ at every offset that a mix-up would bring."""
    unit = b"".join(number.to_bytes(3, "big") for number in range(65_536))
    return (unit * (size_bytes // len(unit) + 1))[:size_bytes]
