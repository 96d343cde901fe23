"""The package's parts import each other in one direction: the order in which CONTRIBUTING.md lists them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import overtone

PACKAGE = Path(overtone.__file__).parent
FLOW = ("log_lines", "registry", "data", "model", "edit", "score", "results", "run", "report")


def listed_parts():
    """The parts in the page's table, row by row; those of a row stand in order, too."""
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    table = page[page.index("| where | what |") : page.index("Imports go one way")]
    cells = [row.split("|")[1] for row in table.splitlines() if "`overtone/" in row]
    return [name.removesuffix(".py").strip("/") for cell in cells for name in re.findall(r"`overtone/(\S+)`", cell)]


def imports(root, package):
    """(importing part, imported part) of every import inside of a package, but for those of types alone."""
    for path in root.rglob("*.py"):
        importing = path.relative_to(root).with_suffix("").parts[0]
        tree = ast.parse(path.read_text())
        guarded = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ]
        types = {id(node) for block in guarded for node in ast.walk(block)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.ImportFrom)
                and id(node) not in types
                and f"{node.module}.".startswith(f"{package}.")
            ):
                inside = node.module.split(".")[package.count(".") + 1 :]
                parts = inside[:1] or [alias.name for alias in node.names]
                yield from ((importing, part) for part in parts if not part.startswith("__"))


def against(order, found):
    return {(importing, imported) for importing, imported in found if order.index(importing) < order.index(imported)}


class TestOrder:
    def test_every_import_of_the_package_goes_up_the_page(self):
        found = {pair for pair in imports(PACKAGE, "overtone") if pair[0] not in ("__init__", "__main__")}
        assert {("loss", "kernels"), ("lab", "token_loss"), ("kernels", "checks")} <= found
        assert against(listed_parts(), found) == set()

    def test_every_import_of_the_lab_follows_the_flow(self):
        found = set(imports(PACKAGE / "lab", "overtone.lab"))
        assert ("report", "results") in found
        assert against(FLOW, found) == set()
        assert ("report", "run") not in found
