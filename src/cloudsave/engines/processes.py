"""Who runs a server's programs: servers refuse to run as root, or should."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass

from cloudsave.errors import ServerToolsMissing


@dataclass(frozen=True, slots=True)
class ServerUser:
    """The user that server processes run as; None: the one that runs cloudsave."""

    name: str
    uid: int
    gid: int

    def process_arguments(self) -> dict[str, object]:
        """For subprocess: become this user, with no groups of root's."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def server_user(
    candidates: tuple[str, ...], wanted: str | None = None, *, owner_uid: int | None = None
) -> ServerUser | None:
    """
    Who is to run a server: `wanted`, else the owner of the data directory, else the first of the unprivileged
    `candidates` that exists.

    Returns None where cloudsave is not root: then it is this user, and no choice is possible.
    Raises: ServerToolsMissing where `wanted` does not exist.
    """
    if os.geteuid() != 0:
        return None
    if wanted is None and owner_uid:
        entry = pwd.getpwuid(owner_uid)
        return ServerUser(entry.pw_name, entry.pw_uid, entry.pw_gid)
    for name in (wanted,) if wanted else candidates:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid:
            return ServerUser(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise ServerToolsMissing(
        "there is no unprivileged user to run the server",
        detail=f"A server does not run as root, and {wanted or ' or '.join(candidates)} does not exist.",
        hints=["name one with --owner"],
    )
