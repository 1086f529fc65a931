"""Who a server with a binlog is: what MySQL and MariaDB tell alike."""

from __future__ import annotations

from cloudsave.engines.binlog.position import LOG_FILE_BYTES
from cloudsave.errors import UnsupportedVersion
from cloudsave.model.identity import Role, SourceIdentity


def release_of(product: str, said: str, *, minimum: tuple[int, int]) -> tuple[str, int]:
    """The version number and its first part, from what VERSION() says. Raises: UnsupportedVersion."""
    number, _, _ = said.partition("-")
    parts = tuple(int(part) for part in number.split("."))
    if parts[:2] < minimum:
        raise UnsupportedVersion(
            f"cannot protect {product} {parts[0]}.{parts[1]}",
            detail=f"The server is version {said}; supported is {minimum[0]}.{minimum[1]} and later.",
        )
    return number, parts[0]


def identity_of(
    engine: str,
    identifier: str,
    release: tuple[str, int],
    *,
    directory: str,
    page_bytes: int,
    read_only: bool,
) -> SourceIdentity:
    """The identity of a server, which is also the name of its only branch (decision 0028)."""
    number, major = release
    return SourceIdentity(
        engine=engine,
        system_identifier=identifier,
        version=number,
        major=major,
        branch=identifier,
        role=Role.REPLICA if read_only else Role.PRIMARY,
        data_directory=directory,
        page_bytes=page_bytes,
        log_file_bytes=LOG_FILE_BYTES,
        page_checksums=True,
        ragged_log=True,
    )
