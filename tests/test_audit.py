"""The verdict of make audit, from what pip-audit 2.10.1 writes."""
import json
import sys

import audit
import pytest

PINS = [("flask", "3.1.3"), ("numpy", "2.4.6")]


def report(*packages):
    return json.dumps({"dependencies": packages, "fixes": []})


def looked_up(name, version, *ids):
    return {"name": name, "version": version, "vulns": [{"id": i, "fix_versions": [], "aliases": []} for i in ids]}


def test_vulnerabilities_are_listed():
    output = report(looked_up("flask", "3.1.3"), looked_up("numpy", "2.4.6", "PYSEC-1", "PYSEC-2"))
    assert audit.vulnerabilities(PINS, output) == {("flask", "3.1.3"): [], ("numpy", "2.4.6"): ["PYSEC-1", "PYSEC-2"]}


@pytest.mark.parametrize(("output", "errors", "says"), [
    ("", "Traceback…\nConnectionError: no such host", "pip-audit has no answer: ConnectionError: no such host"),
    ("null", "", "pip-audit has no answer: it says nothing"),
    (report(), "", "2 of 2 packages were not looked up, flask among them: no reason given"),
    (report(looked_up("flask", "3.1.3")), "", "1 of 2 packages were not looked up, numpy among them"),
    (report(looked_up("flask", "3.1.2"), looked_up("numpy", "2.4.6")), "", "1 of 2 packages"),
    (report(looked_up("flask", "3.1.3"), {"name": "numpy", "skip_reason": "Dependency not found"}), "",
     "1 of 2 packages were not looked up, numpy among them: Dependency not found"),
])
def test_what_was_not_looked_up_is_no_success(output, errors, says):
    with pytest.raises(audit.Unknown, match=says.replace("(", r"\(")):
        audit.vulnerabilities(PINS, output, errors)


def test_builds_count_as_their_release_and_pip_is_left_out():
    found = dict(audit.installed(sys.executable))
    assert {"flask", "torch", "pytest"} <= found.keys()
    assert not found.keys() & {"pip", "setuptools", "wheel"}
    assert not any("+" in version for version in found.values())


def test_without_pip_audit_nothing_is_claimed(capsys):
    assert audit.main([sys.executable]) == 2  # the tests' environment has no pip-audit
    assert capsys.readouterr().err.startswith("NOT AUDITED: ")
