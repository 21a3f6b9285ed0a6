"""The pages that are made from the code are up to date."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_configuration_page_is_that_of_the_schema() -> None:
    done = subprocess.run(
        [sys.executable, "tools/document_config.py", "--check"], cwd=ROOT, timeout=60, capture_output=True
    )
    assert done.returncode == 0, "run: python tools/document_config.py"


def test_every_key_is_on_the_page() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for key in (
        "run_dir",
        "actor.tensor_parallel",
        "rollout.n",
        "teacher.decay_end",
        "loss.kl_coef",
        "sync.bucket_mib",
    ):
        assert f"`{key}`" in page
