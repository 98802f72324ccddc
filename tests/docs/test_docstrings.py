"""Public names are documented: arguments, result, errors, and an example that runs."""

import ast
import doctest
import inspect
import json
import re
import textwrap

import pytest
import torch

import pyqemb
from pyqemb import ops

HOMES = {"pyqemb": pyqemb, "ops": ops}
PUBLIC = {
    f"{home}.{name}": getattr(module, name)
    for home, module in HOMES.items()
    for name in module.__all__
    if name != "__version__"
}
# Methods that the jobs of this package call on each other, not their users.
INTERNAL = {
    "check_dim", "encode_windows", "encoding_on", "in_processes", "load_rows", "save_parameters", "token_counts",
    "without_weights", "write_portable",
}  # fmt: skip
METHODS = {
    f"{name}.{method}": member
    for name, item in PUBLIC.items()
    if inspect.isclass(item)
    for method, member in inspect.getmembers(item, inspect.isroutine)
    if not method.startswith("_") and method not in INTERNAL and (member.__module__ or "").startswith("pyqemb.")
}
SECTIONS = "Args", "Returns", "Raises", "Yields", "Attributes", "Example", "Source"


def section(text, name):
    """The text of a section of a docstring; "" where it has none."""
    found = re.search(rf"^{name}:\n(.*?)(?=^(?:{'|'.join(SECTIONS)}):|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def missing(function, is_class=False):
    """What the docstring of a function or of a class (for its __init__) lacks."""
    text = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    described = section(text, "Args") + (section(text, "Attributes") if is_class else "")
    names = [name for name in signature.parameters if name not in ("self", "cls")]
    lacking = [name for name in names if not re.search(rf"^\s+{name}\b[^:]*:", described, flags=re.MULTILINE)]
    if is_class:
        return lacking
    if signature.return_annotation not in (None, "None", inspect.Signature.empty) and not section(text, "Returns"):
        lacking += [] if section(text, "Yields") else ["Returns"]
    if raises(function) and not section(text, "Raises"):
        lacking.append("Raises")
    return lacking


def raises(function):
    """Whether an error is raised in the code of the function itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_arguments_results_and_errors_are_documented(name):
    item = {**PUBLIC, **METHODS}[name]
    assert not missing(item, inspect.isclass(item)), name


def test_what_is_missing_is_found():
    def bare(count: int) -> int:
        """Count."""
        raise ValueError

    assert missing(bare) == ["count", "Returns", "Raises"]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name, tmp_path, monkeypatch, request):
    if name == "pyqemb.register_transformers":
        pytest.importorskip("transformers")
    text = inspect.getdoc(PUBLIC[name]) or ""
    if "http://localhost:8000/v1" in text:
        text = text.replace("http://localhost:8000/v1", request.getfixturevalue("language_model"))
    assert "+SKIP" not in text
    test = doctest.DocTestParser().get_doctest(text, {"pyqemb": pyqemb, "torch": torch}, name, None, None)
    assert test.examples, "has no example"
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    output = []
    runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)


@pytest.fixture
def language_model(serve):
    """The URL of a server whose answer fits every prompt of a retrieval pair."""
    configuration = {"character": "A reader", "question_type": "keywords", "difficulty": "high_school"}
    return serve(lambda messages: json.dumps({**configuration, "query": "bridge with towers"})).url
