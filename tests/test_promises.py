"""``docs/promises.md`` names tests that are there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_is_named_is_there():
    text = (ROOT / "docs/promises.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 10
    for path, test in named:
        tree = ast.parse((ROOT / path).read_text())
        assert not test or test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_every_promise_has_a_proof():
    rows = [line for line in (ROOT / "docs/promises.md").read_text().splitlines() if line.startswith("| ")]
    for row in rows:
        promised, proof, _ = [cell.strip() for cell in row.strip("|").split("|")]
        assert promised == "Promised" or "tests/" in proof or proof.startswith("the same test"), promised
