"""`pytest --quick`: what it leaves out, and that a test cannot start something heavy in it unnoticed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import subprocess, sys
import pytest

def start(name):  # a process with the name of one of Ray's
    subprocess.run([sys.executable, "-c", "import time; time.sleep(3)", name], check=True)

def test_light():
    start("something")

def test_unmarked():
    start("raylet")

@pytest.mark.ray
def test_marked():
    start("raylet")
"""


@pytest.mark.ray  # by the name of a process: it starts a test that is to be noticed
@pytest.mark.timeout(120)
def test_a_quick_test_that_starts_ray_fails_and_marked_ones_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "--rootdir", str(tmp_path), "-c", "/dev/null"]
    command += ["-p", "no:cacheprovider", "-rA", "--quick", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    said = done.stdout
    assert done.returncode == 1, said + done.stderr
    outcomes = re.findall(r"^(PASSED|ERROR) .*::(\w+)", said, re.MULTILINE)
    assert sorted(outcomes) == [("ERROR", "test_unmarked"), ("PASSED", "test_light"), ("PASSED", "test_unmarked")]
    assert "Failed: this test started Ray: mark it as one that does" in said
    assert "1 deselected" in said
