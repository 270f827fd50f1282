"""SECURITY.md names files, settings and tests: they must exist."""
import re

from conftest import ROOT

from app.config import Settings
from app.optional_settings import OptionalSettings

TEXT = (ROOT / "SECURITY.md").read_text()
NAMED = set(re.findall(r"`([^`\s]+)`", TEXT))


def test_every_file_that_it_names_exists():
    files = {name for name in NAMED if re.fullmatch(r"[\w./-]+\.(py|js|txt|conf|md)", name)}
    assert len(files) > 15
    assert [name for name in sorted(files) if not (ROOT / name).is_file()] == []


def test_every_test_that_it_names_exists():
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    defined = set(re.findall(r"^def (test_\w+)", sources, re.M))
    tests = {name for name in NAMED if name.startswith("test_")}
    assert len(tests) > 30
    assert tests - defined == set()


def test_every_setting_that_it_names_exists():
    settings = {name for name in NAMED if re.fullmatch(r"[A-Z]+(_[A-Z]+)+", name)}
    assert len(settings) > 15
    known = {*Settings.__dataclass_fields__, *OptionalSettings.__dataclass_fields__}
    assert {name for name in settings if name.lower() not in known} == set()
