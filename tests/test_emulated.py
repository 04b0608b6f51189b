"""The tests of emulated/checks.py, in a process of their own: a device can't be taken out of one again."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from emulated.device import why_not

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
