"""Looks up every installed package of some environments in a database of known vulnerabilities, with pip-audit.

    python tests/audit.py [python of an environment…] [-- options of pip-audit]

pip-audit ends with 0 even if it could look up nothing, and an index other than PyPI may not list vulnerabilities. So
the verdict is made here: 0 if every package was looked up and none is known to be vulnerable; 1 if one is; 2 if the
lookup was impossible or incomplete, or if the database does not know of a release that is certainly vulnerable.
"""
import itertools
import json
import re
import subprocess
import sys
import tempfile

CERTAINLY_VULNERABLE = ("flask", "0.5")  # CVE-2018-1000656, among others
LIST = "import importlib.metadata as m, json; print(json.dumps([[d.name, d.version] for d in m.distributions()]))"


class Unknown(Exception):
    """Why nothing can be said."""


def installed(python):
    """{(name, version)} of the packages that an environment's programs import, besides pip itself. A build of the same
    release (2.13.0+cpu) counts as that release, as databases know no builds."""
    pairs = json.loads(subprocess.run([python, "-c", LIST], check=True, capture_output=True, text=True).stdout)
    pins = {(re.sub(r"[-_.]+", "-", name).lower(), version.partition("+")[0]) for name, version in pairs}
    return {pin for pin in pins if pin[0] not in ("pip", "setuptools", "wheel")}


def look_up(pins, options):
    """{(name, version): IDs of its vulnerabilities}. Raises Unknown."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write("".join(f"{name}=={version}\n" for name, version in sorted(pins)))
        requirements.flush()
        ended = subprocess.run([sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off",
                                "--no-deps", "--disable-pip", "-r", requirements.name, *options],
                               capture_output=True, text=True)
    return vulnerabilities(pins, ended.stdout, ended.stderr)


def vulnerabilities(pins, output, errors=""):
    """The same, from what pip-audit has written."""
    try:
        found = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        why = errors.strip().splitlines()
        raise Unknown(f"pip-audit has no answer: {why[-1] if why else 'it says nothing'}") from None
    answered = {(package["name"], package["version"]): [entry["id"] for entry in package["vulns"]]
                for package in found if "vulns" in package}
    missing = sorted(set(pins) - answered.keys())
    if missing:
        why = next((package["skip_reason"] for package in found if "skip_reason" in package), "no reason given")
        raise Unknown(f"{len(missing)} of {len(pins)} packages were not looked up, {missing[0][0]} among them: {why}")
    return answered


def main(arguments):
    pythons, options = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        pythons, options = arguments[:at], arguments[at + 1:]
    versions = {}
    for name, version in sorted(set().union(*map(installed, pythons))):
        versions.setdefault(name, []).append((name, version))
    try:
        if not look_up([CERTAINLY_VULNERABLE], options)[CERTAINLY_VULNERABLE]:
            raise Unknown("the database does not know that {} {} is vulnerable".format(*CERTAINLY_VULNERABLE))
        found = {}
        for pins in itertools.zip_longest(*versions.values()):  # pip-audit takes one version of each
            found |= look_up([pin for pin in pins if pin], options)
    except Unknown as e:
        print(f"NOT AUDITED: {e}", file=sys.stderr)
        return 2
    bad = {pin: ids for pin, ids in found.items() if ids}
    for (name, version), ids in bad.items():
        print(f"{name} {version}: {', '.join(ids)}")
    print(f"{len(found)} packages were looked up, {len(bad)} of which have known vulnerabilities")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
