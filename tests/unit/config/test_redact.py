"""No password is shown, and no harmless URL is taken for one with a password."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsave.config.redact import holds_secret, redact

HARMLESS = (
    "postgresql://user@host:5432/postgres",
    "postgresql://host:5432/postgres?sslmode=verify-full&passfile=/etc/pgpass",
    "postgresql://user@h1:5432,h2:5433/postgres?target_session_attrs=read-write",
    "postgresql:///postgres?host=/run/postgresql",
    "postgresql://user@[::1]:5432/postgres",
    "s3://bucket/prefix?endpoint=http://localhost:9000&region=eu-central-1",
    "file:///srv/backups",
    "/srv/backups",
)


@pytest.mark.parametrize("url", HARMLESS)
def test_harmless_urls_stay(url: str) -> None:
    assert redact(f"could not open {url}") == f"could not open {url}"
    assert not holds_secret(url)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:geheim@h:5432/db", "postgresql://u:***@h:5432/db"),
        ("postgresql://u:ge@heim@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:ge/he?i#m@h/db", "postgresql://u:***@h/db"),
        ("postgresql://:geheim@h/db", "postgresql://:***@h/db"),
        ("see postgresql://u:geheim@h/db now", "see postgresql://u:***@h/db now"),
        ("postgresql://h/db?password=geheim&user=u", "postgresql://h/db?password=***&user=u"),
        ("host=h password='ge heim' user=u", "host=h password=*** user=u"),
        ("host=h password = geheim user=u", "host=h password = *** user=u"),
        ("az://c?sig=abc%2Fdef", "az://c?sig=***"),
        ("sslpassword=geheim", "sslpassword=***"),
        ("aws_secret_access_key=geheim", "aws_secret_access_key=***"),
        ("the key AGE-SECRET-KEY-1ABCDEF is", "the key *** is"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown


@given(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=6), st.booleans())
def test_no_password_of_a_url_survives(password: str, escaped: bool) -> None:
    password = "S" + password + "T"
    url = f"postgresql://user:{quote(password, safe='') if escaped else password}@host/db"
    assert redact(f"could not open {url} now") == "could not open postgresql://user:***@host/db now"
    assert holds_secret(url)
