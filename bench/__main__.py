"""python -m bench: measures this service, its rivals and the limit in turn, in rounds; prints tables, writes JSON.

`make bench` and `make bench-quick` install what it needs first.
"""
import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from app.engine.bundle import installed_versions
from app.server.machine import usable_cores
from bench import inputs, report, services
from bench.report import LARGE, MEDIUM, OVER_CAPACITY, RIVALS, SIZES, SMALL

HERE = Path(__file__).parent
# Exact if both see every pixel; a much larger picture is decoded at a reduced scale, which changes probabilities.
TOLERANCE = {SMALL: 1e-3, MEDIUM: 1e-3, LARGE: 0.02}


def native_bf16():
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text()


def machine():
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = fields.get("model name", platform.machine())
    return {"name": f"{cpu}, {usable_cores()} cores, {gib:.0f} GiB", "cpu": cpu,
            "cpu_family_model": f"{fields.get('cpu family')}/{fields.get('model')}", "cores": usable_cores(),
            "native_bf16": native_bf16(), "kernel": platform.release(), "python": platform.python_version()}


def call(module, specification):
    done = subprocess.run([sys.executable, "-m", module], input=json.dumps(specification), text=True, check=True,
                          stdout=subprocess.PIPE, cwd=services.ROOT)
    return json.loads(done.stdout)


