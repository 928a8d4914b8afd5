"""``fastseq completion``: the script, run by bash itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastseq import cli

SHTAB = "shtab is not installed"


def test_without_shtab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == ("fastseq completion: needs shtab: pip install fastseq-kernels[completion]\n")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("fastseq ", ["demo", "info", "doctor", "inspect", "convert", "completion"]),
        ("fastseq con", ["convert"]),
        ("fastseq convert --fr", ["--from"]),
        ("fastseq convert --from ", ["g2-lstm", "distsup", "torch-uncertainty", "adaptdl"]),
        ("fastseq demo v", ["vq"]),
        ("fastseq inspect mod", ["model.fastseq"]),
    ],
)
def test_bash(typed: str, offered: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason=SHTAB)
    if shutil.which("bash") is None:
        pytest.skip("bash is not here")
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "model.fastseq").touch()
    words = typed.split(" ")
    answer = "printf '%s\\n' \"${COMPREPLY[@]}\""
    ask = (
        f"COMP_WORDS=({' '.join(repr(w) for w in words)}); COMP_CWORD={len(words) - 1}; COMP_LINE={typed!r}; "
        f"COMP_POINT={len(typed)}; _shtab_fastseq fastseq {words[-1]!r} {words[-2]!r}; {answer}"
    )
    run = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert set(offered) <= set(run.stdout.split()), run.stderr
    assert "demo" not in run.stdout.split() or typed == "fastseq "


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason=SHTAB)
    assert cli.main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "torch-uncertainty" in out and ("complete fastseq" in out or "#compdef fastseq" in out)
