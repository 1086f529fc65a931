"""`python -m cloudsave.config.reference` prints docs/reference/configuration.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cloudsave.config.options import GLOBAL_OPTIONS, SOURCE_OPTIONS, SOURCE_PREFIX, Kind, Option

_HEAD = """\
# Configuration

<!-- Written by `python -m cloudsave.config.reference` from the table of options; a test compares. -->

One TOML file, and a variable for each option. What comes later in this list wins:

1. the defaults below,
2. `/etc/cloudsave/cloudsave.toml`,
3. `$XDG_CONFIG_HOME/cloudsave/cloudsave.toml`, or `~/.config/cloudsave/cloudsave.toml`,
4. the environment (an empty variable counts as not set),
5. the command line.

`--config FILE` or `CLOUDSAVE_CONFIG` names the only file to read, in place of 2 and 3. An unknown key is an
error. A size is a number of bytes or text with a unit: `"16 MiB"`, `"50 MB"`.

```toml
timezone = "Europe/Berlin"

[repository]
url = "s3://backups/orders"
passphrase_file = "/etc/cloudsave/passphrase"

[sources.orders]
url = "postgresql://cloudsave@db1.example:5432/postgres"
rpo_seconds = 0.5
```

## Secrets

No secret stands in the file: a passphrase, or a URL with a password, is refused. The passphrase is looked for
in this order:

1. `CLOUDSAVE_PASSPHRASE`,
2. the file that `CLOUDSAVE_PASSPHRASE_FILE` names,
3. what `repository.passphrase_command` prints,
4. the systemd credential `cloudsave-passphrase` (`LoadCredential=`, `LoadCredentialEncrypted=`),
5. the file that `repository.passphrase_file` names,
6. a prompt, if a person is there.

The recovery key, which serves in place of the passphrase, comes from `repository.recovery_key_file` or the
systemd credential `cloudsave-recovery-key`. Files with secrets must give no rights to group and others.

Passwords of database servers are libpq's matter: `~/.pgpass`, `PGPASSFILE`, `PGPASSWORD`, a service file, or
the URL's parameter `passfile`.
"""


def render() -> str:
    """The whole page."""
    parts = [_HEAD, "## Options\n", *(_section(option) for option in GLOBAL_OPTIONS)]
    parts.append(
        "## Options of a source\n\n"
        "Each source has a table `[sources.NAME]`. In variables the name is in upper case, `_` for `-`:\n"
        f"`{SOURCE_PREFIX}ORDERS_URL` alone makes a source `orders`.\n"
    )
    parts.extend(_section(option) for option in SOURCE_OPTIONS)
    return "\n".join(parts)


def _section(option: Option) -> str:
    variable = f"{SOURCE_PREFIX}NAME_{option.environment}" if option.per_source else option.environment
    facts = [f"variable `{variable}`", _values(option)]
    if not option.secret:
        facts.append(f"default: {_default(option)}")
    return f"### `{option.toml}`\n\n{option.help}\n\n" + "".join(f"- {fact}\n" for fact in facts)


def _values(option: Option) -> str:
    if option.choices:
        return "one of " + ", ".join(f"`{choice}`" for choice in option.choices)
    limits: Sequence[str] = [
        f"{word} {number:g}" if option.kind is not Kind.SIZE else f"{word} {int(number)}"
        for word, number in (("at least", option.minimum), ("at most", option.maximum))
        if number is not None
    ]
    kind = f"{option.kind.value}, secret" if option.secret else option.kind.value
    return ", ".join([kind, *limits])


def _default(option: Option) -> str:
    if option.default is None:
        return option.default_text or "not set"
    if isinstance(option.default, bool):
        return f"`{str(option.default).lower()}`"
    if option.kind is Kind.SIZE:
        return f"`{option.default}` ({int(option.default) // 2**20} MiB)"
    return f"`{option.default}`"


if __name__ == "__main__":
    sys.stdout.write(render())
