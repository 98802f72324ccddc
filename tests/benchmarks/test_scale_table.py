"""docs/scale.md holds the tables that benchmarks/scale_table.py makes."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale_table.py"


@pytest.fixture(scope="module")
def scale_table():
    spec = importlib.util.spec_from_file_location("scale_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_the_page(scale_table, name):
    _, _, rest = scale_table.PAGE.read_text(encoding="utf-8").partition(f"scale_table.py: {name} -->\n")
    return rest.partition("\n<!-- end -->")[0].splitlines()


def test_bytes_by_kind_are_on_the_page(scale_table):
    table = list(scale_table.kinds_table())
    assert len(table) == 2 + 3 * len(scale_table.MODELS)
    assert on_the_page(scale_table, "bytes by kind") == table


def test_what_fits_is_on_the_page(scale_table):
    table = list(scale_table.fits_table(scale_table.planner_of(scale_table.model_of("Qwen3-8B", lora=False))))
    assert len(table) == 2 + len(scale_table.GPUS)
    assert on_the_page(scale_table, "Qwen3-8B, full") == table
    assert table[2] == "| 1 | - | - | - | - |"


@pytest.mark.deep
def test_the_whole_page(scale_table):
    page = scale_table.PAGE.read_text(encoding="utf-8")
    assert scale_table.filled(page) == page
