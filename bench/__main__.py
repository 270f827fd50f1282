"""python -m bench: measures this service, its rivals and the limit in turn, in rounds; prints tables, writes JSON.

`make bench` and `make bench-quick` install what it needs first.
"""
import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import requests

from app.engine import bundle
from app.server.machine import usable_cores
from bench import inputs, report, services
from bench.machine import AVX2_ONLY, cpu_s, has_bf16, machine
from bench.report import LARGE, LIGHT, MEDIUM, OVER_CAPACITY, RIVALS, SIZES, SMALL

HERE = Path(__file__).parent
# Exact if both see every pixel; a much larger picture is decoded at a reduced scale, which changes probabilities.
TOLERANCE = {SMALL: 1e-3, MEDIUM: 1e-3, LARGE: 0.02}
REPEATED_ABOVE = 0.2  # cores that others used on average: what was measured beside them is measured once more


def call(module, specification):
    done = subprocess.run([sys.executable, "-m", module], input=json.dumps(specification), text=True, check=True,
                          stdout=subprocess.PIPE, cwd=services.ROOT)
    return json.loads(done.stdout)


def children_cpu_s():
    """Seconds of processor time of this process's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Beside:
    """What others used of the processor from its making on, as fields of a result."""

    def __init__(self):
        self.started, self.before = time.perf_counter(), cpu_s()

    def fields(self, own_s):
        """own_s: seconds of processor time of what is measured. Returns {others_cpu, stolen_cpu}: cores that other
        programs used, and that the machine's host took, on average."""
        elapsed = time.perf_counter() - self.started
        spent, stolen = (now - before for now, before in zip(cpu_s(), self.before, strict=True))
        return {"others_cpu": max(0.0, (spent - own_s) / elapsed), "stolen_cpu": stolen / elapsed}


def quieter(measure, describe):
    """Measure, and once more if others disturbed it much. Returns (the quieter result, the other's figures or None).

    describe(result): {"others_cpu", "stolen_cpu", …}."""
    first = measure()
    if report.disturbed_by(describe(first)) <= REPEATED_ABOVE:
        return first, None
    print(f"  others used {report.disturbed_by(describe(first)):.2f} cores meanwhile: measured once more",
          file=sys.stderr, flush=True)
    second = measure()
    best, other = sorted((first, second), key=lambda result: report.disturbed_by(describe(result)))
    return best, describe(other)


