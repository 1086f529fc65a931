"""Notices are signed, tried again, and never show an address or a secret."""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

import pytest

from cloudsave.cli.notices import WAITING_MAX, Notice, Notifier, signature
from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.config.model import NotifyConfig
from cloudsave.errors import ConfigurationError
from tests.fake_clock import FakeClock

NOTICE = Notice("alarm", "orders", "commits are not durable", "2026-11-26T00:00:00+00:00", 42.0)


def test_a_signature_is_that_of_moment_and_body() -> None:
    made = signature(b"key", 1_700_000_000, NOTICE.body())
    digest = hmac.new(b"key", b"1700000000." + NOTICE.body(), hashlib.sha256).hexdigest()
    assert made == f"t=1700000000,v1={digest}"
    assert signature(b"other", 1_700_000_000, NOTICE.body()) != made
    assert signature(b"key", 1_700_000_001, NOTICE.body()) != made


def test_an_address_that_cannot_be_reached_is_tried_again_and_not_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    logging.getLogger("cloudsave").propagate = True
    notifier = Notifier(NotifyConfig(webhook_url="http://127.0.0.1:9/token-geheim99"), clock=clock)
    notifier.tell(NOTICE)
    notifier.close()
    assert len(clock.sleeps) == 3
    assert "given up" in caplog.text
    assert "geheim99" not in caplog.text


def test_who_cannot_be_reached_holds_up_nothing() -> None:
    notifier = Notifier(NotifyConfig(webhook_url="http://127.0.0.1:9/"), clock=FakeClock())
    for _ in range(WAITING_MAX * 3):
        notifier.tell(NOTICE)
    notifier.close()


def test_secrets_that_others_may_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("key")
    path.chmod(0o644)
    for config in (
        NotifyConfig(webhook_url="http://h/", webhook_key_file=path),
        NotifyConfig(apprise_file=path),
    ):
        with pytest.raises(ConfigurationError, match="open to other users"):
            Notifier(config, clock=SYSTEM_CLOCK)


@pytest.mark.parametrize(
    "url", ["geheim99", "file:///geheim99", "ftp://geheim99/", "http:///geheim99", "http://[x"]
)
def test_what_is_no_address_of_the_web_is_refused_and_not_shown(url: str) -> None:
    for config in (NotifyConfig(webhook_url=url), NotifyConfig(heartbeat_url=url)):
        with pytest.raises(ConfigurationError, match="no address") as caught:
            Notifier(config, clock=SYSTEM_CLOCK)
        assert "geheim99" not in str(caught.value)


def test_apprise_gets_the_urls_of_its_file_and_refuses_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "urls"
    path.touch(mode=0o600)
    path.write_text("# where alarms go\njson://127.0.0.1:9/geheim99\n")
    Notifier(NotifyConfig(apprise_file=path), clock=FakeClock()).close()
    path.write_text("nonsense-geheim99\n")
    with pytest.raises(ConfigurationError, match="line 1") as caught:
        Notifier(NotifyConfig(apprise_file=path), clock=SYSTEM_CLOCK)
    assert "geheim99" not in str(caught.value)


def test_no_address_is_shown_with_the_configuration() -> None:
    config = NotifyConfig(webhook_url="http://h/geheim99", heartbeat_url="http://h/geheim99")
    assert "geheim99" not in repr(config)
