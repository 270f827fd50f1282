"""The benchmark's report: targets by processor, what was disturbed, what was not measured."""
import pytest

from app.prepare.bundles import has_vnni
from bench import report
from bench.machine import cpu_s, has_avx512, has_bf16, has_low_precision, machine, processor

ZEN_3 = "fpu sse4_2 avx avx2 fma"
ZEN_5 = ZEN_3 + " avx512f avx512vl avx512_vnni avx512_bf16"
ALDER_LAKE = ZEN_3 + " avx_vnni"


def machine_with(tmp_path, flags, cores=2):
    cpuinfo = tmp_path / "cpuinfo"
    one = f"processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: Some CPU\nflags\t\t: {flags}\n"
    cpuinfo.write_text(f"{one}\n{one.replace('Some', 'Second')}\n")
    return processor(cpuinfo) | {"name": "Some CPU", "cores": cores}


def load(throughput, p50=10.0, others=0.0, stolen=0.0, **more):
    latency = dict.fromkeys(("p50", "p95", "p99", "mean"), p50)
    return {"throughput": throughput, "latency_ms": latency, "refused_ms": latency, "others_cpu": others,
            "stolen_cpu": stolen, "right": 9, "wrong": 0, "non_200": 0, "probability_off": 0.0, "client_cpu": 0.01,
            "stages_ms": {}, **more}


def outcome_of(machine, throughputs, **more):
    """throughputs: {system: answers a second at eight connections on every size}."""
    results = {}
    for system, value in throughputs.items():
        at_work = "all cores" if system.startswith("limit") else "c=8"
        results[system] = {f"{size} {at_work}": [load(value)] for size in report.SIZES}
    return {"machine": machine, "results": results, "models": {}, "ocean": None, "versions": {}, "settings": {},
            "rounds": 1, "mode": "quick", "date": "2026-11-22", **more}


def verdicts(outcome, start):
    return [target["verdict"] for target in report.targets(outcome) if target["target"].startswith(start)]


def test_the_processor_is_named_with_the_instruction_sets_that_matter(tmp_path):
    found = machine_with(tmp_path, ZEN_5)
    assert (found["cpu"], found["cpu_family_model"]) == ("Some CPU", "26/2")
    assert found["instruction_sets"] == ["AVX2", "AVX-512F", "AVX512_VNNI", "AVX512_BF16"]


def test_an_emulated_processor_has_avx2_alone_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine_with(tmp_path, ZEN_5)["instruction_sets"] == ["AVX2"]
    assert "emulated: limited to AVX2" in machine()["name"]
    assert not has_vnni()


@pytest.mark.parametrize(("flags", "avx512", "bf16", "low_precision"), [
    (ZEN_3, False, False, False), (ALDER_LAKE, False, False, True), (ZEN_3 + " avx512f", True, False, False),
    (ZEN_5, True, True, True), (ZEN_3 + " amx_tile amx_bf16 amx_int8", False, True, True)])
def test_what_a_processor_has(tmp_path, flags, avx512, bf16, low_precision):
    machine = machine_with(tmp_path, flags)
    assert (has_avx512(machine), has_bf16(machine), has_low_precision(machine)) == (avx512, bf16, low_precision)


