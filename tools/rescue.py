#!/usr/bin/env python3
"""
Restores backups from a cloudsave repository without cloudsave. Written from docs/repository_format.md alone.

Needs Python 3.11 and the packages zstandard, blake3 and cryptography. Reads a repository in a directory; copy
one from an object store first. With an age recovery key instead of the passphrase, get the repository key by
    jq -r .wrapped keys/ID | base64 -d | age -d -i recovery-key.txt > repository.key
Every byte is verified. Exit codes: 0 done, 1 failed, 2 usage, 5 the key is wrong or something stored damaged.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

BLOCK, ZEROS, FRAME_PLAIN_MAX = 8192, 0xFFFFFFFF, 64 << 20
PACK, MAP, MANIFEST, LOG, RECORD = 1, 2, 3, 4, 5
HEADER, FOOTER, FRAME_HEADER, REVOCATION_BYTES = 32, 120, struct.Struct("<IIIBB2x"), 184
Segment = tuple[int, list[tuple[int, ...]], list[tuple[int, ...]]]  # size of a file, frames, runs of blocks
Placed = tuple[dict[str, Any], Path]  # row of the manifest, where it goes
Run = tuple[int, int, int, Path, int, int]  # offset, number of a frame; place in it; file, place in it, bytes
Stretch = tuple[int, int, str]  # log from, log to, object
LOG_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})-[0-9a-f]{16}-[0-9a-f]{16}")


class Damaged(Exception):
    """Something stored is not what was written, or the key is wrong."""


def derive(secret: bytes, info: str, salt: bytes = b"") -> bytes:
    """32 bytes by HKDF-SHA256."""
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info.encode()).derive(secret)


def open_key(root: Path, wanted: str, options: argparse.Namespace) -> bytes:
    """The repository key, from a file or by a passphrase slot."""
    if options.repository_key_file:
        keys = [Path(options.repository_key_file).read_bytes()]
    else:
        passphrase = Path(options.passphrase_file).read_text(encoding="utf-8").rstrip("\r\n").encode()
        keys = [open_slot(path, wanted, passphrase) for path in sorted((root / "keys").iterdir())]
    for key in keys:
        if key and wanted == derive(key, "cloudsave v1 key id").hex()[:32]:
            return key
    raise Damaged("the passphrase or key file does not open this repository")


def open_slot(path: Path, wanted: str, passphrase: bytes) -> bytes:
    """The key in a passphrase slot; nothing where it is another slot or the passphrase is wrong."""
    try:
        slot = json.loads(path.read_bytes())
        if slot.pop("blake3") != blake3(json.dumps(slot, sort_keys=True).encode()).hexdigest():
            raise ValueError
        if slot["key_id"] != wanted or slot["type"] != "argon2id":
            return b""
        if slot["memory_kib"] > 4 << 20 or slot["iterations"] > 64 or slot["lanes"] > 64:
            raise ValueError
        salt, nonce, wrapped = (base64.b64decode(slot[name]) for name in ("salt", "nonce", "wrapped"))
        cost = {"iterations": slot["iterations"], "lanes": slot["lanes"], "memory_cost": slot["memory_kib"]}
        wrapping = Argon2id(salt=salt, length=32, **cost).derive(passphrase)
        return AESGCM(wrapping).decrypt(nonce, wrapped, b"cloudsave v1 key slot")
    except InvalidTag:
        pass  # Another passphrase.
    except (ValueError, KeyError, TypeError, AttributeError):
        print(f"WARNING: key slot {path.name} is damaged", file=sys.stderr)
    return b""


class Lineage:
    """Everything stored of one database server."""

    def __init__(self, root: Path, repository_key: bytes, lineage: str) -> None:
        self.root, self.id, self.directory = root, lineage, root / "lineages" / lineage
        self.key = derive(repository_key, f"cloudsave v1 lineage {lineage}")
        signer = Ed25519PrivateKey.from_private_bytes(derive(self.key, "cloudsave v1 signing key"))
        self.verifier = signer.public_key()
        stated = json.loads((self.directory / "identity").read_bytes())["public_key"]
        if bytes.fromhex(stated) != self.verifier.public_bytes_raw():
            raise Damaged(f"the identity of lineage {lineage} names a foreign signing key")

    def backups(self) -> list[str]:
        """Ids of committed backups, oldest first."""
        found = sorted((path.name, path.stat().st_size) for path in self.directory.glob("backups/[0-9]*"))
        small = [f"backups/{name}" for name, size in found if size == REVOCATION_BYTES]
        revoked = [name[8:] for name in small if not Container(self, name, RECORD).content()]
        return [name for name, _ in found if name not in revoked]

    def manifest(self, backup: str) -> dict[str, Any]:
        """A manifest, its signature checked."""
        manifest: dict[str, Any] = json.loads(Container(self, f"backups/{backup}", MANIFEST).content())
        if manifest["format"] != 1 or (manifest["lineage"], manifest["backup_id"]) != (self.id, backup):
            raise Damaged(f"the manifest of {backup} is of another format or backup")
        rows = [dict(zip(manifest["file_columns"], row, strict=True)) for row in manifest["files"]]
        return {**manifest, "files": rows}

    def logs(self) -> dict[str, list[Stretch]]:
        """Stored stretches (first, last, name) by branch, from names alone."""
        found: dict[str, list[Stretch]] = {}
        for path in sorted(self.directory.glob("logs/*/*/*")):
            if match := LOG_NAME.fullmatch(path.name):
                name = "/".join(path.parts[-4:])
                found.setdefault(path.parts[-3], []).append((int(match[1], 16), int(match[2], 16), name))
        return found


class Container:
    """One object, read as a whole; magics, checksum and signature are checked at once, frames when opened."""

    def __init__(self, lineage: Lineage, name: str, kind: int) -> None:
        self.name = f"lineages/{lineage.id}/{name}"
        if not (lineage.root / self.name).exists():
            raise Damaged(f"object {self.name} is missing")
        self.bytes = view = (lineage.root / self.name).read_bytes()
        self.end = len(view) - FOOTER
        if self.end < HEADER or view[:4] != b"CSV1" or view[-8:] != b"CSV1END\n" or view[4] != kind:
            raise Damaged(f"object {self.name}: it is truncated or not what its name says")
        _, self.frames, _, digest, signature = struct.unpack("<QII32s64s", view[self.end : -8])
        if blake3(view[: self.end + 16]).digest() != digest:
            raise Damaged(f"object {self.name}: its checksum is wrong")
        if kind == MANIFEST or any(signature):
            try:
                lineage.verifier.verify(signature, b"cloudsave v1 " + self.name.encode() + b"\0" + digest)
            except InvalidSignature:
                raise Damaged(f"object {self.name}: its signature is wrong") from None
        self.associated = lineage.id.encode() + b"\0"
        self.aead = AESGCM(derive(lineage.key, f"cloudsave v1 object {self.name}", view[8:HEADER]))

    def frame(self, offset: int, number: int) -> tuple[bytes, int]:
        """The plain bytes of the frame at `offset`, and the offset behind it."""
        header = self.bytes[offset : offset + 16]
        stated, plain_bytes, sealed_bytes, codec, last = FRAME_HEADER.unpack(header)
        begin, end = offset + 16, offset + 16 + sealed_bytes
        if stated != number or plain_bytes > FRAME_PLAIN_MAX or end > self.end or codec not in (0, 1):
            raise Damaged(f"object {self.name}: the header of frame {number} is wrong")
        try:
            nonce = number.to_bytes(12, "big")
            plain = self.aead.decrypt(nonce, self.bytes[begin:end], self.associated + header)
            if codec == 1:
                plain = zstandard.ZstdDecompressor().decompress(plain, max_output_size=plain_bytes)
        except (InvalidTag, zstandard.ZstdError):
            raise Damaged(f"object {self.name}: frame {number} fails its authentication") from None
        if len(plain) != plain_bytes or last != (number == self.frames - 1):
            raise Damaged(f"object {self.name}: frame {number} has a wrong length, or others are missing")
        return plain, end

    def content(self, first: int = 0) -> bytes:
        """The concatenation of the frames from `first` on; all of them must be right and fill the object."""
        frames, offset = [], HEADER
        for number in range(self.frames):
            plain, offset = self.frame(offset, number)
            frames.append(plain)
        if not frames or offset != self.end:
            raise Damaged(f"object {self.name}: its frames do not fill it")
        return b"".join(frames[first:])


def parse_maps(content: bytes) -> tuple[list[str], list[Segment]]:
    """Pack names and segment maps of a map object."""
    magic, pack_count, segment_count = struct.unpack_from("<4sII", content)
    offset, packs, segments = 12, [], []
    for _ in range(pack_count):
        (length,) = struct.unpack_from("<H", content, offset)
        packs.append(content[offset + 2 : offset + 2 + length].decode("ascii"))
        offset += 2 + length
    old, offset = magic == b"MAP1", offset + -offset % 8
    for _ in range(segment_count):
        size, frame_count, run_count, blocks = struct.unpack_from("<QIIQ", content, offset)
        runs_at = offset + (24 if old else 16) + 24 * frame_count
        end = runs_at + (16 if old else 12) * run_count
        rows = struct.iter_unpack("<IIQII", content[runs_at - 24 * frame_count : runs_at])
        runs = struct.iter_unpack("<IIII", content[runs_at:end]) if old else parse_runs(content[runs_at:end])
        segments.append((size, [*rows], [*runs]))
        offset = end + (8 * blocks if old else (offset - end) % 8)
    if magic not in (b"MAP1", b"MAP2") or offset != len(content):
        raise Damaged("a map object is none, or has the wrong length")
    return packs, segments


def parse_runs(planes: bytes) -> Iterator[tuple[int, ...]]:
    """Runs as the older maps have them, from columns in planes of bytes."""
    block = 0
    for n in range(rows := len(planes) // 12):
        blocks, frame, place = struct.unpack("<III", planes[n::rows])
        yield block, blocks, frame, place * BLOCK
        block += blocks


def stored_runs(lineage: Lineage, manifest: dict[str, Any], files: list[Placed]) -> dict[str, list[Run]]:
    """All stored blocks of all files, by pack."""
    by_pack: dict[str, list[Run]] = {}
    current = -1
    for row, place in sorted(files, key=lambda file: int(file[0]["map_index"])):
        if row["map_index"] != current:
            current = row["map_index"]
            name = f"maps/{manifest['maps'][current]}"
            packs, segments = parse_maps(Container(lineage, name, MAP).content())
        expected, (size, frames, runs) = 0, segments[row["map_ordinal"]]
        for block, count, frame, within in runs:
            if block != expected or (frame != ZEROS and frame >= len(frames)):
                raise Damaged(f"the map of {row['path']} has a gap or names a frame that it does not list")
            expected += count
            if frame != ZEROS:
                pack, number, offset, _, _ = frames[frame]
                run = (offset, number, within, place, block * BLOCK, min(count * BLOCK, size - block * BLOCK))
                by_pack.setdefault(packs[pack], []).append(run)
        if size != row["size_bytes"] or expected != -(-size // BLOCK):
            raise Damaged(f"the map of {row['path']} is of another size than the file")
    return by_pack


class Target:
    """Where the files of a backup go: DIR, DIR.tablespaces and DIR.outside, and nowhere else."""

    def __init__(self, manifest: dict[str, Any], into: Path) -> None:
        self.into, self.places = into, list[Placed]()
        self.tablespaces = into.with_name(into.name + ".tablespaces")
        self.outside = into.with_name(into.name + ".outside")
        self.links = [row["path"] for row in manifest["files"] if row["kind"] == "link"]
        if not all(re.fullmatch(r"pg_tblspc/[0-9]+", path) for path in self.links):
            raise SystemExit(f"rescue: error: a link is in a place where none belongs: {self.links}")
        for row in manifest["files"]:
            parts = row["path"].split("/")[1 if row["outside"] else 0 :]
            if not parts or any(part in ("", ".", "..") or "\0" in part for part in parts):
                raise SystemExit(f"rescue: error: path {row['path']!r} would leave the target directory")
            place = self.outside.joinpath(*parts) if row["outside"] else into.joinpath(*parts)
            if not row["outside"] and "/".join(parts[:2]) in self.links:
                place = self.tablespaces.joinpath(*parts[1:])
            if row["kind"] != "link":
                self.places.append((row, place))
        if len({place for _, place in self.places}) != len(self.places):
            raise SystemExit("rescue: error: the manifest names a path twice")


def restore_files(lineage: Lineage, manifest: dict[str, Any], target: Target) -> None:
    """All directories, files and links of a backup."""
    target.into.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.into.chmod(0o700)
    for row, place in target.places:
        is_file = row["kind"] == "file"
        (place.parent if is_file else place).mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_file:
            with place.open("xb") as file:
                file.truncate(row["size_bytes"])
    by_pack = stored_runs(lineage, manifest, [one for one in target.places if one[0]["size_bytes"]])
    for done, (pack, runs) in enumerate(sorted(by_pack.items()), 1):
        container, opened, plain = Container(lineage, f"packs/{pack}", PACK), -1, b""
        for offset, number, within, path, position, length in sorted(runs):
            if offset != opened:
                plain, opened = container.frame(offset, number)[0], offset
            if within + length > len(plain):
                raise Damaged(f"frame {number} of pack {pack} is shorter than a map says")
            with path.open("r+b") as file:
                file.seek(position)
                file.write(plain[within : within + length])
        print(f"pack {done} of {len(by_pack)} restored", file=sys.stderr)
    for link in target.links:
        (target.into / link).symlink_to(target.tablespaces / link[10:])
    for row, place in reversed(target.places):
        place.chmod(row["mode"] & 0o777)
    if target.links:  # PostgreSQL makes the links anew from this file.
        lines = "".join(f"{link[10:]} {target.tablespaces / link[10:]}\n" for link in target.links)
        (target.into / "tablespace_map").write_text(lines)


def cover(stretches: list[Stretch], begin: int) -> Iterator[Stretch]:
    """Stretches that follow one another from `begin` on, as far as the log goes."""
    best = (0, 0, "")
    for stretch in [*sorted(stretches), (1 << 64, 0, "")]:
        if stretch[0] > begin and best[1] > begin:
            yield best
            begin = best[1]
        if stretch[0] > begin:
            return
        best = max(best, stretch, key=lambda one: one[1])


def descendants(lineage: Lineage, branch: str, start: int) -> dict[str, tuple[int, bytes]]:
    """Branches that left `branch` after `start`, however indirectly: where each begins, its history file."""
    found = {}
    for name in sorted(path.parent.name for path in lineage.directory.glob("logs/*/history")):
        content = Container(lineage, f"logs/{name}/history", RECORD).content()
        rows = re.findall(rb"^\s*(\d+)\s+([0-9A-F]+)/([0-9A-F]+)", content, re.MULTILINE)
        points = [(f"{int(tli):08X}", int(high, 16) << 32 | int(low, 16)) for tli, high, low in rows]
        if name == branch or any(parent == branch and switch >= start for parent, switch in points):
            found[name] = (start if name == branch else points[-1][1], content)
    return found


def restore_log(lineage: Lineage, manifest: dict[str, Any], wal_into: Path) -> None:
    """Log from the start of the backup on: WAL files at full length (zeros end the log), history files."""
    size, (branch, start) = manifest["log_file_bytes"], manifest["start"]
    per_id, logs = (1 << 32) // size, lineage.logs()
    for name, (begin, history) in {branch: (start, b""), **descendants(lineage, branch, start)}.items():
        if history:
            (wal_into / f"{name}.history").write_bytes(history)
        at = begin // size * size
        for first, last, object_name in cover(logs.get(name, []), at):
            log = Container(lineage, object_name, LOG).content(first=1)
            if first + len(log) != last:
                raise Damaged(f"object {object_name} holds another stretch of log than its name says")
            while at < last:
                number, within = divmod(at, size)
                path = wal_into / f"{name}{number // per_id:08X}{number % per_id:08X}"
                with path.open("r+b" if within else "xb") as file:
                    file.truncate(size)
                    file.seek(within)
                    at += file.write(log[at - first : at - first + size - within])
        print(f"log of branch {name} restored up to {at >> 32:X}/{at & 0xFFFFFFFF:X}", file=sys.stderr)
        if name == branch and at < manifest["stop"][1]:
            raise Damaged("log that makes the backup consistent is missing: PostgreSQL will refuse to start")
        if any(last > at for _, last, _ in logs.get(name, [])):
            print("WARNING: there is a hole in it; what follows cannot be reached", file=sys.stderr)


def list_all(lineages: list[Lineage]) -> int:
    """All backups, and all log by branch; 5 if a manifest is damaged."""
    code = 0
    for lineage in lineages:
        print(lineage.id)
        for backup in lineage.backups():
            try:
                size = sum(row["size_bytes"] for row in lineage.manifest(backup)["files"])
                print(f"  backup {backup} {size} bytes")
            except Damaged as error:
                code = 5
                print(f"  backup {backup} DAMAGED: {error}")
        for branch, stretches in lineage.logs().items():
            end = max(last for _, last, _ in stretches)
            print(f"  log of branch {branch} from {min(stretches)[0]:#x} to {end:#x}")
    return code


def restore(lineages: list[Lineage], options: argparse.Namespace) -> int:
    """One backup, and its log."""
    lineage = next((one for one in lineages if options.backup in one.backups()), None)
    if lineage is None:
        raise SystemExit(f"rescue: error: no backup {options.backup!r} in the repository; `list` shows them")
    manifest = lineage.manifest(options.backup)
    target = Target(manifest, Path(options.into).absolute())
    wal_into = Path(options.wal_into or options.into).absolute()
    for directory in (target.into, target.tablespaces, target.outside, wal_into):
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise SystemExit(f"rescue: error: {directory} is not an empty directory")
    restore_files(lineage, manifest, target)
    if options.wal_into:
        wal_into.mkdir(parents=True, exist_ok=True)
        restore_log(lineage, manifest, wal_into)
        (target.into / "recovery.signal").touch(0o600)
        print(f"restore_command = 'cp \"{wal_into}/%f\" \"%p\"'\nrecovery_target_timeline = 'latest'")
    os.sync()
    print(f"restored to {target.into}; give it to the user that runs PostgreSQL", file=sys.stderr)
    return 0


def main() -> int:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repository", required=True, metavar="DIR")
    secret = parser.add_mutually_exclusive_group(required=True)
    secret.add_argument("--passphrase-file", metavar="FILE")
    secret.add_argument("--repository-key-file", metavar="FILE")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="backups and log")
    command = commands.add_parser("restore", help="a backup into an empty directory")
    command.add_argument("backup", metavar="BACKUP")
    command.add_argument("--into", required=True, metavar="DIR")
    command.add_argument("--wal-into", metavar="DIR", help="write the log there too, as WAL files")
    options = parser.parse_args()
    try:
        head = json.loads((root := Path(options.repository)).joinpath("cloudsave.json").read_bytes())
        if head["format"] != 1 or head["features"]:
            raise SystemExit("rescue: error: the repository has a newer format than 1")
        key = open_key(root, head["key_id"], options)
        lineages = [Lineage(root, key, path.parent.name) for path in sorted(root.glob("lineages/*/identity"))]
        return list_all(lineages) if options.command == "list" else restore(lineages, options)
    except (Damaged, OSError, ValueError, KeyError, struct.error) as error:
        print(f"rescue: error: {error}; what was written is incomplete: remove it", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 5


if __name__ == "__main__":
    sys.exit(main())
