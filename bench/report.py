"""Tables of the benchmark's results: what was measured, where the time goes, which targets were met."""
import statistics

SMALL, MEDIUM, LARGE = "500x375", "1024x768", "4000x3000"
SIZES = (SMALL, MEDIUM, LARGE)
RIVALS = ("litserve", "flask", "fastapi")
OVER_CAPACITY = {"80 %": 0.8, "150 %": 1.5, "300 %": 3.0}
NAMES = {"limit fp32": "limit, fp32", "this fp32": "**this service**, fp32", "limit bf16": "limit, bf16",
         "this bf16": "**this service**, bf16", "litserve": "LitServe + torch", "flask": "Flask + Gunicorn + torch",
         "fastapi": "FastAPI + Uvicorn + torch"}
REFUSED_AT_ONCE_MS = 100


def median(outcome, system, measurement, *path):
    """The median over the rounds of a number in a measurement's results; None if it was not measured."""
    values = []
    for result in outcome["results"].get(system, {}).get(measurement, []):
        for key in path:
            result = result[key] if result is not None else None
        if result is not None:
            values.append(result)
    return statistics.median(values) if values else None


def throughput(outcome, system, size, load="c=8"):
    if system.startswith("limit"):
        load = {"c=1": "alone"}.get(load, "all cores")
    return median(outcome, system, f"{size} {load}", "throughput")


def ratio(a, b):
    return a / b if a is not None and b else None


def limit_of(system):
    return "limit bf16" if system.endswith("bf16") else "limit fp32"


def text(value, digits=1, unit=""):
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head),
                      *("| " + " | ".join(row) + " |" for row in rows)])


def markdown(outcome):
    systems = [system for system in NAMES if system in outcome["results"]]
    services = [system for system in systems if not system.startswith("limit")]
    versions = ", ".join(f"{name} {version}" for name, version in outcome["versions"].items())
    settings = "".join(f"; {name}={value}" for name, value in outcome["settings"].items())
    others, most = disturbance(outcome)
    parts = [f"{outcome['machine']['name']}. {outcome['date']}, {outcome['mode']} run, medians of {outcome['rounds']} "
             f"rounds{settings}. {versions}. Other programs used {others:.2f} cores on average, {most:.2f} at most.",
             "### Images per second, 8 connections (share of the limit)",
             table(["", *SIZES, "memory (PSS)", "ready after"], [throughput_row(outcome, s) for s in systems]),
             "### Latency and answers",
             table(["", "file", "load", "answers/s", "p50 ms", "p95 ms", "p99 ms", "not 200", "wrong", "p off by",
                    "client's CPU"],
                   [row for s in services for row in load_rows(outcome, s)]),
             "### Time per stage of a request, milliseconds (means)",
             table(["", "file", "load", "read", "queue", "decode", "preprocess", "inference", "rest", "total"],
                   [row for s in services if s.startswith("this") for row in stage_rows(outcome, s)]),
             "### Targets", table(["", "target", "measured", ""],
                                  [[t["number"], t["target"], t["measured"], t["verdict"]] for t in targets(outcome)])]
    if agreement := outcome["agreement"]:
        parts.append(f"bf16 against fp32, EfficientNet-Lite0 on {agreement['pictures']} pictures: "
                     f"{agreement['top1_changes']} top-1 changes; probabilities differ by {agreement['max_dp']:.3f} at "
                     f"most, those of the best class by {agreement['mean_dp_top1']:.4f} on average.")
    return "\n\n".join(parts)


def disturbance(outcome):
    """How many cores programs other than the service and the load generator used: (mean, maximum)."""
    others = [result["others_cpu"] for system in outcome["results"].values() for rounds in system.values()
              for result in rounds if isinstance(result, dict) and "others_cpu" in result]
    return (statistics.mean(others), max(others)) if others else (0.0, 0.0)


def throughput_row(outcome, system):
    row = [NAMES[system]]
    for size in SIZES:
        served = throughput(outcome, system, size)
        share = ratio(served, throughput(outcome, limit_of(system), size))
        row.append(text(served) + ("" if share is None or system.startswith("limit") else f" ({share:.2f})"))
    return [*row, text(median(outcome, system, "PSS MB"), 0, " MB"),
            text(median(outcome, system, "seconds to ready"), 2, " s")]