def test_time_stolen_by_the_host_is_told_apart(tmp_path):
    (tmp_path / "stat").write_text("cpu  100 10 50 9999 8888 1 4 300 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    spent, stolen = cpu_s(tmp_path / "stat")
    assert stolen / spent == pytest.approx(300 / 165)


@pytest.mark.parametrize(("flags", "over_torch", "fastest", "ready"), [
    (ZEN_3, "1.5", "3", "2.0"), (ALDER_LAKE, "1.5", "4", "2.0"), (ZEN_5, "2", "4", "1.5")])
def test_targets_depend_on_the_processor(tmp_path, flags, over_torch, fastest, ready):
    targets = [target["target"] for target in report.targets(outcome_of(machine_with(tmp_path, flags), {}))]
    assert f"≥ {over_torch} × LitServe + torch, fp32" in targets
    assert f"≥ {fastest} × LitServe + torch, auto (chose ?)" in targets
    assert f"first right answer ≤ {ready} s after the start, fp32" in targets


@pytest.mark.parametrize(("served", "verdict"), [(30, "met"), (20, "met"), (19, "missed")])
def test_a_target_is_met_or_missed_by_its_ratio(tmp_path, served, verdict):
    outcome = outcome_of(machine_with(tmp_path, ZEN_5), {"this fp32": served, "litserve torch": 10})
    assert verdicts(outcome, "≥ 2 × LitServe + torch, fp32") == [verdict, verdict]
    assert set(verdicts(outcome, "≥ 1.3 × each alternative with OpenVINO")) == {"not measured"}


def test_with_only_some_systems_only_what_was_measured_is_listed(tmp_path):
    measured = {"this int8": 30, "limit int8": 31}
    outcome = outcome_of(machine_with(tmp_path, ZEN_5), measured, only=list(measured))
    assert [(target["target"], target["verdict"]) for target in report.targets(outcome)] == [
        ("≥ 0.95 × limit, c=8, int8", "met"), ("≥ 0.90 × limit, c=8, int8, 4000x3000", "met")]


def test_the_strongest_alternative_decides(tmp_path):
    rivals = dict.fromkeys(report.OPENVINO, 10) | {"bentoml openvino": 16}
    outcome = outcome_of(machine_with(tmp_path, ZEN_5), {"this fp32": 20, **rivals})
    assert set(verdicts(outcome, "≥ 1.3 × each alternative with OpenVINO")) == {"missed"}


def test_what_auto_chose_decides_its_limit(tmp_path):
    outcome = outcome_of(machine_with(tmp_path, ZEN_5), {"limit fp32": 10, "limit int8": 40, "this auto": 38},
                         models={"this auto": {"precision": "int8"}})
    assert report.throughput_row(outcome, "this auto")[:2] == ["**this service**, auto (chose int8)", "38.0 (0.95)"]


@pytest.mark.parametrize(("cost", "pictures", "expected"), [
    (0.004, 1200, ["met", "met"]), (0.0, 1000, ["met", "met"]), (0.02, 999, ["missed", "missed"])])
def test_the_accuracy_that_a_lower_precision_costs_is_a_target(tmp_path, cost, pictures, expected):
    quantization = {"chosen": "int8", "pictures": {"held_out": pictures}, "precisions": {"int8": {"cost": cost}}}
    outcome = outcome_of(machine_with(tmp_path, ZEN_5), {},
                         models={"this auto": {"precision": "int8", "quantization": quantization}})
    assert [target["verdict"] for target in report.targets(outcome) if target["number"] == "3"] == expected


def test_one_core_has_no_target_that_needs_two(tmp_path):
    for cores, expected in ((1, []), (2, ["not measured"])):
        assert verdicts(outcome_of(machine_with(tmp_path, ZEN_3, cores), {}), "p50 of one request") == expected


@pytest.mark.parametrize(("others", "stolen", "marked"), [(0.05, 0.04, False), (0.11, 0.0, True), (0.0, 0.2, True)])
def test_a_figure_measured_beside_others_is_marked(tmp_path, others, stolen, marked):
    outcome = outcome_of(machine_with(tmp_path, ZEN_5), {"this fp32": 20})
    outcome["results"]["this fp32"][f"{report.SMALL} c=8"] = [load(20, others=others, stolen=stolen)]
    row = report.throughput_row(outcome, "this fp32")
    assert row[1:3] == ["20.0" + report.MARK * marked, "20.0"]
    assert ("**1 of 3 measurements were disturbed" in report.markdown(outcome)) == marked


def test_a_disturbed_measurement_is_repeated_once_and_the_quieter_one_counts():
    from bench.__main__ import quieter
    results = [load(5, others=0.9), load(9, others=0.3), load(1)]
    measured, repeated = quieter(lambda: results.pop(0), lambda result: result)
    assert (measured["throughput"], repeated["throughput"], len(results)) == (9, 5, 1)
    results = [load(5, others=0.05), load(9)]
    measured, repeated = quieter(lambda: results.pop(0), lambda result: result)
    assert (measured["throughput"], repeated, len(results)) == (5, None, 1)
