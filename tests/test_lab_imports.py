"""The lab's sub-packages import each other in one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import overtone.lab

FLOW = ("registry", "data", "model", "edit", "score", "results", "run", "report")


def imports():
    """(importing part, imported part) of every import inside of the lab."""
    root = Path(overtone.lab.__file__).parent
    for path in root.rglob("*.py"):
        importing = path.relative_to(root).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("overtone.lab."):
                yield importing, node.module.split(".")[2]


def test_every_import_follows_the_flow():
    found = set(imports())
    assert ("report", "results") in found
    against = {(importing, imported) for importing, imported in found if FLOW.index(importing) < FLOW.index(imported)}
    assert against == set()
    assert "run" not in {imported for importing, imported in found if importing == "report"}