class Bench:
    def __init__(self, arguments):
        self.quick, self.only, self.cores, self.machine = arguments.quick, arguments.only, usable_cores(), machine()
        self.work = HERE / "work"
        self.work.mkdir(exist_ok=True)
        inputs.make(self.work / "inputs")
        self.models_folder = self.work / f"models{'-' + arguments.isa if arguments.isa else ''}"
        self.expected = json.loads((self.work / "inputs/expected.json").read_text())
        self.extra = dict(assignment.split("=", 1) for assignment in arguments.set)
        precisions = ["fp32", "int8"] + ["bf16"] * has_bf16(self.machine)
        self.systems = [f"{kind} {precision}" for precision in precisions for kind in ("limit", "this")]
        self.systems += ["this auto", *RIVALS, LIGHT, "ocean"]
        if unknown := set(arguments.only or ()) - set(self.systems):
            sys.exit(f"error: --only takes {', '.join(self.systems)}; not {', '.join(sorted(unknown))}")
        if arguments.only:
            self.systems = [system for system in self.systems if system in arguments.only]
        self.rounds = arguments.rounds or (1 if self.quick else 3)
        self.seconds = 3 if self.quick else 4
        self.results = {system: {} for system in self.systems}  # system → measurement → one result per round
        self.models, self.ocean = {}, None  # what GET /info says of each of this service's models

    def variables(self, system):
        """For the environment of a system."""
        name, _, kind = system.partition(" ")
        shared = {"MODEL_DIR": str(self.models_folder), "DEVICE": "cpu", **self.extra}
        if system == LIGHT:
            return {"MODEL_NAME": "efficientnet_lite0", "PRECISION": "fp32", **shared}
        weights = {"MODEL_NAME": "resnet50", "MODEL_PATH": str(self.work / "inputs/resnet50.pt")}
        if name in ("this", "limit"):
            return {**weights, "PRECISION": kind, **shared}
        return {**weights, "OPENVINO_MODEL": str(self.exported()) if kind == "openvino" else ""}

    def exported(self):
        """The model.xml that this service exported for fp32."""
        found = [path for path in (self.models_folder / "bundles").glob("resnet50-*-openvino*/model.xml")
                 if bundle.read(path.parent) and bundle.read(path.parent).quantization is None]
        return max(found, key=lambda path: path.stat().st_mtime)

    def prepare(self):
        """Prepare this service's models beforehand, as when an image is built."""
        needed = {system.replace("limit", "this") for system in self.systems
                  if system.startswith(("this", "limit")) or system == LIGHT}
        if any(system.endswith("openvino") for system in self.systems):
            needed.add("this fp32")
        for system in sorted(needed):
            print(f"preparing: {system}", file=sys.stderr, flush=True)
            subprocess.run([sys.executable, "-m", "app", "prepare"], check=True, cwd=services.ROOT,
                           stdout=subprocess.DEVNULL, env=services.environment(self.variables(system)))

    def load_of(self, size, system):
        """The part of a load's specification that says what to send and what to expect."""
        names = [name for name in self.expected if name.startswith(size)]
        exact = system == LIGHT or system.partition(" ")[2] in ("fp32", "torch", "openvino")
        return {"path": "/predict", "files": [str(self.work / "inputs" / name) for name in names],
                "expected": [self.expected[name] for name in names], "tolerance": TOLERANCE[size] if exact else None}

    def plan(self, system):
        """What to measure on a service in one round: (size, connections)."""
        if system == LIGHT:
            return [(SMALL, 8)]
        plan = [(SMALL, 1), (SMALL, 8), (MEDIUM, 8), (LARGE, 8)]
        if not self.quick:
            plan.insert(2, (SMALL, 32))
            if system.startswith("this"):
                plan += [(MEDIUM, 1), (LARGE, 1)]
        return plan

    def overload(self, system):
        """What to measure beyond that in the last round: the names of open loops."""
        if system == LIGHT:
            return ["500 %"]
        if self.quick:
            return ["300 %"] if system == "this fp32" else []
        return ["80 %", "150 %", "300 %"] if system.startswith("this") else ["300 %"]

    def run(self):
        if "ocean" in self.systems:
            self.measure_ocean()
        self.prepare()
        services_and_limits = [system for system in self.systems if system != "ocean"]
        for number in range(self.rounds):
            first = number * len(services_and_limits) // self.rounds
            for system in services_and_limits[first:] + services_and_limits[:first]:
                if system == LIGHT and number < self.rounds - 1:
                    continue
                print(f"round {number + 1} of {self.rounds}: {system}", file=sys.stderr, flush=True)
                if system.startswith("limit"):
                    self.measure_limit(system)
                else:
                    self.measure_service(system, last=number == self.rounds - 1)
        return self.summary()

    def measure_ocean(self):
        from bench import ocean
        print("ocean", file=sys.stderr, flush=True)
        beside, own = Beside(), children_cpu_s() + time.process_time()
        rows = ocean.measure(1 if self.quick else 5)
        self.ocean = {"rows": rows, **beside.fields(children_cpu_s() + time.process_time() - own)}

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

        def measure():
            beside, own = Beside(), children_cpu_s()
            measured = call("bench.limit", {"variables": self.variables(system), "processes": self.cores,
                                            "phases": phases})
            return measured, beside.fields(children_cpu_s() - own)
        (measured, disturbance), repeated = quieter(measure, lambda result: result[1])
        for measurement, result in measured.items():
            self.keep(system, measurement, {**result, **disturbance} | ({"repeated": repeated} if repeated else {}))

    def measure_service(self, system, last):
        probe = self.load_of(SMALL, system)
        if system == LIGHT:
            probe["expected"] = None
        running = services.Running(system.partition(" ")[0], self.variables(system), self.cores, self.work, probe)
        try:
            self.keep(system, "seconds to ready", running.seconds_to_ready)
            if system.startswith("this"):
                self.models[system] = requests.get(f"http://127.0.0.1:{running.port}/info", timeout=30).json()["model"]
            if system == LIGHT:
                self.expected_light = services.answers(running.port, probe["files"])
            for size, connections in self.plan(system):
                self.put_load(system, running, f"{size} c={connections}",
                              {**self.expecting(size, system), "connections": connections,
                               "warm_s": 1 if connections <= 8 else 2, "seconds": self.seconds})
            if last:
                for share in self.overload(system):
                    capacity = statistics.median(r["throughput"] for r in self.results[system][f"{SMALL} c=8"])
                    self.put_load(system, running, f"{SMALL} {share}",
                                  {**self.expecting(SMALL, system), "rate": capacity * OVER_CAPACITY[share],
                                   "warm_s": 2, "seconds": 2 * self.seconds})
            self.keep(system, "PSS MB", services.pss_mb(running.process.pid))
        finally:
            running.stop()

    def expecting(self, size, system):
        load = self.load_of(size, system)
        return {**load, "expected": self.expected_light} if system == LIGHT else load

    def put_load(self, system, running, measurement, load):
        """Measure one load, and how much of the processor the service and all others used, in cores."""
        def measure():
            beside, before, started = Beside(), running.cpu_s(), time.perf_counter()
            result = call("bench.load", {**load, "port": running.port})
            elapsed, own = time.perf_counter() - started, running.cpu_s() - before
            return result | {"service_cpu": own / elapsed} | beside.fields(own + result["client_cpu"] * elapsed)

        def describe(result):
            return {name: result[name] for name in ("throughput", "others_cpu", "stolen_cpu")}
        result, repeated = quieter(measure, describe)
        self.keep(system, measurement, result | ({"repeated": repeated} if repeated else {}))

    def summary(self):
        versions = bundle.installed_versions("torch", "torchvision", "openvino", "nncf", "flask", "gunicorn", "pillow",
                                             "numpy")
        return {"date": datetime.date.today().isoformat(), "machine": self.machine,
                "mode": "quick" if self.quick else "full", "rounds": self.rounds, "settings": self.extra,
                "only": self.only,
                "versions": versions | rival_versions(), "models": self.models, "ocean": self.ocean,
                "results": {system: found for system, found in self.results.items() if system != "ocean"}}


