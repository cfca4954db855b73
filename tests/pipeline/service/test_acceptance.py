"""The table of acceptance in the documentation is that of the program, and every test that it names is there."""

import ast

from tests.pipeline.service.soak import ROWS, table
from tests.world import ROOT


def test_documentation_has_the_table_of_acceptance() -> None:
    assert table() in (ROOT / "docs/service.md").read_text(), (
        "python -c 'from tests.pipeline.service.soak import *; print(table())'"
    )


def test_every_test_of_a_row_is_there() -> None:
    for row in ROWS:
        for one in row.tests:
            file, _, name = one.partition("::")
            defined = {
                node.name
                for node in ast.walk(ast.parse((ROOT / file).read_text()))
                if isinstance(node, ast.FunctionDef)
            }
            assert not name or name in defined, one
        assert row.tests or row.missing
