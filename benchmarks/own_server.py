"""A benchmark on a server of its own: made for one run, removed after it, and the figures printed."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.integration.postgresql.cluster import Cluster, ClusterFactory
from tools import provision

Figures = dict[str, float | int | str]


def run(about: str, measure: Callable[[Cluster, Path, int], Figures], conf: Mapping[str, str]) -> int:
    """
    Parse the command line, measure (cluster, folder, megabytes of log) on a server with `conf`, and print.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n\n")[0])
    parser.add_argument("--postgresql", default="18")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bindirs = {major: Path(found.bindir) for major, found in provision.listing().items()}
    folder = Path(tempfile.mkdtemp(prefix="cloudsave-bench-"))
    folder.chmod(0o711)
    factory = ClusterFactory(bindirs, root=folder, disk=folder, noted=lambda _: None)
    factory.user.own(folder)
    try:
        result = measure(factory.create(options.postgresql, conf=dict(conf)), folder, options.megabytes)
    finally:
        factory.close()
        shutil.rmtree(folder)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:28} {value}")
    return 0
