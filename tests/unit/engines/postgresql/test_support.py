"""Every feature called supported names a test that exists."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

from cloudsave.engines.postgresql import engine

ROOT = Path(__file__).parents[4]


def test_each_feature_names_a_test_that_exists() -> None:
    support = tomllib.loads((Path(engine.__file__).parent / "support.toml").read_text())
    assert [int(major) for major in support["versions"]] == list(
        range(engine.MAJOR_MIN, engine.MAJOR_MAX + 1)
    )
    for feature in support["feature"]:
        path, _, name = feature["test"].partition("::")
        functions = ast.walk(ast.parse((ROOT / path).read_text()))
        assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}, feature
