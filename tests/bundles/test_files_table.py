from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted((ROOT / "bundles").glob("*/docs/files.md"))


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.parts[-3])
def test_every_row_names_a_test_that_there_is(table):
    rows = [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not re.match(r"\| (---|kind|what) ", row)]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`([\w/]*\.py)?(?:::(test_\w+))?`", row.rsplit(" | ", 1)[1])
        assert named, row
        file = ""
        for path, test in named:
            file = path or file
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert not test or f"\ndef {test}(" in text, f"{file}::{test}"
