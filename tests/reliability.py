"""Makes docs/dev/reliability.md from what the tests recorded.

    python tests/reliability.py build/test.xml [build/test-deep.xml]

A test that shows a promise records it, with what it did: record_property("R5", "400 flipped bits"). pytest writes
this to its JUnit file, and this script to tests/reliability.json, from which it makes the page. What a file says of a
promise replaces what an earlier one of its kind said.
"""

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
STORE, PAGE = ROOT / "tests" / "reliability.json", ROOT / "docs" / "dev" / "reliability.md"
KINDS = ("fast", "deep")

PROMISES = {
    "R1": "A run that is killed and resumed, however often, ends with the bits of one that was not",
    "R2": "A save that is killed, or whose system call fails, at any point leaves a complete checkpoint",
    "R3": "A power failure leaves a complete checkpoint",
    "R4": "A full disk leaves the previous checkpoint, and the next save works when there is room",
    "R5": "A changed or missing byte of a checkpoint is found and its file named",
    "R6": "A save in the background writes the state of its step",
    "R7": "A resumed run reads the same examples in the same order, with any number of ranks",
    "R8": "SIGINT and SIGTERM end in a checkpoint, the documented exit code, and a run that resumes bit by bit",
    "R9": "Two runs never write one folder",
    "R10": "Gradients are those of finite differences; opcheck passes",
    "R11": "Errors are at most twice those of torch in the same precision",
    "R12": "InfoNCE is exact at low temperatures, and finite where everything is masked",
    "R13": "The gradient cache gives the gradient of one large batch",
    "R14": "Runs repeat bit by bit; ops give the same bits with any number of threads",
    "R15": "An embedding does not depend on the texts beside it",
    "R16": "No op reads memory that nothing has written",
    "R17": "A malformed call is an error that names its argument, and changes nothing",
    "R18": "Sanitizers find nothing, and find the bugs that are planted",
    "R19": "No bytes crash a reader",
    "R20": "Offsets beyond 2^31 elements are right",
    "R21": "Calls leak no memory, descriptors or threads",
    "R22": "Ops run in threads, release the GIL, and survive a fork",
    "R23": "A long run keeps its memory and its speed",
    "R24": "A step that is not finite changes no weight, on any rank",
    "R25": "What would end a run later is found before its first step",
    "R26": "When a rank dies, the others end soon and name it",
    "R27": "A booby-trapped folder or file runs no code",
    "R28": "No pickle, no eval, no shell, no network that was not asked for",
    "R29": "Merged and exported models have every tensor, and their embeddings",
    "R30": "Every branch of the checkpoint and argument checks is tested",
}
HEAD = """# Reliability

What pyqemb promises, which tests show it, and what they did when they last passed. `make test` runs
the fast ones, `make test-deep` all. The table is made from their records:

```text
make reliability        # after make test or make test-deep
```

A promise without a test is still one; the table says so.

| | promise | tests | in `make test` | in `make test-deep` | date |
| --- | --- | --- | --- | --- | --- |
"""


def read(path: Path) -> dict[str, dict[str, Any]]:
    """By promise: its tests, what they recorded, and the date. Of tests that failed, nothing."""
    found: dict[str, dict[str, Any]] = {}
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                continue
            for each in case.iter("property"):
                if each.attrib["name"] not in PROMISES:
                    sys.exit(f"{path}: {case.attrib['name']} records {each.attrib['name']!r}, which is no promise")
                row = found.setdefault(
                    each.attrib["name"], {"tests": [], "figures": [], "date": suite.attrib["timestamp"][:10]}
                )
                name = case.attrib["classname"].removeprefix("tests.").replace(".", "/") + ".py"
                for key, value in (("tests", name), ("figures", each.attrib["value"])):
                    if value not in row[key]:
                        row[key].append(value)
    return found


def page(store: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The text of docs/dev/reliability.md."""
    lines = []
    for promise, text in PROMISES.items():
        rows = [store[kind].get(promise) for kind in KINDS]
        tests = sorted({f"`{name}`" for row in rows if row for name in row["tests"]})
        figures = ["; ".join(row["figures"]) if row else "" for row in rows]
        date = max((row["date"] for row in rows if row), default="")
        lines.append(f"| {promise} | {text} | {', '.join(tests) or 'none'} | {' | '.join(figures)} | {date} |\n")
    return HEAD + "".join(lines)


def main(*paths: str) -> None:
    """Read the files of `make test` and `make test-deep`, as far as they are there; write the page."""
    store = json.loads(STORE.read_text()) if STORE.exists() else {kind: {} for kind in KINDS}
    for kind, path in zip(KINDS, map(Path, paths), strict=False):
        if path.exists():
            store[kind] |= read(path)
    STORE.write_text(json.dumps(store, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(store))


if __name__ == "__main__":
    main(*sys.argv[1:])
