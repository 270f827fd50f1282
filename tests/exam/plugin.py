"""The reliability exam as a pytest plugin: options, golden answers, a time limit for each check, the table.

A check is a test with the mark check(number, what is done, pass criterion); record_property adds its measurements.
"""
import datetime
import json
import os
import signal
import time
from pathlib import Path

import pytest

from bench.__main__ import machine

HERE = Path(__file__).parent
CHECK_WITHIN_S = 900  # far more than any check takes: the exam ends whatever hangs
PICTURES = ["chelsea", "coffee", "camera", "rocket"]


def pytest_addoption(parser):
    group = parser.getgroup("exam")
    group.addoption("--quick", action="store_true", help="shorter and fewer checks, in half the time")
    group.addoption("--only", help="numbers of the checks to run, such as 2,3,15")
    group.addoption("--output", type=Path, help="default: tests/exam/results.json, or results-quick.json with --quick")


def pytest_configure(config):
    config.addinivalue_line("python_files", "exam_*.py")
    config.addinivalue_line("markers", "check(number, what, passes): a check of the exam")
    config.pluginmanager.register(Report(config))


def pytest_collection_modifyitems(config, items):
    """Keep the chosen checks, sorted by number."""
    only = config.getoption("--only")
    chosen = [item for item in items if only is None or str(check_of(item)[0]) in only.split(",")]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = sorted(chosen, key=lambda item: check_of(item)[0])


def check_of(item):
    return item.get_closest_marker("check").args


@pytest.fixture(scope="session")
def quick(pytestconfig):
    return pytestconfig.getoption("--quick")


@pytest.fixture(autouse=True)
def bounded():
    """Ends every check, and its load, whatever happens in it."""
    import clients

    def too_late(*_):
        raise TimeoutError(f"the check did not end within {CHECK_WITHIN_S} s")
    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(CHECK_WITHIN_S)
    yield
    signal.alarm(0)
    clients.stop_all()


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """What a load sends and expects, as part of a bench.load specification. The answers are torch's own."""
    import torch
    from conftest import encoded, photo

    from app.prepare.networks import LITE0_PREPROCESSING, EfficientNetLite0, lite0_weights_path
    folder = tmp_path_factory.mktemp("pictures")
    module = EfficientNetLite0().eval()
    module.load_state_dict(torch.load(lite0_weights_path(), weights_only=True))
    files, expected = [], []
    for name in PICTURES:
        picture = photo(name).convert("RGB").resize((320, 256))
        path = folder / f"{name}.png"  # lossless: torch sees the same pixels
        path.write_bytes(encoded(picture, compress_level=1))
        with torch.inference_mode():
            probabilities = module(torch.from_numpy(LITE0_PREPROCESSING(picture))[None])[0].softmax(0)
        files.append(str(path))
        expected.append([int(probabilities.argmax()), float(probabilities.max())])
    return {"path": "/predict", "files": files, "expected": expected, "tolerance": 1e-3}


def processor_seconds():
    """(seconds that all processors were busy, the share of this process and its descendants in seconds)."""
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    parents, times = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(path.parent.name)
        parents[pid] = int(fields[1])
        times[pid] = sum(map(int, fields[11:15]))  # includes its children that have ended
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return (user + nice + system + irq + softirq + steal) / tick, sum(times.get(pid, 0) for pid in ours) / tick


@pytest.fixture(autouse=True)
def others_share(record_property):
    """How much of the processors other programs used meanwhile, so that a check failing on a busy machine says so."""
    busy, ours = processor_seconds()
    started = time.monotonic()
    yield
    busy_now, ours_now = processor_seconds()
    cores = os.cpu_count() * (time.monotonic() - started)
    share = max(0.0, (busy_now - busy) - (ours_now - ours)) / cores
    record_property("others took", f"{share:.0%}")


class Report:
    """Collects the outcome of every check, prints the table, writes the JSON."""

    def __init__(self, config):
        self.config, self.rows = config, []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "teardown" and self.rows and report.passed:  # includes what fixtures record after the check
            self.rows[-1]["measured"] = dict(item.user_properties)
        if report.when == "call" or not report.passed:
            number, what, passes = check_of(item)
            reason = "" if report.passed else (report.longrepr[2] if report.skipped else str(call.excinfo.value))
            verdict = "pass" if report.passed else "skipped" if report.skipped else "FAIL"
            self.rows.append({"number": number, "check": what, "passes": passes, "measured": dict(item.user_properties),
                              "verdict": verdict, "why": reason.splitlines()[0] if reason else "",
                              "seconds": round(call.duration, 1)})
        return report

    def pytest_terminal_summary(self, terminalreporter):
        rows = sorted(self.rows, key=lambda row: row["number"])
        terminalreporter.write_line("\n| # | check | passes if | measured | |\n|---|---|---|---|---|")
        for row in rows:
            figures = ", ".join(f"{name} {value}" for name, value in row["measured"].items())
            verdict = row["verdict"] if row["verdict"] == "pass" else f"**{row['verdict']}** {row['why']}"
            if row["verdict"] == "FAIL" and int(row["measured"].get("others took", "0%")[:-1]) >= 5:
                verdict += " (the machine was busy with other programs: run it again)"
            cells = str(row["number"]), row["check"], row["passes"], figures, verdict
            terminalreporter.write_line("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        quick = self.config.getoption("--quick")
        output = self.config.getoption("--output") or HERE / ("results-quick.json" if quick else "results.json")
        output.write_text(json.dumps({"date": datetime.date.today().isoformat(), "machine": machine(),
                                      "mode": "quick" if quick else "full", "load_average": os.getloadavg(),
                                      "checks": rows}, indent=1))
        terminalreporter.write_line(f"\nWritten to {output}")
