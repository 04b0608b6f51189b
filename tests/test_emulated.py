"""The tests of emulated/checks.py, in a process of their own: a device can't be taken out of one again."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from emulated.device import why_not
from tiny import ROOT, flags, tiny_config, token_set

CHECKS = Path(__file__).parent / "emulated" / "checks.py"
NAMES = re.findall(r"^def (test_\w+)", CHECKS.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, list[str]]:
    """Name of a test -> what went wrong in each of its cases; empty text: nothing."""
    report = tmp_path_factory.mktemp("emulated") / "report.xml"
    command = [sys.executable, "-m", "pytest", str(CHECKS), f"--junit-xml={report}", "--show-capture=stdout"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=CHECKS.parents[2])
    assert report.exists(), result.stdout + result.stderr
    wrong: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        texts = [part.text or part.tag for part in case if part.tag in ("failure", "error", "skipped")]
        wrong.setdefault(case.get("name", "").split("[")[0], []).append("\n".join(texts))
    return wrong


@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.parametrize("name", NAMES)
def test_emulated(outcomes, name):
    assert name in outcomes, "it was not run"
    assert not any(outcomes[name]), "\n".join(outcomes[name])


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_the_rehearsal_of_gpu_sh_compiles_on_the_emulated_card(tmp_path):
    """As in `bench/gpu.sh emulate`: every process has the card, and --compile traces."""
    everywhere = f"{ROOT / 'tests' / 'emulated' / 'everywhere'}{os.pathsep}{ROOT}"
    config = tiny_config(token_set(tmp_path / "data"), tmp_path / "log", device="cuda", compile=True, max_steps=2)
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *flags(config)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": everywhere})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "cuda (NVIDIA H100" in result.stdout and ", compiled, float32" in result.stdout
