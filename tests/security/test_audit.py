"""`make audit` fails for a vulnerability, and says so where no service can be asked; floors have reasons."""

import importlib.util
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
spec = importlib.util.spec_from_file_location("security_audit", HERE / "audit.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

PACKAGES = {"good-package": "1.0", "bad-package": "1.0"}


@pytest.fixture
def service():
    """A service of vulnerabilities with OSV's protocol: all versions of bad-package before 2.0 have one."""
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}]
    affected = [{"package": {"name": "bad-package", "ecosystem": "PyPI"}, "ranges": ranges}]
    bad = {"id": "TEST-1", "aliases": ["CVE-2026-1"], "summary": "x", "details": "x", "affected": affected}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps({"vulns": [bad]} if body["package"]["name"] == "bad-package" else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield ["-s", "osv", "--osv-url", f"http://127.0.0.1:{server.server_port}/v1/query"]
    server.shutdown()
    server.server_close()


@pytest.fixture
def pip_audit():
    pytest.importorskip("pip_audit", reason="pip-audit is not installed (pip install 'pyqemb[test]')")


def test_a_vulnerability_fails(service, pip_audit, capsys):
    assert audit.audit(PACKAGES, service) == 1
    said = capsys.readouterr().out
    assert "bad-package 1.0: " in said
    assert "CVE-2026-1" in said
    assert "fixed in 2.0" in said
    assert "2 packages audited, 1 vulnerabilities" in said


def test_none_passes(service, pip_audit, capsys):
    assert audit.audit({"good-package": "1.0"}, service) == 0
    assert "1 packages audited, 0 vulnerabilities" in capsys.readouterr().out


def test_without_a_service_it_says_so(pip_audit, capsys, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert audit.audit(PACKAGES, ["-s", "osv", "--osv-url", "http://127.0.0.1:9/v1/query"]) == 0
    said = capsys.readouterr().out
    assert "audit skipped: the service cannot be reached: " in said
    assert "::warning title=audit skipped::" in said


def test_a_service_that_knows_nothing_is_no_audit(monkeypatch, capsys):
    rows = [{"name": name, "skip_reason": "not found"} for name in PACKAGES]
    done = audit.subprocess.CompletedProcess([], 0, json.dumps({"dependencies": rows}), "")
    monkeypatch.setattr(audit.subprocess, "run", lambda *args, **options: done)
    assert audit.audit(PACKAGES, []) == 0
    assert "audit skipped: the service knows none of 2 packages" in capsys.readouterr().out


def test_a_failure_is_one(monkeypatch, capsys):
    done = audit.subprocess.CompletedProcess([], 2, "", "error: unrecognized arguments")
    monkeypatch.setattr(audit.subprocess, "run", lambda *args, **options: done)
    assert audit.audit(PACKAGES, []) == 2


def requirements():
    """(section, requirement, comment) of each line of pyproject.toml."""
    section, text = "", (ROOT / "pyproject.toml").read_text()
    found = []
    for line in text[text.index("dependencies = [") : text.index("[project.scripts]")].splitlines():
        opened = re.match(r"([\w-]+) = \[", line)
        section = opened[1] if opened else section
        comment = line.partition("#")[2].strip()
        found += [(section, name, comment) for name in re.findall(r'"([^"]+)"', line.partition("#")[0])]
    return found


def test_every_floor_has_its_reason():
    """Of what pyqemb itself needs. Extras that no security depends on are held to the versions that the tests use."""
    missing = [
        name
        for section, name, comment in requirements()
        if section == "dependencies" and not re.search(r"floor: \w", comment)
    ]
    assert len([name for section, name, _ in requirements() if section == "dependencies"]) == 11
    assert not missing, missing


def test_what_is_installed_is_what_is_declared():
    """No requirement is met by less than its floor."""
    packaging = pytest.importorskip("packaging.requirements")
    for _, requirement, _ in requirements():
        wanted = packaging.Requirement(requirement)
        if wanted.name == "pyqemb" or (wanted.marker and not wanted.marker.evaluate()):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed
        assert wanted.specifier.contains(version.partition("+")[0], prereleases=True), (requirement, version)


@pytest.mark.parametrize(
    ("package", "floor", "reason"),
    [
        ("torch", (2, 10), "CVE-2026-24747"),
        ("pyarrow", (15,), "CVE-2023-47248"),
        ("transformers", (5, 3), "CVE-2026-4372"),
        ("datasets", (4,), "code of a dataset"),
    ],
)
def test_floors_that_security_needs(package, floor, reason):
    lines = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if f'"{package}>=' in line]
    assert lines
    for line in lines:
        version = re.search(rf'"{package}>=([\d.]+)', line)[1]
        assert tuple(map(int, version.split("."))) >= floor
        assert reason in line
