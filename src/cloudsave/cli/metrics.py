"""Metrics of a running capture for Prometheus: over HTTP, or as a file for node_exporter."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloudsave.errors import ConfigurationError, UsageError
from cloudsave.logs.status import CaptureState
from cloudsave.logs.watch import Sight

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

FILE_SECONDS = 15.0
"""How often the file is written."""
GAUGES = {
    "cloudsave_rpo_seconds": "Age of the oldest commit that is not durable, measured by canaries.",
    "cloudsave_seconds_behind": "Time since when log is not known to be durable.",
    "cloudsave_bytes_behind": "Log on the server that is not durable yet.",
    "cloudsave_alarm": "1 while the watch sees something wrong.",
    "cloudsave_holes": "Holes that this capture recorded since it began.",
    "cloudsave_stored_log_bytes": "Log stored since capture began.",
    "cloudsave_stored_log_objects": "Log objects stored since capture began.",
    "cloudsave_slot_retained_bytes": "Log that the source keeps for capture.",
    "cloudsave_last_backup_timestamp_seconds": "When the newest base backup was finished.",
    "cloudsave_last_verify_timestamp_seconds": "When all that is stored was last verified and found sound.",
    "cloudsave_verify_failed": "1 when the last recorded verification found something wrong.",
    "cloudsave_repository_free_bytes": "Room for the repository, where it is a directory.",
    "cloudsave_watched_timestamp_seconds": "When these values were taken.",
}
STATE = "cloudsave_capture_state"


class Metrics:
    """The gauges of one source."""

    def __init__(self, source: str) -> None:
        client = _client()
        self.registry: CollectorRegistry = client.CollectorRegistry()
        self._gauges = {
            name: client.Gauge(name, text, ["source"], registry=self.registry)
            for name, text in GAUGES.items()
        }
        state = client.Gauge(
            STATE, "1 for the state that capture is in.", ["source", "state"], registry=self.registry
        )
        self._states = {one: state.labels(source, one.value) for one in CaptureState}
        self._source = source
        self._written_at = 0.0

    def take(self, sight: Sight, now_utc: datetime) -> None:
        """Take over what is seen. What is not known has no value."""
        status, facts = sight.status, sight.facts
        values: dict[str, float | None] = {
            "cloudsave_rpo_seconds": sight.rpo_seconds,
            "cloudsave_alarm": float(bool(sight.alarm)),
            "cloudsave_slot_retained_bytes": facts.retained_bytes,
            "cloudsave_last_backup_timestamp_seconds": facts.backup_at,
            "cloudsave_last_verify_timestamp_seconds": facts.verified_at,
            "cloudsave_verify_failed": None if facts.unsound is None else float(facts.unsound),
            "cloudsave_repository_free_bytes": facts.free_bytes,
            "cloudsave_watched_timestamp_seconds": now_utc.timestamp(),
        }
        if status is not None:
            values |= {
                "cloudsave_seconds_behind": status.seconds_behind,
                "cloudsave_bytes_behind": status.bytes_behind,
                "cloudsave_holes": status.holes,
                "cloudsave_stored_log_bytes": status.bytes_stored,
                "cloudsave_stored_log_objects": status.objects,
            }
            for state, gauge in self._states.items():
                gauge.set(float(state == status.state))
        for name, value in values.items():
            if value is None:
                with suppress(KeyError):
                    self._gauges[name].remove(self._source)
            else:
                self._gauges[name].labels(self._source).set(value)

    def serve(self, address: str) -> str:
        """
        Answer at HOST:PORT until the process ends; where that is (port 0: any free one). Raises: UsageError.
        """
        host, port = _parsed(address)
        try:
            server, _ = _client().start_http_server(port, host, registry=self.registry)
        except OSError as error:
            raise UsageError(f"cannot serve metrics at {address}", detail=f"{error.strerror}.") from error
        return f"{host}:{server.server_port}"

    def write(self, path: Path, now: float) -> None:
        """Write the file, whole and not too often. Raises: OSError."""
        if now - self._written_at >= FILE_SECONDS or self._written_at == 0.0:
            self._written_at = now
            _client().write_to_textfile(str(path), self.registry)


def _parsed(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(
            f"cannot understand address {address!r}", hints=["it looks like 127.0.0.1:9187 or [::1]:9187"]
        )
    return host.strip("[]") or "127.0.0.1", int(port)


def _client() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise ConfigurationError(
            "cannot serve metrics: the Python package prometheus-client is not installed",
            hints=["pip install 'cloudsave[watch]'"],
        ) from error
    return prometheus_client