def load_rows(outcome, system):
    for measurement, rounds in outcome["results"][system].items():
        size, _, load = measurement.partition(" ")
        if size not in SIZES:
            continue
        latency = [text(median(outcome, system, measurement, "latency_ms", p)) for p in ("p50", "p95", "p99")]
        shares = [r["non_200"] / max(1, r["non_200"] + r["right"] + r["wrong"]) for r in rounds]
        yield [NAMES[system], size, load, text(median(outcome, system, measurement, "throughput")), *latency,
               f"{statistics.median(shares):.0%}", str(sum(result["wrong"] for result in rounds)),
               f"{max(result['probability_off'] for result in rounds):.0e}",
               f"{median(outcome, system, measurement, 'client_cpu'):.1%}"]


def stage_rows(outcome, system):
    for measurement in outcome["results"][system]:
        size, _, load = measurement.partition(" ")
        if size not in SIZES or not load.startswith("c="):
            continue
        stages = [median(outcome, system, measurement, "stages_ms", stage)
                  for stage in ("read", "queue", "decode", "preprocess", "inference")]
        total = median(outcome, system, measurement, "latency_ms", "mean")
        if total is not None and None not in stages:
            yield [NAMES[system], size, load, *(text(stage, 2) for stage in stages), text(total - sum(stages), 2),
                   text(total, 2)]


def targets(outcome):
    """The targets, each as {number, target, measured, verdict}: "met", "missed" or "not measured"."""
    found = []

    def add(number, target, values, reached, digits=2):
        """values: {what: number or None}; reached(number): whether it is good enough."""
        known = {what: value for what, value in values.items() if value is not None}
        measured = ", ".join(f"{what} {value:.{digits}f}" for what, value in known.items())
        complete = len(known) == len(values)
        verdict = "not measured" if not complete else "met" if all(map(reached, known.values())) else "missed"
        found.append({"number": str(number), "target": target, "measured": measured or "–", "verdict": verdict})

    def to_limit(size):
        return ratio(throughput(outcome, "this fp32", size), throughput(outcome, "limit fp32", size))

    def to_rivals(system, size):
        return {f"{rival} {size}": ratio(throughput(outcome, system, size), throughput(outcome, rival, size))
                for rival in RIVALS}

    add(1, "≥ 0.90 × limit, c=8, fp32", {size: to_limit(size) for size in (SMALL, MEDIUM)}, lambda v: v >= 0.9)
    for system, wanted in (("this fp32", 2.2), ("this bf16", 4)):
        add(2, f"≥ {wanted} × each rival, c=8, {system[5:]} versus fp32",
            to_rivals(system, SMALL) | to_rivals(system, MEDIUM), lambda v, wanted=wanted: v >= wanted)
        add(2, f"≥ 3 × each rival on {LARGE}, {system[5:]}", to_rivals(system, LARGE), lambda v: v >= 3)
    alone = {system[5:]: ratio(median(outcome, system, f"{SMALL} c=1", "latency_ms", "p50"),
                               median(outcome, limit_of(system), f"{SMALL} alone", "latency_ms", "p50"))
             for system in ("this fp32", "this bf16") if system in outcome["results"]}
    add(3, f"p50 of one request alone ≤ 1.15 × the limit's, {SMALL}", alone, lambda v: v <= 1.15)
    add(4, "first right answer ≤ 1.5 s after the start", {"s": median(outcome, "this fp32", "seconds to ready")},
        lambda v: v <= 1.5)
    add(4, "≤ 400 MB PSS, fp32", {"MB": median(outcome, "this fp32", "PSS MB")}, lambda v: v <= 400, 0)
    best = [throughput(outcome, "this fp32", SMALL, load) for load in ("c=8", "c=32", *OVER_CAPACITY)]
    best = max((value for value in best if value is not None), default=None)
    add(5, "answers/s at 3 × overload ≥ 0.9 × the best, fp32",
        {"": ratio(throughput(outcome, "this fp32", SMALL, "300 %"), best)}, lambda v: v >= 0.9)
    add(5, f"the others refused at once (p95 ≤ {REFUSED_AT_ONCE_MS} ms)",
        {"ms": median(outcome, "this fp32", f"{SMALL} 300 %", "refused_ms", "p95")},
        lambda v: v <= REFUSED_AT_ONCE_MS, 0)
    add(6, "on a GPU", {"": None}, bool)
    return found
