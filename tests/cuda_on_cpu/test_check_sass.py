"""check_sass.py on recorded forms of cuobjdump's output: it fails where it should."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("check_sass", Path(__file__).with_name("check_sass.py"))
check_sass = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_sass)


def listing(kind: str, architectures: list[str]) -> str:
    return "".join(f"file 1: swiglu.1.sm_{arch}.{kind}\n" for arch in architectures)


def usage(architectures: list[str], stack: str = "") -> str:
    """Of one kernel; it has a stack on the architecture `stack`."""
    return "".join(
        f"Fatbin elf code:\n================\narch = sm_{arch}\n\nResource usage:\n Common:\n  GLOBAL:0\n"
        f" Function _Z6kernelv:\n  REG:128 STACK:{8 if arch == stack else 0} SHARED:0 LOCAL:0 CONSTANT[0]:576\n"
        for arch in architectures
    )


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outputs: dict[str, str], sub: str = "") -> int:
    library = "qemb_sm90" if sub else "qemb_cuda"
    path = tmp_path / "CMakeFiles" / f"{library}.dir" / "csrc" / "cuda" / sub / "swiglu.cu.o"
    path.parent.mkdir(parents=True)
    path.touch()
    (tmp_path / "cuda_architectures.txt").write_text("sm_80,sm_86,sm_90,sm_120\n")
    monkeypatch.setattr(check_sass, "find_tools", lambda: "tools")
    monkeypatch.setattr(check_sass, "dump", lambda tools, path, option: outputs[option])
    return check_sass.main(tmp_path)


ALL = ["80", "86", "90", "120"]


@pytest.mark.parametrize(
    ("code", "ptx", "stack", "says"),
    [
        (ALL, ["80"], "", "all kernels pass, for sm_80, sm_86, sm_90, sm_120"),
        (["80", "90", "120"], ["80"], "", "swiglu has no code of sm_86"),
        (ALL, [], "", "swiglu has no PTX of sm_80"),
        (ALL, ["80"], "90", "128 and 8 bytes of local memory"),
    ],
)
def test_every_architecture_is_looked_at(tmp_path, monkeypatch, capsys, code, ptx, stack, says):
    outputs = {"-lelf": listing("cubin", code), "-lptx": listing("ptx", ptx), "-res-usage": usage(code, stack)}
    assert run(tmp_path, monkeypatch, outputs) == (says[:3] != "all")
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sass", "says"),
    [
        ("HGMMA\nHGMMA\nHGMMA\nWARPGROUP.DEPBAR\n", None),
        ("HGMMA\nWARPGROUP.DEPBAR\nHGMMA\nWARPGROUP.DEPBAR\n", "2, serialized"),
        ("FFMA\n", "sm90/swiglu has no wgmma"),
        ("HGMMA\nUSETMAXREG.TRY_ALLOC.CTAPOOL UP1, 0xb0 ;\nUSETMAXREG.DEALLOC.CTAPOOL 0x18 ;\n", None),
        (
            "HGMMA\nUSETMAXREG.TRY_ALLOC.CTAPOOL UP1, 0xf0 ;\nUSETMAXREG.DEALLOC.CTAPOOL 0x18 ;\n",
            "128 of 168 that setmaxnreg needs",
        ),
    ],
)
def test_hopper_kernels(tmp_path, monkeypatch, capsys, sass, says):
    outputs = {
        "-lelf": listing("cubin", ["90a"]),
        "-lptx": "",
        "-res-usage": usage(["90a"]),
        "-sass": f"\t\tFunction : _Z6kernelv\n{sass}",
    }
    assert run(tmp_path, monkeypatch, outputs, sub="sm90") == (says is not None)
    if says:
        assert says in capsys.readouterr().out