def children_cpu_s():
    """Seconds of processor time of this process's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Bench:
    def __init__(self, arguments):
        self.quick, self.cores = arguments.quick, usable_cores()
        self.work = HERE / "work"
        self.work.mkdir(exist_ok=True)
        inputs.make(self.work / "inputs")
        self.expected = json.loads((self.work / "inputs/expected.json").read_text())
        self.extra = dict(assignment.split("=", 1) for assignment in arguments.set)
        precisions = ["fp32", "bf16"] if native_bf16() else ["fp32"]
        self.systems = [f"{kind} {precision}" for precision in precisions for kind in ("limit", "this")] + [*RIVALS]
        if arguments.only:
            self.systems = [system for system in self.systems if system in arguments.only]
        self.rounds = arguments.rounds or (1 if self.quick else 3)
        self.seconds = 3 if self.quick else 4
        self.results = {system: {} for system in self.systems}  # system → measurement → one result per round

    def variables(self, precision):
        return {"MODEL_NAME": "resnet50", "MODEL_PATH": str(self.work / "inputs/resnet50.pt"), "DEVICE": "cpu",
                "MODEL_DIR": str(self.work / "models"), "PRECISION": precision, **self.extra}

    def load_of(self, size, system):
        """The part of a load's specification that says what to send and what to expect."""
        names = [name for name in self.expected if name.startswith(size)]
        return {"path": "/predict", "files": [str(self.work / "inputs" / name) for name in names],
                "expected": [self.expected[name] for name in names],
                "tolerance": None if system.endswith("bf16") else TOLERANCE[size]}

    def plan(self):
        """What to measure on each service in one round: (size, connections)."""
        if self.quick:
            return [(SMALL, 1), (SMALL, 8), (SMALL, 32), (MEDIUM, 8), (LARGE, 8)]
        return [(size, connections) for size in SIZES for connections in (1, 8, 32)]

    def run(self):
        for system in self.systems:
            if system.startswith("this"):  # prepared beforehand, as when an image is built
                subprocess.run([sys.executable, "-m", "app", "prepare"], check=True, cwd=services.ROOT,
                               stdout=subprocess.DEVNULL,
                               env=services.environment(self.variables(system.split()[1])))
        for number in range(self.rounds):
            order = self.systems[number % len(self.systems):] + self.systems[:number % len(self.systems)]
            for system in order:
                print(f"round {number + 1} of {self.rounds}: {system}", file=sys.stderr, flush=True)
                if system.startswith("limit"):
                    self.measure_limit(system)
                else:
                    self.measure_service(system, last=number == self.rounds - 1)
        return self.summary()

    def keep(self, system, measurement, result):
        self.results[system].setdefault(measurement, []).append(result)

    def measure_limit(self, system):
        phases = []
        for size in SIZES:
            for at_work in (1, self.cores):
                load = self.load_of(size, system)
                phases.append([f"{size} {'alone' if at_work == 1 else 'all cores'}", load["files"], load["expected"],
                               load["tolerance"], at_work, 0.5, self.seconds])
        if self.cores == 1:  # alone is all cores
            phases += [[phase[0].replace("alone", "all cores"), *phase[1:]] for phase in phases[::2]]
        machine_before, own_before, started = services.machine_cpu_s(), children_cpu_s(), time.perf_counter()
        measured = call("bench.limit", {"variables": self.variables(system.split()[1]), "processes": self.cores,
                                        "phases": phases})
        others = services.machine_cpu_s() - machine_before - (children_cpu_s() - own_before)
        for measurement, result in measured.items():
            self.keep(system, measurement,
                      {**result, "others_cpu": max(0.0, others / (time.perf_counter() - started))})

    def measure_service(self, system, last):
        name, _, precision = system.partition(" ")
        variables = self.variables(precision or "fp32")
        running = services.Running(name, variables, self.cores, self.work, self.load_of(SMALL, system))
        try:
            self.keep(system, "seconds to ready", running.seconds_to_ready)
            for size, connections in self.plan():
                self.put_load(system, running, f"{size} c={connections}",
                              {**self.load_of(size, system), "connections": connections,
                               "warm_s": 1 if connections <= 8 else 2, "seconds": self.seconds})
            if last and (name == "this" or not self.quick):
                capacity = statistics.median(r["throughput"] for r in self.results[system][f"{SMALL} c=8"])
                for share, factor in OVER_CAPACITY.items():
                    self.put_load(system, running, f"{SMALL} {share}",
                                  {**self.load_of(SMALL, system), "rate": capacity * factor, "warm_s": 2,
                                   "seconds": 2 * self.seconds})
            self.keep(system, "PSS MB", services.pss_mb(running.process.pid))
        finally:
            running.stop()

    def put_load(self, system, running, measurement, load):
        """Measure one load, and how much of the processor the service and all other programs used, in cores."""
        machine_before, service_before, started = services.machine_cpu_s(), running.cpu_s(), time.perf_counter()
        result = call("bench.load", {**load, "port": running.port})
        elapsed = time.perf_counter() - started
        result["service_cpu"] = (running.cpu_s() - service_before) / elapsed
        spent = (services.machine_cpu_s() - machine_before) / elapsed
        result["others_cpu"] = max(0.0, spent - result["service_cpu"] - result["client_cpu"])
        self.keep(system, measurement, result)

    def summary(self):
        agreement = None
        if "this bf16" in self.systems:
            done = subprocess.run([sys.executable, "-m", "bench.agreement", str(self.work / "models")], check=True,
                                  stdout=subprocess.PIPE, text=True, cwd=services.ROOT)
            agreement = json.loads(done.stdout)
        versions = installed_versions("torch", "torchvision", "openvino", "flask", "gunicorn", "pillow", "numpy")
        return {"date": datetime.date.today().isoformat(), "machine": machine(),
                "mode": "quick" if self.quick else "full", "rounds": self.rounds, "settings": self.extra,
                "versions": versions | rival_versions(), "agreement": agreement, "results": self.results}


def rival_versions():
    versions = {}
    for name, packages in {"litserve": ["litserve"], "fastapi": ["fastapi", "uvicorn"]}.items():
        code = f"import importlib.metadata as m; print(*[m.version(p) for p in {packages}])"
        done = subprocess.run([services.rival_python(name), "-c", code], capture_output=True, text=True, check=False)
        versions |= dict(zip(packages, done.stdout.split(), strict=False))
    return versions


def main():
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("--quick", action="store_true", help="about four minutes instead of twenty")
    parser.add_argument("--rounds", type=int, help="default: 3, or 1 with --quick")
    parser.add_argument("--only", action="append", metavar="SYSTEM", help="this fp32, limit bf16, litserve, …")
    parser.add_argument("--set", action="append", default=[], metavar="VARIABLE=VALUE", help="of this service")
    parser.add_argument("--output", type=Path, help="default: bench/results.json, or results-quick.json with --quick")
    arguments = parser.parse_args()
    outcome = Bench(arguments).run()
    outcome["targets"] = report.targets(outcome)
    output = arguments.output or HERE / ("results-quick.json" if arguments.quick else "results.json")
    output.write_text(json.dumps(outcome, indent=1))
    print(report.markdown(outcome))
    print(f"\nWritten to {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
