"""The tar parser against the standard library's writer, in every split, and against damage."""

from __future__ import annotations

import io
import itertools
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsave.engines.postgresql.format_tar import TarMember, TarParser, parse_header
from cloudsave.errors import IntegrityError

FILES = {"PG_VERSION": b"18\n", "base/5/16384": bytes(range(256)) * 65, "empty": b"", "base/5/1": b"x" * 512}


def archive(files: dict[str, bytes]) -> bytes:
    """A ustar archive as PostgreSQL writes it, with a directory and a link."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as writer:
        directory = tarfile.TarInfo("pg_wal")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o700
        writer.addfile(directory)
        link = tarfile.TarInfo("pg_tblspc/16385")
        link.type, link.linkname = tarfile.SYMTYPE, "/srv/space"
        writer.addfile(link)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(content), 0o600, 1700000000
            writer.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def read(data: bytes, splits: list[int]) -> tuple[dict[str, bytes], list[TarMember]]:
    """Feed `data` cut at `splits`; files and the other members."""
    parser, files, others = TarParser(), dict[str, bytes](), list[TarMember]()
    name = ""
    cuts = [0, *sorted(min(cut, len(data)) for cut in splits), len(data)]
    for begin, end in itertools.pairwise(cuts):
        for event in parser.feed(memoryview(data)[begin:end]):
            if isinstance(event, TarMember):
                name = event.path
                if event.type == "file":
                    files[name] = b""
                    assert event.mode == 0o600
                    assert event.modified_seconds == 1700000000
                else:
                    others.append(event)
            else:
                files[name] += bytes(event)
    parser.finish()
    return files, others


@given(st.lists(st.integers(0, 20000), max_size=30))
def test_any_split_gives_the_same_files(splits: list[int]) -> None:
    files, others = read(archive(FILES), splits)
    assert files == FILES
    assert [(member.path, member.type, member.link_target) for member in others] == [
        ("pg_wal", "directory", ""),
        ("pg_tblspc/16385", "link", "/srv/space"),
    ]


def test_archive_without_end_blocks_is_whole() -> None:
    data = archive(FILES).rstrip(b"\0")
    data += bytes(-len(data) % 512)
    assert read(data, [])[0] == FILES


def test_archive_cut_within_a_file_is_refused() -> None:
    with pytest.raises(IntegrityError):
        read(archive({"f": b"x" * 5000})[: 1024 + 512 + 4000], [])


def test_size_above_eight_gigabytes_is_read() -> None:
    member = tarfile.TarInfo("log/big")
    member.size = 9 << 30
    header = member.tobuf(format=tarfile.GNU_FORMAT)
    assert parse_header(header).size_bytes == 9 << 30


@pytest.mark.parametrize("name", ["/etc/passwd", "base/../../etc/passwd", "../x"])
def test_path_that_leaves_the_directory_is_refused(name: str) -> None:
    with pytest.raises(IntegrityError):
        parse_header(tarfile.TarInfo(name).tobuf(format=tarfile.USTAR_FORMAT))


def test_unknown_member_types_are_refused() -> None:
    member = tarfile.TarInfo("device")
    member.type = tarfile.CHRTYPE
    with pytest.raises(IntegrityError):
        parse_header(member.tobuf(format=tarfile.USTAR_FORMAT))


@given(st.integers(0, 511), st.integers(1, 255))
def test_every_changed_byte_of_a_header_is_noticed_or_harmless(place: int, change: int) -> None:
    """The checksum counts every byte, so that no single change passes but in the checksum's own padding."""
    member = tarfile.TarInfo("base/5/16384")
    member.size = 8192
    header = bytearray(member.tobuf(format=tarfile.USTAR_FORMAT))
    good = parse_header(bytes(header))
    header[place] ^= change
    try:
        assert parse_header(bytes(header)) == good
        assert 148 <= place < 156
    except IntegrityError:
        pass


@given(st.binary(max_size=3000))
def test_garbage_never_ends_in_another_error(data: bytes) -> None:
    try:
        read(data, [])
    except IntegrityError:
        pass
    except KeyError:
        pytest.fail("contents without a member")
