"""How a backup is told of: by the command that takes it, and by those that list and show."""

from __future__ import annotations

import dataclasses

from cloudsave.cli.formats import format_duration, format_rate, format_size
from cloudsave.cli.frame import CommandContext
from cloudsave.model.manifest import ChangeDetection, Manifest, Rung

CORRUPT_PAGES_SHOWN_MAX = 10


def show_backup(context: CommandContext, manifest: Manifest) -> None:
    """Print a backup that is complete."""
    output, counts = context.output, manifest.statistics

    def human() -> None:
        how = f"{manifest.kind}, {manifest.method}"
        output.line(f"backup {manifest.backup_id} of {manifest.source} is complete ({how})")
        rate = format_rate(counts.bytes_read / max(counts.seconds, 0.001))
        read = f"{format_size(counts.bytes_read)} in {format_duration(counts.seconds)}, {rate}"
        pages = f"{counts.blocks_stored} pages new, {counts.blocks_reused} reused, {counts.blocks_zero} empty"
        stored = f"{format_size(counts.bytes_stored)}; {pages}"
        output.pairs([("read", read), ("stored", stored), ("changes", detection_text(manifest.detection))])
        for note in manifest.notes:
            output.line(f"note: {note}")
        for page in manifest.corrupt_pages[:CORRUPT_PAGES_SHOWN_MAX]:
            output.line(f"DAMAGED IN THE SOURCE: page {page.block} of {page.path}: {page.reason}")
        if manifest.corrupt_pages:
            output.line(
                f"{len(manifest.corrupt_pages)} damaged pages: older backups may hold good copies; keep them"
            )

    output.emit(manifest_facts(manifest), human)


def detection_text(detection: ChangeDetection) -> str:
    """How the backup learned what had changed, in a sentence."""
    if detection.rung in (Rung.LOG, Rung.SUMMARIES):
        unread = format_size(detection.bytes_unread)
        whole = len(detection.whole_files)
        who = "the log" if detection.rung is Rung.LOG else f"the server's summaries ({detection.reason})"
        return f"told by {who}; {unread} taken unread" + (f", {whole} files read whole" if whole else "")
    if detection.rung is Rung.COMPARE:
        return f"everything was read and compared: {detection.reason}"
    return "everything was stored" if detection.rung is Rung.FULL else "not recorded"


def manifest_facts(manifest: Manifest) -> dict[str, object]:
    """A manifest for JSON: all but the file table, of which the number is told."""
    facts: dict[str, object] = {
        field.name: getattr(manifest, field.name)
        for field in dataclasses.fields(manifest)
        if field.name not in ("files", "maps", "packs")
    }
    return facts | {"files": len(manifest.files), "packs": len(manifest.packs), "maps": len(manifest.maps)}
