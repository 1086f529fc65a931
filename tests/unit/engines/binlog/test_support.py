"""Every feature called supported names a test that exists, and the series that it runs on."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from cloudsave.engines.mariadb import engine as mariadb
from cloudsave.engines.mysql import engine as mysql
from tests.integration.mysql.fixtures import SERIES

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("module", [mysql, mariadb], ids=["mysql", "mariadb"])
def test_each_feature_names_a_test_that_exists(module: ModuleType) -> None:
    support = tomllib.loads((Path(str(module.__file__)).parent / "support.toml").read_text())
    assert tuple(support["versions"]) == SERIES[support["engine"]]
    for feature in support["feature"]:
        path, _, name = feature["test"].partition("::")
        functions = ast.walk(ast.parse((ROOT / path).read_text()))
        assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}, feature
