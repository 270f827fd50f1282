"""Write deploy/locks/: all packages of the images with their hashes, from the pins in the requirements files.

    python deploy/lock.py [--upgrade]        or: make lock ARGS=--upgrade

Packages that are not pinned there stay as they are in the locks, if they fit; --upgrade takes the newest. torch.txt has
what torch needs, but not torch itself, as its CPU builds are on an index of their own (TORCH_INDEX in the Dockerfile).
"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCKS = ROOT / "deploy/locks"
TORCH = re.compile(r"(torch|torchvision)==")
OF_CUDA = re.compile(r"(nvidia|cuda|triton)\b")
SOURCES = {"jobs": "app/jobs/requirements.txt", "tracing": "app/tracing/requirements.txt",
           "int8": "app/prepare/requirements-int8.txt"}
PLATFORMS = "x86_64-manylinux_2_35", "aarch64-manylinux_2_35"


def pins(file):
    return [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines() if "==" in line]


def wanted():
    """{lock: its pins}"""
    own = pins("requirements.txt")
    torch = [pin for pin in own if TORCH.match(pin)]
    return {"cpu": [pin for pin in own if pin not in torch], **{name: pins(file) for name, file in SOURCES.items()},
            "torch": torch, "gpu": torch}


def compiled(output, requirements, *options):
    """Write a lock, and return its text."""
    done = subprocess.run([Path(sys.executable).parent / "uv", "pip", "compile", "--quiet", "--no-header",
                           "--no-annotate", "--python-version", "3.11", *options, "--output-file", output, "-"],
                          input="\n".join(requirements), text=True, check=False, cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    return output.read_text()


def main(*options):
    with tempfile.TemporaryDirectory() as folder:
        everything, one = Path(folder) / "all.txt", Path(folder) / "one.txt"
        if LOCKS.is_dir():  # one choice for all locks, which begins with theirs
            everything.write_text("".join(path.read_text() for path in sorted(LOCKS.glob("*.txt"))))
        chosen = compiled(everything, [pin for each in wanted().values() for pin in each], "--universal", *options)
        not_for_cpus = [f"--no-emit-package={name}" for name in re.findall(r"^([\w.-]+)==", chosen, re.M)
                        if OF_CUDA.match(name) or TORCH.match(name + "==")]
        LOCKS.mkdir(exist_ok=True)
        for name, requirements in wanted().items():
            one.unlink(missing_ok=True)
            text = compiled(one, requirements, "--universal", "--generate-hashes", "--constraints", everything,
                            *(not_for_cpus if name == "torch" else []))
            for platform in PLATFORMS:  # fails where there is no wheel
                compiled(Path(folder) / platform, text.splitlines(), "--no-deps", "--only-binary", ":all:",
                         "--python-platform", platform)
            (LOCKS / f"{name}.txt").write_text(f"# Written by make lock.\n{text}")
            print(f"deploy/locks/{name}.txt: {len(re.findall('==', text))} packages")


if __name__ == "__main__":
    main(*sys.argv[1:])
