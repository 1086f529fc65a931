"""
Telling people and services of alarms: signed webhooks, whatever Apprise knows, and a heartbeat.

All is sent by one thread from a bounded queue: who cannot be reached holds up nothing. Addresses may hold
secrets and are never logged, but for the host.

    POST webhook_url
    Cloudsave-Signature: t=<seconds since 1970>,v1=<hex HMAC-SHA256 of "<t>." || body>
    {"version": 1, "event": "alarm" | "cleared" | "notice" | "ended", "source", "text", "at", "rpo_seconds"}
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cloudsave.clock import Clock
from cloudsave.config.credentials import read_passphrase_file, read_private_lines
from cloudsave.config.model import NotifyConfig
from cloudsave.errors import ConfigurationError

SIGNATURE_HEADER = "Cloudsave-Signature"
REQUEST_SECONDS_MAX = 10.0
TRIES = 4
PAUSE_SECONDS = 2.0
"""Before the second try; doubled for each one more."""
WAITING_MAX = 100
"""Limit: notices that wait; the newest are dropped, and that is logged."""
LEAVE_SECONDS_MAX = 15.0
"""Limit: how long the end of capture waits for what is still to be told."""

_log = logging.getLogger("cloudsave.cli.notices")


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing to be told."""

    event: str
    source: str
    text: str
    at: str
    rpo_seconds: float | None = None

    def body(self) -> bytes:
        """As a webhook sends it."""
        fields = {name: getattr(self, name) for name in ("event", "source", "text", "at", "rpo_seconds")}
        return json.dumps({"version": 1, **fields}, sort_keys=True).encode()


def signature(secret: bytes, moment: int, body: bytes) -> str:
    """The value of the header that proves where a webhook comes from, and when it was sent."""
    digest = hmac.new(secret, f"{moment}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={moment},v1={digest}"


class Notifier:
    """Sends what it is told, in order. Order: tell and beat at any time, then close."""

    def __init__(self, config: NotifyConfig, *, clock: Clock) -> None:
        """Raises: ConfigurationError for an unusable address, or a secret that is open to others."""
        for option in ("webhook_url", "heartbeat_url"):
            _check_url(option, getattr(config, option))
        self._config = config
        self._clock = clock
        self._secret = _secret(config)
        self._apprise = _apprise(config.apprise_file)
        self._beat_at = -config.heartbeat_seconds
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue(WAITING_MAX)
        self._thread = threading.Thread(target=self._run, name="notices", daemon=True)
        self._thread.start()

    def tell(self, notice: Notice) -> None:
        """Queue a notice. Never blocks."""
        if self._config.webhook_url:
            self._put(lambda: self._try("webhook", lambda: self._post(notice)))
        if self._apprise is not None:
            self._put(lambda: self._try("apprise", lambda: self._by_apprise(notice)))

    def beat(self) -> None:
        """All is well: send a heartbeat if it is time."""
        url, now = self._config.heartbeat_url, self._clock.monotonic()
        if url and now - self._beat_at >= self._config.heartbeat_seconds:
            self._beat_at = now
            self._put(lambda: _request(url, None, {}))

    def close(self) -> None:
        """Send what waits, for a while."""
        self._put(None)
        self._thread.join(LEAVE_SECONDS_MAX)

    def _put(self, work: Callable[[], None] | None) -> None:
        try:
            self._work.put_nowait(work)
        except queue.Full:
            _log.error("a notice was dropped: %d wait to be sent", WAITING_MAX)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a service's client may raise anything
                _log.warning("could not send: %s", _harmless(error))

    def _try(self, what: str, send: Callable[[], None]) -> None:
        for number in range(1, TRIES + 1):
            try:
                return send()
            except Exception as error:  # noqa: BLE001 - as above
                _log.warning("%s could not be sent, try %d of %d: %s", what, number, TRIES, _harmless(error))
            if number < TRIES:
                self._clock.sleep(PAUSE_SECONDS * 2 ** (number - 1))
        _log.error("%s was given up", what)
        return None

    def _post(self, notice: Notice) -> None:
        body = notice.body()
        headers = {"Content-Type": "application/json"}
        if self._secret is not None:
            moment = int(self._clock.now().timestamp())
            headers[SIGNATURE_HEADER] = signature(self._secret, moment, body)
        _request(str(self._config.webhook_url), body, headers)

    def _by_apprise(self, notice: Notice) -> None:
        title = f"cloudsave: {notice.source}: {notice.event}"
        if not self._apprise.notify(title=title, body=notice.text):
            raise OSError("a service refused it or cannot be reached")


def _check_url(option: str, url: str | None) -> None:
    """Raises: ConfigurationError, without the address."""
    try:
        fit = url is None or (urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname))
    except ValueError:
        fit = False
    if not fit:
        raise ConfigurationError(f"notify.{option} is no address", detail="It is not https://HOST/....")


def _request(url: str, body: bytes | None, headers: dict[str, str]) -> None:
    """One request whose answer is 2xx. Raises: OSError."""
    request = urllib.request.Request(url, data=body, headers=headers)  # noqa: S310 - checked: http
    with urllib.request.urlopen(request, timeout=REQUEST_SECONDS_MAX):  # noqa: S310
        pass


def _harmless(error: Exception) -> str:
    """What may be logged of an error: nothing that could hold an address."""
    if isinstance(error, urllib.error.HTTPError):
        return f"{urlsplit(error.url or '').hostname} answered {error.code}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


def _secret(config: NotifyConfig) -> bytes | None:
    if config.webhook_key_file is None:
        return None
    return read_passphrase_file(config.webhook_key_file).encode()


def _apprise(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        import apprise
    except ImportError as error:
        raise ConfigurationError(
            "cannot notify by Apprise: the Python package apprise is not installed",
            hints=["pip install 'cloudsave[watch]'"],
        ) from error
    made = apprise.Apprise()
    for number, line in enumerate(read_private_lines(path), 1):
        if not made.add(line):
            raise ConfigurationError(
                f'cannot use line {number} of file "{path}"', detail="Apprise does not understand its URL."
            )
    return made
