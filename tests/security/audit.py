"""Looks for known vulnerabilities of the packages that are installed here, with pip-audit.

    python tests/security/audit.py [OPTION of pip-audit ...]

Exit code 0: there are none, or no service of vulnerabilities can be asked, which is said; 1: there are some; 2:
pip-audit itself failed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

OWN = "pyqemb"
UNREACHABLE = re.compile(
    r"ConnectionError|Could not connect|ConnectTimeout|ReadTimeout|ProxyError|Max retries exceeded"
)


def installed() -> dict[str, str]:
    """Version by name, without the suffix of a local build: services know 2.13.0, not 2.13.0+cpu."""
    found = {each.metadata["Name"]: each.version.partition("+")[0] for each in metadata.distributions()}
    return {name: version for name, version in sorted(found.items()) if name.lower() != OWN}


def audit(packages: dict[str, str], options: list[str]) -> int:
    """The exit code."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "installed.txt"
        wanted.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()))
        command = [
            sys.executable, "-m", "pip_audit", "--requirement", wanted, "--no-deps", "--disable-pip", "--format",
            "json", "--progress-spinner", "off", *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    try:
        rows = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        said = done.stderr.strip().splitlines() or ["no output"]
        if UNREACHABLE.search(done.stderr):
            return skipped(f"the service cannot be reached: {said[-1][:300]}")
        print(f"pip-audit failed: {done.stderr[-2000:]}", file=sys.stderr)
        return 2
    unknown = [row["name"] for row in rows if "vulns" not in row]
    if len(unknown) == len(rows):
        return skipped(f"the service knows none of {len(rows)} packages")
    vulnerable = 0
    for row in rows:
        for each in row.get("vulns", []):
            vulnerable += 1
            names = ", ".join([each["id"], *each.get("aliases", [])])
            fixed = ", ".join(each["fix_versions"]) or "no version"
            print(f"{row['name']} {row['version']}: {names}; fixed in {fixed}")
    print(f"{len(rows) - len(unknown)} packages audited, {vulnerable} vulnerabilities")
    if unknown:
        print(f"the service does not know {', '.join(unknown)}")
    return 1 if vulnerable else 0


def skipped(reason: str) -> int:
    print(f"audit skipped: {reason}")
    if "GITHUB_ACTIONS" in os.environ:
        print(f"::warning title=audit skipped::{reason}")
    return 0


if __name__ == "__main__":
    sys.exit(audit(installed(), sys.argv[1:]))
