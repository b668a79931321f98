"""docs/kernels.md says what is: its tables are of these kernels and of the committed results."""

import json
import re

import document
import test_versions
from packaging.specifiers import SpecifierSet


def test_tables_are_current():
    text = document.PAGE.read_text()
    hint = "run python tests/gates/document.py"
    assert document.sources() in document.between(text, "compiled"), hint
    assert document.between(text, "status") == document.status_table(document.ops()), hint


def test_status_comes_from_results(tmp_path):
    assert "| geglu | never |" in document.status_table(["geglu"], tmp_path)
    run = {"op": "geglu", "runs": {"fastenc triton": {"seconds": 1e-5}, "torch": {"error": "x"}}}
    broken = {"op": "rope", "runs": {"fastenc triton": {"error": "x"}}}
    record = {"machine": {"gpu": "NVIDIA X"}, "date": "2026-01-01", "ops": [run, broken]}
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.json").write_text(json.dumps(record))
    (tmp_path / "x" / "b.json").write_text(json.dumps({"machine": "a CPU", "ops": [run]}))
    table = document.status_table(["geglu", "rope"], tmp_path)
    assert "| geglu | NVIDIA X (2026-01-01) |" in table and "| rope | never |" in table


def test_triton_that_users_get_is_the_tested_one():
    text = (document.ROOT / "pyproject.toml").read_text()
    allowed = SpecifierSet(re.search(r'gpu = \["triton(.*?)"\]', text)[1])
    tested = list(test_versions.VERSIONS)
    assert [v for v in ("3.5.1", *tested, "3.10.0") if v in allowed] == tested