def rival_versions():
    versions = {}
    for name, packages in {"litserve": ["litserve"], "fastapi": ["fastapi", "uvicorn"], "bentoml": ["bentoml"]}.items():
        if not Path(services.rival_python(name)).exists():  # with --only, it may never have been installed
            continue
        code = f"import importlib.metadata as m; print(*[m.version(p) for p in {packages}])"
        done = subprocess.run([services.rival_python(name), "-c", code], capture_output=True, text=True, check=False)
        versions |= dict(zip(packages, done.stdout.split(), strict=False))
    return versions


def main():
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("--quick", action="store_true", help="about eight minutes instead of thirty-five")
    parser.add_argument("--rounds", type=int, help="default: 3, or 1 with --quick")
    parser.add_argument("--only", action="append", metavar="SYSTEM", help="this fp32, limit bf16, litserve torch, …")
    parser.add_argument("--isa", choices=["avx2"], help="emulate a processor that has no more: all systems are limited")
    parser.add_argument("--set", action="append", default=[], metavar="VARIABLE=VALUE", help="of this service")
    parser.add_argument("--output", type=Path, help="default: bench/results.json, or results-quick.json with --quick, "
                                                            "results-avx2.json with --isa avx2")
    arguments = parser.parse_args()
    if arguments.isa:
        os.environ.update(AVX2_ONLY)
    outcome = Bench(arguments).run()
    outcome["targets"] = report.targets(outcome)
    kind = f"-{arguments.isa}" if arguments.isa else "-quick" if arguments.quick else ""
    output = arguments.output or HERE / f"results{kind}.json"
    output.write_text(json.dumps(outcome, indent=1))
    print(report.markdown(outcome))
    print(f"\nWritten to {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
