"""The commands: name -> where it is, and the line that `cloudsave --help` shows without importing it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One command."""

    target: str
    """`module:attribute` of a click command."""
    short_help: str


COMMANDS = {
    "init": Entry("cloudsave.cli.init:init", "Make a new repository."),
    "source": Entry(
        "cloudsave.cli.source:source", "The database servers to protect: add, list, show, remove."
    ),
    "check": Entry("cloudsave.cli.check:check", "Is a source protectable, and is it protected?"),
    "backup": Entry("cloudsave.cli.backup:backup", "Take a base backup."),
    "logs": Entry("cloudsave.cli.logs:logs", "The log of a source: capture, status, archive hooks."),
    "list": Entry("cloudsave.cli.catalog:list_backups", "List backups."),
    "ranges": Entry("cloudsave.cli.ranges:ranges", "Show to which states a source can be restored."),
    "find": Entry(
        "cloudsave.cli.find:find",
        "Find in the log what dropped or deleted data, and where to stop before it.",
    ),
    "show": Entry("cloudsave.cli.catalog:show", "Show one backup."),
    "restore": Entry("cloudsave.cli.restore:restore", "Bring a database back, to any state that is stored."),
    "verify": Entry("cloudsave.cli.verify:verify", "Check stored backups and log against what they promise."),
    "expire": Entry(
        "cloudsave.cli.expire:expire", "Remove the backups and log that no retention rule keeps."
    ),
    "gc": Entry("cloudsave.cli.collect:gc", "Free the space of what no backup needs any more."),
    "hold": Entry("cloudsave.cli.hold:hold", "Keep single backups, whatever the retention rules say."),
    "store": Entry("cloudsave.cli.store:store", "Test whether a store keeps the promises that backups need."),
    "key": Entry("cloudsave.cli.key:key", "Passphrases and recipients that open the repository."),
    "demo": Entry("cloudsave.cli.demo:demo", "The whole story on an embedded PostgreSQL in a minute."),
    "completion": Entry("cloudsave.cli.completion:completion", "Print the completion script of a shell."),
}
