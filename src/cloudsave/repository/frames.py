"""Single frames of packs, wherever they are asked for."""

from __future__ import annotations

from cloudsave.repository.container import FRAME_HEADER, HEADER_BYTES, ContainerReader, FrameRef, Kind
from cloudsave.repository.lineage import Lineage
from cloudsave.store.api import Buffer


def open_pack(lineage: Lineage, name: str, header: Buffer | None = None) -> ContainerReader:
    """A reader of a pack's frames, by its full name; the header is fetched where it is not at hand."""
    if header is None:
        header = lineage.store.get_range(name, offset=0, length=HEADER_BYTES)
    return ContainerReader(lineage.keys, name, Kind.PACK, header)


def read_frame(lineage: Lineage, pack: str, frame: FrameRef) -> bytes:
    """The plain bytes of one frame. Raises: ObjectMissing, IntegrityError."""
    name = f"{lineage.root}packs/{pack}"
    length = FRAME_HEADER.size + frame.sealed_bytes
    content = lineage.store.get_range(name, offset=frame.offset, length=length)
    plain, _ = open_pack(lineage, name).open(content, number=frame.number)
    return plain
