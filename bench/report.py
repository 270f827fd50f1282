"""Tables of the benchmark's results: what was measured, where the time goes, which targets were met."""
import statistics

from bench.machine import has_avx512, has_low_precision

SMALL, MEDIUM, LARGE = "500x375", "1024x768", "4000x3000"
SIZES = (SMALL, MEDIUM, LARGE)
TORCH = ("litserve torch", "fastapi torch", "bentoml torch", "flask torch")
OPENVINO = ("litserve openvino", "fastapi openvino", "bentoml openvino")
RIVALS = TORCH + OPENVINO
LIGHT = "this efficientnet_lite0"
OVER_CAPACITY = {"80 %": 0.8, "150 %": 1.5, "300 %": 3.0, "500 %": 5.0}
FRAMEWORKS = {"litserve": "LitServe", "fastapi": "FastAPI + Uvicorn", "bentoml": "BentoML", "flask": "Flask + Gunicorn"}
REFUSED_AT_ONCE_MS = 100
DISTURBED_ABOVE = 0.1  # cores that others used on average
MARK = "°"             # of figures that were measured beside others
NOT_JUDGED = "–"
OCEAN_CASES = {"portrait": "720p portrait", "clip": "ten frames of 15 s of 720p"}


def median(outcome, system, measurement, *path):
    """The median over the rounds of a number in a measurement's results; None if it was not measured."""
    values = []
    for result in outcome["results"].get(system, {}).get(measurement, []):
        for key in path:
            result = result.get(key) if result is not None else None
        if result is not None:
            values.append(result)
    return statistics.median(values) if values else None


def throughput(outcome, system, size, load="c=8"):
    if system.startswith("limit"):
        load = {"c=1": "alone"}.get(load, "all cores")
    return median(outcome, system, f"{size} {load}", "throughput")


def ratio(a, b):
    return a / b if a is not None and b else None


def precision_of(outcome, system):
    """What a system computes in: for `auto` what this service chose."""
    kind = system.partition(" ")[2]
    if kind == "auto":
        return outcome["models"].get(system, {}).get("precision")
    return kind if system.startswith(("this", "limit")) and system != LIGHT else "fp32"


def limit_of(outcome, system):
    return f"limit {precision_of(outcome, system)}"


def name_of(outcome, system):
    kind, _, variant = system.partition(" ")
    if system == LIGHT:
        return "**this service**, EfficientNet-Lite0, fp32"
    if kind == "limit":
        return f"limit, {variant}"
    if kind == "this":
        chosen = f" (chose {precision_of(outcome, system)})" if variant == "auto" else ""
        return f"**this service**, {variant}{chosen}"
    return f"{FRAMEWORKS[kind]} + {'OpenVINO' if variant == 'openvino' else variant}"


def text(value, digits=1, unit=""):
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head),
                      *("| " + " | ".join(row) + " |" for row in rows)])


def markdown(outcome):
    """Ready to be pasted into docs/performance.md, headings included."""
    systems = list(outcome["results"])
    services = [system for system in systems if not system.startswith("limit")]
    versions = ", ".join(f"{name} {version}" for name, version in outcome["versions"].items())
    settings = "".join(f"; {name}={value}" for name, value in outcome["settings"].items())
    parts = [f"{outcome['machine']['name']}. {outcome['date']}, {outcome['mode']} run, medians of {outcome['rounds']} "
             f"round{'s' * (outcome['rounds'] > 1)}{settings}. {versions}.", disturbance_text(outcome),
             "### Images per second, 8 connections (share of the limit)",
             table(["", *SIZES, "memory (PSS)", "ready after"],
                   [throughput_row(outcome, s) for s in systems if s != LIGHT])]
    if outcome["ocean"]:
        parts += ["### OCEAN against its original way, milliseconds",
                  table(["", "this service", "original, 1 thread", "original, all cores", "ratio to the better one",
                         "scores off by"], ocean_rows(outcome["ocean"]))]
    parts += ["### Latency and answers",
              table(["", "file", "load", "answers/s", "p50 ms", "p95 ms", "p99 ms", "not 200", "wrong", "p off by",
                     "client's CPU", "others' CPU"], [row for s in services for row in load_rows(outcome, s)]),
              "### Time per stage of a request, milliseconds (means)",
              table(["", "file", "load", "read", "queue", "decode", "preprocess", "inference", "rest", "total"],
                    [row for s in services if s.startswith("this") for row in stage_rows(outcome, s)]),
              "### Targets", table(["", "target", "measured", ""],
                                   [[t["number"], t["target"], t["measured"], t["verdict"]] for t in targets(outcome)])]
    return "\n\n".join(parts)


def disturbed_by(result):
    """Cores that others took from a measurement on average: other programs, and the host of a virtual machine."""
    return result.get("others_cpu", 0.0) + result.get("stolen_cpu", 0.0)


