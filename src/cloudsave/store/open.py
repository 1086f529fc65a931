"""From a URL to a bare back end. The wrappers are put around it by the assembly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from cloudsave.clock import Clock
from cloudsave.errors import ConfigurationError, SecretInline, StoreError, UnusableUrl
from cloudsave.store.api import ObjectStore
from cloudsave.store.memory import MemoryStore
from cloudsave.store.names import validate_name
from cloudsave.store.posix import PosixStore

if TYPE_CHECKING:
    from cloudsave.store.s3_lock import LockedBucket, LockingStore

_OPTIONS: Mapping[str, frozenset[str]] = {
    "s3": frozenset({"endpoint", "region"}),
    "gs": frozenset({"endpoint"}),
    "az": frozenset({"endpoint", "account"}),
}
_FORMS = "use an absolute path, file:///PATH, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
_SECRET_SIGNS = ("key", "secret", "token", "password", "passwd", "sig", "credential", "sas")


def open_store(url: str, *, clock: Clock, lock_days: int | None = None) -> ObjectStore:
    """
    The back end that `url` names; nothing is contacted, read or created yet.

    `lock_days`: lock each object for so long from its put on; S3 alone can.
    Raises: UnusableUrl; SecretInline for a URL that holds credentials, which are never repeated in it.
    """
    if lock_days is not None:
        return _open_locking(url, lock_days, clock)
    if url.startswith("/"):
        return PosixStore(Path(url), clock=clock)
    parts = _split(url)
    if parts.scheme == "file":
        return PosixStore(_file_path(parts), clock=clock)
    if parts.scheme == "memory":
        return MemoryStore(clock=clock)
    if parts.scheme in _OPTIONS:
        return _open_object_store(url, parts)
    if not parts.scheme:
        raise _unusable("It is neither an absolute path nor has it a scheme.")
    raise _unusable(f'Its scheme "{parts.scheme}" is not known.')


def open_versions(url: str) -> LockedBucket:
    """
    The lock and the versions of the bucket that `url` names; nothing is contacted yet. Raises: UnusableUrl,
    ConfigurationError where the driver is not installed.
    """
    parts = _split(url)
    if parts.scheme != "s3":
        raise _unusable("Object Lock and versions are for s3:// alone.")
    options, prefix = _bucket_of(parts)
    found: LockedBucket = _lock_module().open_locked_bucket(
        parts.netloc, prefix=prefix, options=options, url=url
    )
    return found


def _open_locking(url: str, days: int, clock: Clock) -> LockingStore:
    parts = _split(url)
    if parts.scheme != "s3":
        raise _unusable("repository.lock_days is for s3:// alone: other stores have no lock that we set.")
    options, prefix = _bucket_of(parts)
    store: LockingStore = _lock_module().open_locking_store(
        parts.netloc, prefix=prefix, options=options, url=url, days=days, clock=clock
    )
    return store


def _lock_module() -> ModuleType:
    try:
        # A dependency of its own, which only locked buckets need.
        from cloudsave.store import s3_lock
    except ImportError as error:
        raise ConfigurationError(
            "cannot use Object Lock: the Python package boto3 is not installed",
            hints=["pip install 'cloudsave[lock]'"],
        ) from error
    return s3_lock


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _refuse_user(parts)
    except ValueError:
        raise _unusable("It is not well-formed.") from None
    return parts


def _bucket_of(parts: SplitResult) -> tuple[Mapping[str, str], str]:
    """Options and prefix. Raises: UnusableUrl."""
    options = _options(parts)
    prefix = parts.path.strip("/")
    if not parts.netloc:
        raise _unusable("It names no bucket.")
    if prefix:
        try:
            validate_name(prefix)
        except StoreError as error:
            raise _unusable(error.detail) from None
    return options, prefix


def _open_object_store(url: str, parts: SplitResult) -> ObjectStore:
    options, prefix = _bucket_of(parts)
    # The driver is large; a command that needs no object store must not wait for it.
    from cloudsave.store.object_store import open_object_store

    return open_object_store(parts.scheme, parts.netloc, prefix=prefix, options=options, url=url)


def _options(parts: SplitResult) -> Mapping[str, str]:
    """The query as options; only harmless ones are known."""
    options: dict[str, str] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if any(sign in key.lower() for sign in _SECRET_SIGNS):
            raise _secret()
        if key not in _OPTIONS[parts.scheme] or not value or key in options:
            raise _unusable(f'Its option "{key}" is unknown, empty or given twice.')
        options[key] = value
    if parts.fragment:
        raise _unusable('It has a part behind "#".')
    if "endpoint" in options:
        endpoint = urlsplit(options["endpoint"])
        _refuse_user(endpoint)
        if endpoint.scheme not in ("http", "https") or not endpoint.netloc or endpoint.query:
            raise _unusable("Its endpoint is not http://HOST or https://HOST.")
    return options


def _file_path(parts: SplitResult) -> Path:
    if (
        parts.netloc not in ("", "localhost")
        or not parts.path.startswith("/")
        or parts.query
        or parts.fragment
    ):
        raise _unusable("A file URL has three slashes before the path and nothing behind it.")
    path = unquote(parts.path)
    if "\0" in path:
        raise _unusable("Its path holds a NUL character.")
    return Path(path)


def _refuse_user(parts: SplitResult) -> None:
    if "@" in parts.netloc:
        raise _secret()


def _unusable(detail: str) -> UnusableUrl:
    return UnusableUrl("cannot use store URL", detail=detail, hints=[_FORMS])


def _secret() -> SecretInline:
    return SecretInline(
        "cannot use store URL that holds credentials",
        detail="A URL is stored in configuration files and shown in messages.",
        hints=[
            "set the provider's environment variables, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ],
    )
