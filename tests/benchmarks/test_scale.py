"""docs/scaling.md shows what `benchmarks/scale.py` measured, and the formula describes it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import scale_targets
from scale import formula, table  # benchmarks/ is on the path by conftest.py
from scale_shapes import EXPERTS, MODELS, mesh_sizes

ROOT = Path(__file__).parents[2]
REPORT = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())
ON_TPUS = json.loads((ROOT / "benchmarks" / "results" / "scale-v5e.json").read_text())
WITH_FORMULA = [row for row in REPORT["rows"] if row["formula"]]


def test_the_table_is_that_of_the_results():
    assert table(REPORT["rows"]) in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize("row", WITH_FORMULA, ids=lambda row: f"{row['model']} {row['mesh']}")
def test_the_compiled_programs_are_those_of_the_formula(row):
    assert row["arguments"] == pytest.approx(row["formula"]["arguments"], rel=0.02)
    assert row["moved"] <= 1.05 * row["formula"]["moved"]


def test_the_formula_is_that_of_llama():
    assert [row["model"] for row in WITH_FORMULA] == ["7b", "70b"] * 3


def test_70b_fits_eight_devices_of_80_gb():
    row = next(r for r in REPORT["rows"] if r["model"] == "70b" and r["devices"] == 8)
    assert row["arguments"] + row["temporary"] < 40e9, "with half of it left for activations"


def test_the_table_of_tpus_is_that_of_the_results():
    assert scale_targets.table(ON_TPUS["rows"]) in (ROOT / "docs" / "tpu.md").read_text()


@pytest.mark.parametrize("row", ON_TPUS["rows"], ids=lambda row: f"{row['model']} {row['mesh']}")
def test_a_row_of_tpus(row):
    assert row["arguments"] + row["temporary"] < 16e9, "more than a v5e has"
    if row["model"] not in EXPERTS:
        mesh = SimpleNamespace(shape=mesh_sizes(row["model"], row["devices"]))
        expected = formula(MODELS[row["model"]], mesh)
        assert row["arguments"] == pytest.approx(expected["arguments"], rel=0.02)
