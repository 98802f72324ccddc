"""The arch layer: the emulator against the definition, against recorded devices, and, where there is a GPU, against it.

A run on a GPU writes golden/<device>.json: commit it, and the emulator is held to that device ever after.
"""

import hashlib
import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pyqemb.ops import kernel_sets

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
# program -> the header that lists its primitives
HEADERS = {"conformance": "arch.h", "conformance_sm90": "hopper.h"}
# Primitives that are newer than the recorded devices: the next device answers for them.
NEWER = {"nvidia_h100_80gb_hbm3.conformance.json": {"counters"}}

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the emulator of CUDA runs on x86-64"
)


def parse(text: str) -> dict[str, list[str]]:
    """name -> [kind, words...]; name.truth and name.bound -> numbers."""
    return {name: rest.split() for name, _, rest in (line.partition(" ") for line in text.splitlines())}


def hopper_sources() -> str:
    """sha256 of all that only Hopper compiles."""
    cuda = ROOT / "csrc" / "cuda"
    files = [path for path in (cuda / "sm90").rglob("*") if path.is_file()]
    files += [cuda / name for name in ("device/hopper.h", "device/ptx_sm90.h", "tensor_map.h")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def golden(program: str) -> list[Path]:
    """What devices have answered."""
    return sorted((HERE / "golden").glob(f"*.{program}.json"))


def build_and_run(command: list[str], program: str, target: Path) -> dict[str, list[str]]:
    command = [*command, "-DQEMB_BOUNDED_SPINS", f"-I{ROOT / 'csrc'}", str(HERE / f"{program}.cu"), "-o", str(target)]
    subprocess.run(command, check=True)
    return parse(subprocess.run([target], check=True, capture_output=True, text=True, timeout=300).stdout)


@pytest.fixture(scope="module", params=HEADERS)
def program(request):
    return request.param


@pytest.fixture(scope="module")
def emulated(program, tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    emulator = f"-I{ROOT / 'tests' / 'cuda_on_cpu'}"
    command = [compiler, "-std=c++20", "-O1", "-Wno-unknown-pragmas", emulator, "-x", "c++"]
    return build_and_run(command, program, tmp_path_factory.mktemp("emulated") / program)


def floats(words: list[str]) -> torch.Tensor:
    return (
        torch.tensor([int(word, 16) for word in words], dtype=torch.int64).to(torch.int32).view(torch.float32).double()
    )


def within(actual: list[str], results: dict[str, list[str]], name: str) -> torch.Tensor:
    ours = floats(actual)
    truth = torch.tensor([float(x) for x in results[f"{name}.truth"]], dtype=torch.float64)
    bound = torch.tensor([float(x) for x in results[f"{name}.bound"]], dtype=torch.float64)
    return (ours == truth) | (ours.isnan() & truth.isnan()) | ((ours - truth).abs() <= bound)


def differences(emulated: dict[str, list[str]], device: dict[str, list[str]]) -> list[str]:
    """Names of the primitives in which the device is not what the emulator says."""
    wrong = []
    for name, (kind, *words) in emulated.items():
        if name.endswith((".truth", ".bound")):
            continue
        other = device.get(name, [kind])[1:]
        if len(words) != len(other):
            wrong.append(f"{name}: {len(other)} words instead of {len(words)}")
            continue
        if kind == "approx":
            same = within(other, emulated, name)
        else:
            same = torch.tensor([a == b for a, b in zip(words, other, strict=True)])
            if kind == "float":
                same |= floats(words).isnan() & floats(other).isnan()
        if not same.all():
            i = int((~same).nonzero()[0])
            wrong.append(
                f"{name}[{i}]: emulator {words[i]}, device {other[i]} ({int((~same).sum())} of {len(words)} differ)"
            )
    return wrong


def test_emulator_is_within_the_bounds(emulated):
    approximate = [name for name, (kind, *_) in emulated.items() if kind == "approx"]
    assert len(approximate) >= 5
    for name in approximate:
        assert within(emulated[name][1:], emulated, name).all(), name


def test_a_changed_word_is_a_difference(emulated):
    for name, (kind, *words) in emulated.items():
        if name.endswith((".truth", ".bound")):
            continue
        changed = f"{int(words[40], 16) ^ 0x40000000:08x}"
        assert differences(emulated, {**emulated, name: [kind, *words[:40], changed, *words[41:]]}), name
    assert not differences(emulated, emulated)


def test_every_primitive_is_covered(program):
    listed = (ROOT / "csrc" / "cuda" / "device" / HEADERS[program]).read_text().split("#pragma once")[0]
    names = set(re.findall(r"(\w+)(?:<[^>()]*>)?\(", listed)) - {"BFloat16"}
    source = (HERE / f"{program}.cu").read_text()
    missing = [name for name in names if not re.search(rf"\b{name}\b", source)]
    assert len(names) > 15
    assert not missing


def test_emulator_agrees_with_recorded_devices(emulated, program):
    paths = golden(program)
    if not paths:
        pytest.skip(f"no device has answered {program} yet: run this file on a machine with a GPU and commit golden/")
    for path in paths:
        device = {name: text.split() for name, text in json.loads(path.read_text())["results"].items()}
        newer = NEWER.get(path.name, set())
        assert not newer & device.keys(), "NEWER names what the device has answered"
        known = {name: words for name, words in emulated.items() if name not in newer}
        assert not differences(known, device), path.name


def test_hopper_gets_its_own_kernels_where_a_device_has_proven_them():
    """PROVEN_ON_HOPPER names the sources that a device has answered for, and no others."""
    proven = {json.loads(path.read_text())["sources"] for path in golden("conformance_sm90")}
    now = hopper_sources()
    assert (now if now in proven else None) == kernel_sets.PROVEN_ON_HOPPER


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_device_agrees_with_emulator(emulated, program, tmp_path):
    major, minor = torch.cuda.get_device_capability()
    if program == "conformance_sm90" and (major, minor) != (9, 0):
        pytest.skip("the GPU is no Hopper")
    target = "-gencode=arch=compute_90a,code=sm_90a" if program == "conformance_sm90" else f"-arch=sm_{major}{minor}"
    device = build_and_run(["nvcc", "-std=c++20", target], program, tmp_path / program)
    name = torch.cuda.get_device_name()
    folder = HERE / "golden"
    folder.mkdir(exist_ok=True)
    results = {key: " ".join(words) for key, words in device.items() if not key.endswith((".truth", ".bound"))}
    record = {"device": name, "capability": f"{major}.{minor}", "cuda": torch.version.cuda, "results": results}
    if program == "conformance_sm90":
        record["sources"] = hopper_sources()
    path = folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.{program}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    assert not differences(emulated, device)