def is_disturbed(rounds):
    return any(isinstance(result, dict) and disturbed_by(result) > DISTURBED_ABOVE for result in rounds)


def disturbance_text(outcome):
    """A sentence or two on how far the machine was idle otherwise."""
    results = [(result, f"{system}, {measurement}") for system, found in outcome["results"].items()
               for measurement, rounds in found.items() for result in rounds
               if isinstance(result, dict) and "others_cpu" in result]
    if not results:
        return "Nothing was measured."
    means = [statistics.mean(result.get(name, 0.0) for result, _ in results) for name in ("others_cpu", "stolen_cpu")]
    most, where = max(((disturbed_by(result), where) for result, where in results), key=lambda pair: pair[0])
    disturbed = sum(disturbed_by(result) > DISTURBED_ABOVE for result, _ in results)
    repeated = sum("repeated" in result for result, _ in results)
    said = (f"Other programs used {means[0]:.2f} cores on average, the machine's host took {means[1]:.2f}; both "
            f"together {most:.2f} at most ({where}).")
    if disturbed:
        said += (f" **{disturbed} of {len(results)} measurements were disturbed: others took more than "
                 f"{DISTURBED_ABOVE} cores. Their figures are marked {MARK}.**")
    if repeated:
        said += f" {repeated} were repeated for that reason; the quieter one of both counts."
    return said


def marked(outcome, system, measurement, value):
    return value + MARK * is_disturbed(outcome["results"].get(system, {}).get(measurement, []))


def throughput_row(outcome, system):
    row = [name_of(outcome, system)]
    for size in SIZES:
        served = throughput(outcome, system, size)
        share = ratio(served, throughput(outcome, limit_of(outcome, system), size))
        load = "all cores" if system.startswith("limit") else "c=8"
        row.append(marked(outcome, system, f"{size} {load}", text(served))
                   + ("" if share is None or system.startswith("limit") else f" ({share:.2f})"))
    return [*row, text(median(outcome, system, "PSS MB"), 0, " MB"),
            text(median(outcome, system, "seconds to ready"), 2, " s")]


def load_rows(outcome, system):
    for measurement, rounds in outcome["results"][system].items():
        size, _, load = measurement.partition(" ")
        if size not in SIZES:
            continue
        latency = [text(median(outcome, system, measurement, "latency_ms", p)) for p in ("p50", "p95", "p99")]
        shares = [r["non_200"] / max(1, r["non_200"] + r["right"] + r["wrong"]) for r in rounds]
        yield [name_of(outcome, system), size, load,
               marked(outcome, system, measurement, text(median(outcome, system, measurement, "throughput"))), *latency,
               f"{statistics.median(shares):.0%}", str(sum(result["wrong"] for result in rounds)),
               f"{max(result['probability_off'] for result in rounds):.0e}",
               f"{median(outcome, system, measurement, 'client_cpu'):.1%}",
               f"{statistics.median(map(disturbed_by, rounds)):.1%}"]


def stage_rows(outcome, system):
    for measurement in outcome["results"][system]:
        size, _, load = measurement.partition(" ")
        if size not in SIZES or not load.startswith("c="):
            continue
        stages = [median(outcome, system, measurement, "stages_ms", stage)
                  for stage in ("read", "queue", "decode", "preprocess", "inference")]
        total = median(outcome, system, measurement, "latency_ms", "mean")
        if total is not None and None not in stages:
            yield [name_of(outcome, system), size, load, *(text(stage, 2) for stage in stages),
                   text(total - sum(stages), 2), text(total, 2)]


def ocean_rows(ocean):
    """ocean: bench.ocean.measure's result, with the fields of bench.__main__.Beside."""
    return [[f"{backbone}, {OCEAN_CASES[case]}", text(row["service_ms"], 0) + MARK * is_disturbed([ocean]),
             text(row["original_1_thread_ms"], 0), text(row["original_all_threads_ms"], 0), text(row["ratio"], 2),
             f"{row['off']:.0e}"] for backbone, rows in ocean["rows"].items() for case, row in rows.items()]


def costs(quantization, precision):
    """(share of top classes that change against fp32, number of held-out pictures) in a manifest's `quantization`, or
    (None, None) if nothing was measured."""
    measured = ((quantization or {}).get("precisions") or {}).get(precision)
    if measured is None:
        return None, None
    return measured["cost"], quantization["pictures"]["held_out"]


