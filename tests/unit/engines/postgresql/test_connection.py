"""URLs become connection strings, and a password never becomes part of an error."""

from __future__ import annotations

import pytest
from psycopg.conninfo import conninfo_to_dict

from cloudsave.engines.postgresql.connection import connect, conninfo, grant_statement
from cloudsave.errors import CloudsaveError, EngineUnavailable, UnusableUrl

SECRET = "s3cr3t"


def test_defaults_give_way_to_the_url_and_it_to_overrides() -> None:
    info = conninfo_to_dict(conninfo("postgresql://u@h/d?connect_timeout=3&keepalives=0", dbname="other"))
    assert info["connect_timeout"] == "3"
    assert info["keepalives"] == "0"
    assert info["keepalives_idle"] == "30"
    assert info["dbname"] == "other"
    assert info["user"] == "u"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:{SECRET}@h:notaport/d?nonsense={SECRET}",
        f"postgresql://u:p@{SECRET}@h/d",
        f"postgresql://u:{SECRET}%zz@h/d",
        f"host=h password='{SECRET}",
    ],
)
def test_unusable_url_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(CloudsaveError) as caught:
        connect(url, application_name="test")
    assert SECRET not in str(caught.value)
    assert isinstance(caught.value, UnusableUrl)
    assert caught.value.__suppress_context__


def test_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(EngineUnavailable) as caught:
        connect(f"postgresql://u:{SECRET}@127.0.0.1:1/d", application_name="test")
    assert caught.value.retryable
    assert SECRET not in str(caught.value)


def test_grant_quotes_the_role() -> None:
    expected = 'GRANT EXECUTE ON FUNCTION pg_catalog.pg_backup_stop(boolean) TO "a""b";'
    assert grant_statement("pg_backup_stop", 'a"b') == expected
