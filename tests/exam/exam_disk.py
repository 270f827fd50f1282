"""Check 23: a disk that cannot be written to."""
import contextlib
import os
import subprocess

import pytest
from clients import ask, put_load
from conftest import encoded, photo


@contextlib.contextmanager
def small_disk(folder, state):
    """A folder that cannot be written to; for root a small separate file system, full or read-only."""
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield folder
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "exam", folder], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        if state == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.check(23, "/tmp or a metrics directory full or read-only; an empty .db file",
                   "predictions continue; /metrics 200")
def test_full_disk(start_service, golden, tmp_path, record_property):
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    (metrics / "counter_1.db").touch()
    large = encoded(photo("astronaut").resize((1500, 1500)), "PNG")  # more than Werkzeug keeps in memory by default
    for state in ("full", "read-only"):
        with small_disk(tmp_path / state, state) as folder:
            with pytest.raises(OSError, match=r".*"):
                (folder / "file").write_bytes(bytes(4096))
            for what, variables in {f"/tmp {state}": {"PROMETHEUS_MULTIPROC_DIR": str(metrics)},
                                    f"metrics {state}": {"PROMETHEUS_MULTIPROC_DIR": str(folder)}}.items():
                service = start_service(TMPDIR=str(folder), **variables).wait_ready()
                result = put_load(service, golden, 2, connections=2)
                status, _ = ask(service.port, "GET", "/metrics")
                record_property(what, f"{result['right']} right, {result['non_200'] + result['wrong']} not, "
                                      f"/metrics {status}")
                assert result["right"] > 0
                assert result["wrong"] == result["non_200"] == 0
                assert service.predict(large).status_code == 200
                assert status == 200
                assert service.stop() == 0