def targets(outcome):
    """The targets, each as {number, target, measured, verdict}: "met", "missed" or "not measured". Those that the
    processor or the machine cannot have are left out, and with --only those that were not measured at all."""
    found, machine = [], outcome["machine"]

    def add(number, target, values, reached, digits=2):
        """values: {what: number or None}; reached(number): whether it is good enough."""
        known = {what: value for what, value in values.items() if value is not None}
        measured = ", ".join(f"{what} {value:.{digits}f}".strip() for what, value in known.items())
        complete = bool(values) and len(known) == len(values)
        verdict = "not measured" if not complete else "met" if all(map(reached, known.values())) else "missed"
        found.append({"number": str(number), "target": target, "measured": measured or "–", "verdict": verdict})

    def at_least(wanted):
        return lambda value: value >= wanted

    def at_most(wanted):
        return lambda value: value <= wanted

    def to_rivals(system, rivals, sizes):
        return {f"{name_of(outcome, rival)} {size}": ratio(throughput(outcome, system, size),
                                                           throughput(outcome, rival, size))
                for rival in rivals for size in sizes}

    for precision in ("fp32", "int8"):
        to_limit = {size: ratio(throughput(outcome, f"this {precision}", size),
                                throughput(outcome, f"limit {precision}", size)) for size in SIZES}
        add(1, f"≥ 0.95 × limit, c=8, {precision}", {size: to_limit[size] for size in (SMALL, MEDIUM)}, at_least(0.95))
        add(1, f"≥ 0.90 × limit, c=8, {precision}, {LARGE}", {LARGE: to_limit[LARGE]}, at_least(0.9))

    over_torch = 2 if has_avx512(machine) else 1.5
    fastest, chosen = (4 if has_low_precision(machine) else 3), precision_of(outcome, "this auto") or "?"
    for sizes, where in (((SMALL, MEDIUM), ""), ((LARGE,), f", {LARGE}")):
        add(2, f"≥ 1.3 × each alternative with OpenVINO, fp32{where}", to_rivals("this fp32", OPENVINO, sizes),
            at_least(1.3))
        add(2, f"≥ {over_torch} × LitServe + torch, fp32{where}", to_rivals("this fp32", TORCH[:1], sizes),
            at_least(over_torch))
        add(2, f"≥ {fastest} × LitServe + torch, auto (chose {chosen}){where}",
            to_rivals("this auto", TORCH[:1], sizes), at_least(fastest))

    for system in ("this auto", "this int8"):
        if system in outcome["models"]:
            precision = precision_of(outcome, system)
            share, pictures = costs(outcome["models"][system].get("quantization"), precision)
            add(3, f"≤ 1 % of top classes changed, {system[5:]}",
                {f"{precision} on {pictures} pictures, %": share and 100 * share}, at_most(1))
            add(3, "measured on at least 1,000 held-out pictures", {"": pictures}, at_least(1000), 0)

    if machine["cores"] > 1:
        alone = {system[5:]: ratio(median(outcome, system, f"{SMALL} c=1", "latency_ms", "p50"),
                                   median(outcome, f"limit {system[5:]}", f"{SMALL} alone", "latency_ms", "p50"))
                 for system in ("this fp32", "this int8", "this bf16") if system in outcome["results"]}
        add(4, f"p50 of one request alone ≤ 0.7 × the limit's, {SMALL}", alone, at_most(0.7))

    for case, wanted in (("portrait", 2), ("clip", 2.5)):
        add(5, f"OCEAN, {OCEAN_CASES[case]}: ≥ {wanted} × its original way",
            {backbone: rows[case]["ratio"] for backbone, rows in (outcome["ocean"] or {}).get("rows", {}).items()},
            at_least(wanted))

    ready = 1.5 if has_avx512(machine) else 2.0
    add(6, f"first right answer ≤ {ready} s after the start, fp32",
        {"s": median(outcome, "this fp32", "seconds to ready")}, at_most(ready))
    add(6, "≤ 380 MB PSS after large pictures, fp32", {"MB": median(outcome, "this fp32", "PSS MB")}, at_most(380), 0)

    for system, share, wanted, loads in (("this fp32", "300 %", 0.9, ("c=8", "c=32", "80 %", "150 %", "300 %")),
                                         (LIGHT, "500 %", 0.75, ("c=8", "500 %"))):
        model = "EfficientNet-Lite0" if system == LIGHT else "ResNet-50"
        best = max((value for value in (throughput(outcome, system, SMALL, load) for load in loads)
                    if value is not None), default=None)
        add(7, f"answers/s at {share} of capacity ≥ {wanted} × the best, {model}, fp32",
            {"": ratio(throughput(outcome, system, SMALL, share), best)}, at_least(wanted))
        add(7, f"the others refused at once (p95 ≤ {REFUSED_AT_ONCE_MS} ms)",
            {"ms": median(outcome, system, f"{SMALL} {share}", "refused_ms", "p95")}, at_most(REFUSED_AT_ONCE_MS), 0)
    if outcome.get("only"):
        return [target for target in found if target["measured"] != NOT_JUDGED]
    return [*found, {"number": "8", "target": "on a GPU", "measured": "no GPU", "verdict": NOT_JUDGED}]
