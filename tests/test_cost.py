"""What tests/cost.py says of a command."""
import re
import subprocess
import sys

import pytest
from conftest import ROOT

ORPHAN = """
import os, sys, time
if not os.fork():
    if not os.fork():  # its parent ends before it does
        while time.process_time() < 1.6:
            pass
        open(sys.argv[1], "w").close()
    os._exit(0)
os.wait()
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
sys.exit(3)
"""


@pytest.mark.parametrize(("budget", "warns"), [("0", True), ("1000", False)])
def test_the_time_of_all_processes_counts_and_the_exit_code_is_the_commands(tmp_path, budget, warns):
    done = subprocess.run([sys.executable, ROOT / "tests/cost.py", budget, sys.executable, "-c", ORPHAN,
                           tmp_path / "done"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert int(re.search(r"(\d+) s of processor time", done.stdout)[1]) >= 2
    assert ("warning: " in done.stderr) == warns
