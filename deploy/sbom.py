"""Write dist/sbom-TARGET.cdx.json: the Python packages of an image with their hashes, in CycloneDX's format.

    python deploy/sbom.py cpu|full|gpu       or: make sbom TARGET=full
"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
LOCKS = {"cpu": ["cpu"], "full": ["cpu", "torch"], "gpu": ["cpu", "gpu"]}


def main(target):
    name, version = re.search(r'^NAME, VERSION = "(.*)", "(.*)"', (ROOT / "app/config.py").read_text(), re.M).groups()
    text = "".join((ROOT / f"deploy/locks/{lock}.txt").read_text() for lock in LOCKS[target])
    output = ROOT / f"dist/sbom-{target}.cdx.json"
    output.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        project, lock = Path(folder) / "pyproject.toml", Path(folder) / "lock.txt"
        project.write_text(f'[project]\nname = "{name}"\nversion = "{version}"\n')
        # What the markers of the lock mean on Linux.
        subprocess.run([BIN / "uv", "pip", "compile", "--quiet", "--no-deps", "--no-header", "--no-annotate",
                        "--generate-hashes", "--python-version", "3.11", "--python-platform", "linux",
                        "--output-file", lock, "-"], input=text, text=True, check=True)
        if target == "full":  # they come from another index, and so without hashes
            torch = re.findall(r"^torch(?:vision)?==.*\n", (ROOT / "requirements.txt").read_text(), re.M)
            lock.write_text(lock.read_text() + "".join(torch))
        subprocess.run([BIN / "cyclonedx-py", "requirements", "--pyproject", project, "--output-reproducible",
                        "--output-file", output, lock], check=True)
    print(output.relative_to(ROOT))


if __name__ == "__main__":
    main(*sys.argv[1:])
