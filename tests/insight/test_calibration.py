"""A temperature is fitted, judged on files that it was not fitted on, kept with the model and used by the service."""
import html
import io
import json
import math
import re
import shutil
import types

import numpy as np
import pytest
import requests
from conftest import encoded, photo
from PIL import Image, ImageFilter

from app import prepare
from app.engine.calibration import SHOWN
from app.errors import ServiceError
from app.insight import calibration, diagram, evaluation, report

CLASSES = {"coffee": "espresso", "camera": "tripod", "chelsea": "tiger cat", "rocket": "missile"}


def drawn(count=3000, classes=10, seed=0):
    """(logits whose softmax is the probability of the labels, labels)."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(count, classes)) * 2
    gumbel = random.gumbel(size=(count, classes))
    return logits.astype(np.float32), (logits + gumbel).argmax(axis=1)


@pytest.mark.parametrize("factor", [3, 0.5])
def test_a_known_temperature_is_found(factor):
    logits, labels = drawn()
    fit = calibration.fit(factor * logits, np.ones(len(labels), int), labels)
    assert fit.temperature == pytest.approx(factor, rel=0.05)
    assert fit.by_fold == pytest.approx([factor] * calibration.FOLDS, rel=0.08)
    assert fit.helps
    assert fit.after.ece < 0.03 < fit.before.ece
    assert np.array_equal(fit.before.right, fit.after.right)


def test_no_temperature_near_the_fitted_one_is_likelier():
    logits, labels = drawn(500)
    ones = np.ones(500, int)
    best = calibration.fit(2 * logits, ones, labels).temperature
    nll = [calibration.judged(2 * logits, ones, labels, t).nll for t in (best, 0.999 * best, 1.001 * best)]
    assert nll[0] == min(nll)


def test_each_file_is_judged_with_a_temperature_of_others():
    """Of a fifth that is unlike the others, none of its own files may flatter the figure."""
    logits, labels = drawn(1000)
    fit = calibration.fit(logits, np.ones(1000, int), labels)
    fold = np.random.default_rng(0).permutation(1000) % calibration.FOLDS
    ones, losses = np.ones(1000, int), []
    for i, temperature in enumerate(fit.by_fold):
        others = calibration.fit(logits[fold != i], ones[fold != i], labels[fold != i])
        assert temperature == pytest.approx(others.temperature, rel=1e-4)
        losses.append(calibration.judged(logits[fold == i], ones[fold == i], labels[fold == i], temperature).losses)
    assert fit.after.nll == pytest.approx(np.concatenate(losses).mean())


@pytest.mark.parametrize(("nll", "ece", "helps"), [
    (0.999, 0.04, True), (1.001, 0.04, False), (0.999, 0.06, False), (0.95, 0.06, True)])
def test_what_is_worth_storing(nll, ece, helps):
    """From an NLL of 1 and an ECE of 0.05: a lower NLL is, but not a slightly lower one with a higher ECE."""
    before, after = (types.SimpleNamespace(nll=nll, ece=ece) for nll, ece in ((1.0, 0.05), (nll, ece)))
    fit = calibration.Fit(1.1, [1.0, 1.2], before, after)
    assert (fit.helps, fit.ece_rises) == (helps, ece > 0.05)
    assert any(line.startswith("warning: the ECE rises") for line in evaluation.calibration_lines(fit)) == (
        helps and ece > 0.05)


def test_expected_calibration_error_by_hand():
    confidence = np.array([0.95, 0.97, 0.99, 0.50, 0.52, 0.10, 1 / 15, 1.0])
    right = np.array([True, True, False, False, True, True, False, True])
    bins = calibration.bins(confidence, right)
    assert [one.count for one in bins] == [1, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 4]
    by_hand = (abs(1 / 15 - 0) + abs(0.10 - 1) + 2 * abs(0.51 - 0.5) + 4 * abs((0.95 + 0.97 + 0.99 + 1) / 4 - 0.75)) / 8
    assert calibration.expected_error(bins) == pytest.approx(by_hand)


def test_probabilities_of_frames_are_averaged():
    logits = np.array([[2, 0, 0], [0, 3, 0], [1, 1, 1], [0, 0, 900]], np.float32)
    found = np.exp(calibration.log_probabilities(logits, np.array([2, 1, 1]), np.array([1, 2, 3])))
    softmax = [np.exp(row) / np.exp(row).sum() for row in (logits[0], logits[1], logits[2] / 2)]
    assert found[:2] == pytest.approx(np.array([(softmax[0] + softmax[1]) / 2, softmax[2]]))
    assert found[2] == pytest.approx([0, 0, 1])


@pytest.mark.parametrize(("labels", "message"), [
    (slice(0, 49), "too few labelled files to calibrate with: 49; at least 50"), ("right", "all 100 answers are right"),
    ("wrong", "all 100 answers are wrong"), ("surely wrong", "the best one lies beyond 20")])
def test_labels_that_no_temperature_fits_are_refused(labels, message):
    logits, drawn_labels = drawn(100)
    best = logits.argmax(axis=1)
    if labels == "surely wrong":
        logits *= 50
        truth = np.where(np.arange(100) < 2, best, logits.argmin(axis=1))
    else:
        truth = {"right": best, "wrong": (best + 1) % 10}.get(labels, drawn_labels) if isinstance(labels, str) else \
            drawn_labels[labels]
    with pytest.raises(calibration.CalibrationError, match=message):
        calibration.fit(logits[:len(truth)], np.ones(len(truth), int), truth)


def test_large_sets_are_worked_on_in_parts(monkeypatch):
    logits, labels = drawn(200)
    counts = np.tile([1, 3], 50)
    whole = calibration.judged(logits, counts, labels[:100], 1.5)
    monkeypatch.setattr(calibration, "AT_ONCE", 100)
    for one, other in zip(whole, calibration.judged(logits, counts, labels[:100], 1.5), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("palette", [diagram.LIGHT, diagram.DARK])
def test_the_diagram_has_bars_as_high_as_the_share_that_is_right(palette):
    """Heights in the middle of a bar, where the gap is, and at its edge."""
    bins = [calibration.Bin(0, math.nan, math.nan)] * 13
    bins += [calibration.Bin(40, 0.9, 0.5), calibration.Bin(40, 0.2, 0.8)]
    png = diagram.reliability_png([("before", bins, 0.48, 1.2)], "name", palette)

    def colours(number, across):
        x = diagram.LEFT + (number + across) * diagram.SIDE / 15
        with Image.open(io.BytesIO(png)) as image:
            return ["#" + bytes(image.getpixel((int(x), int(diagram.TOP + (1 - height) * diagram.SIDE)))).hex()
                    for height in (0.7, 0.45, 0.1)]
    assert colours(13, 0.5) == [palette.high, palette.right, palette.right]
    assert colours(13, 0.2)[1:] == [palette.right, palette.right]
    assert colours(13, 0.2)[0] != palette.high
    assert colours(14, 0.5) == [palette.low, palette.low, palette.right]
    assert colours(14, 0.2)[1:] == [palette.right, palette.right]


# --- with a real model ---

@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """(folder, CSV) of 56 variants of four photographs: cut, turned, blurred and noisy, so that some are taken for
    something else."""
    folder, random = tmp_path_factory.mktemp("variants"), np.random.default_rng(3)
    rows = ["file,label"]
    for name, label in CLASSES.items():
        image = photo(name).convert("RGB")
        image.thumbnail((300, 300))
        for i in range(14):
            side = int(min(image.size) * random.uniform(0.5, 1))
            left, top = (int(random.uniform(0, edge - side + 1)) for edge in image.size)
            made = image.crop((left, top, left + side, top + side)).rotate(random.uniform(-10, 10))
            made = made.filter(ImageFilter.GaussianBlur(random.uniform(0, 1)))
            noisy = np.asarray(made, float) + random.normal(0, random.uniform(0, 90), (side, side, 3))
            file = f"{name}-{i} <b>&.png"
            (folder / file).write_bytes(encoded(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))))
            rows.append(f"{file},{label}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder, folder / "labels.csv"


@pytest.fixture
def own_models(tmp_path, app, settings):
    """A MODEL_DIR of this test, with the bundle of EfficientNet-Lite0."""
    folder = tmp_path / "models"
    (found,) = (settings.model_dir / "bundles").glob("efficientnet_lite0-*-openvino")
    shutil.copytree(found, folder / "bundles" / found.name)
    return folder


@pytest.fixture
def run(command):
    return lambda *arguments, **variables: command(arguments, {"MODEL_NAME": "efficientnet_lite0", **variables})


def confidence(service, picture):
    return service.predict(picture).json()["predictions"][0]["confidence"]


def test_calibrate_reload_and_back(run, labelled, own_models, start_service):
    folder, labels = labelled
    service = start_service(MODEL_DIR=str(own_models), WORKERS="1").wait_ready()
    coffee = encoded(photo("coffee"))
    before = confidence(service, coffee)
    html_path = own_models.parent / "report.html"
    code, out, err = run("evaluate", "--labels", labels, folder, "--calibrate", "--report", html_path,
                         MODEL_DIR=own_models)
    assert (code, err) == (0, "")
    (stored,) = own_models.glob("bundles/*/calibration.json")
    content = json.loads(stored.read_text())
    assert f"stored: {stored}" in out
    assert "python -m app reload" in out
    assert content["pictures"] == 56
    assert 0.6 < content["temperature"] < 0.8  # so much noise makes this network less sure than it could be
    assert content["nll_after"] < content["nll_before"]
    with Image.open(stored.with_name("calibration.png")) as image:
        assert image.format == "PNG"

    code, out, _ = run("reload", "--pid", service.process.pid)
    assert (code, out[:8]) == (0, "reloaded")
    assert requests.get(service.url + "/info", timeout=10).json()["model"]["calibration"] == {
        name: content[name] for name in SHOWN}
    after = confidence(service, coffee)
    assert after > before + 0.001

    stored.unlink()
    assert run("reload", "--pid", service.process.pid)[0] == 0
    assert confidence(service, coffee) == pytest.approx(before, abs=1e-6)

    check_report(html_path.read_text(), folder, content)


def test_a_second_calibration_says_what_it_replaces(run, labelled, own_models, tmp_path):
    folder, labels = labelled
    (bundle,) = own_models.glob("bundles/*")
    weights = json.loads((bundle / "manifest.json").read_text())["weights"]["sha256"]
    (bundle / "calibration.json").write_text(json.dumps({
        "temperature": 3.25, "created": "2026-01-02T03:04:05Z", "weights_sha256": weights}))
    code, out, _ = run("evaluate", "--labels", labels, folder, "--calibrate", "--report", tmp_path / "r.html",
                       MODEL_DIR=own_models)
    assert code == 0
    assert "\nreplaces the temperature 3.2500 of 2026-01-02T03:04:05Z\n" in out
    content = json.loads((bundle / "calibration.json").read_text())
    check_tiles((tmp_path / "r.html").read_text(), content)
    assert "3.25, before this calibration" in (tmp_path / "r.html").read_text()


def test_a_temperature_of_another_precision_is_said(run, own_models, monkeypatch):
    (bundle,) = own_models.glob("bundles/*")
    weights = json.loads((bundle / "manifest.json").read_text())["weights"]["sha256"]
    content = {"temperature": 1.5, "precision": "fp32", "weights_sha256": weights}
    other = bundle.with_name(bundle.name + "-int8-123456")
    shutil.copytree(bundle, other)
    (other / "manifest.json").write_text((bundle / "manifest.json").read_text().replace(
        '"quantization": null', '"quantization": {"asked": "int8"}'))
    (other / "calibration.json").write_text(json.dumps(content))

    def said(**variables):
        texts.clear()
        assert run("prepare", MODEL_DIR=own_models, **variables)[0] == 0
        return " ".join(texts)
    texts = []
    monkeypatch.setattr(prepare.log, "warning", lambda text, *about: texts.append(text % about))
    assert f"{bundle.name}: it has no temperature: {other / 'calibration.json'} was fitted with another" in said()
    (bundle / "calibration.json").write_text(json.dumps(content))
    assert said() == ""
    assert "its temperature was fitted with PRECISION=fp32, not bf16" in said(PRECISION="bf16")


def test_a_failed_file_is_forgotten():
    """The traceback of its error keeps what was read of it."""
    observer = object.__new__(evaluation.Observer)
    observer.answered, observer.failures = [], []
    try:
        data = bytearray(10)
        raise ServiceError(400, "INVALID_IMAGE", f"{len(data)} bytes")
    except ServiceError as e:
        observer.add("a.jpg", e, 0)
    ((path, kept),) = observer.failures
    assert (path, kept.code, kept.message, kept.__traceback__, kept.__context__) == (
        "a.jpg", "INVALID_IMAGE", "10 bytes", None, None)


def test_a_report_of_a_calibration_that_does_not_help(run, labelled, own_models, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "NEGLIGIBLE", 1)
    monkeypatch.setattr(calibration.Fit, "ece_rises", True)
    folder, labels = labelled
    code, out, err = run("evaluate", "--labels", labels, folder, "--calibrate", "--report", tmp_path / "r.html",
                         "--json", MODEL_DIR=own_models)
    assert (code, list(own_models.glob("bundles/*/calibration.json"))) == (1, [])
    assert err.startswith("error: nothing is stored: T = 0.")
    assert "does not help on files that it was not fitted on (NLL " in err
    content = json.loads(out)["calibration"]
    assert tiles((tmp_path / "r.html").read_text()) == [
        (f"{100 * content['ece_before']:.1f} %", f"{100 * content['ece_after']:.1f} % calibrated, not stored"),
        (f"{content['nll_before']:.3f}", f"{content['nll_after']:.3f} calibrated, not stored")]


def tiles(text):
    return re.findall(r'class="tile"><b>(.*?)</b>.*?<span>(.*?)</span>', text, re.S)[2:]


def check_tiles(text, content):
    """The tiles have the figures of calibration.json, not those of the temperature that was served."""
    assert tiles(text) == [
        (f"{100 * content['ece_after']:.1f} %", f"calibrated; {100 * content['ece_before']:.1f} % before"),
        (f"{content['nll_after']:.3f}", f"calibrated; {content['nll_before']:.3f} before")]


def check_report(text, folder, content):
    check_tiles(text, content)
    captions = re.findall(r'<span class="true">(.*?)</span>', text.partition("<h2>Worst")[2].partition("<h2>")[0])
    assert captions
    assert max(map(captions.count, captions)) <= report.MOST_OF_CLASS
    assert not re.search(r"\d%[^;\"]", text.partition("</style>")[2])  # a space before each % sign
    assert "True" not in text.partition("What was measured")[2]
    assert text.count("data:image/png") == 2  # the diagram, and one for a dark page
    assert len(re.findall("<figure>", text)) <= 3 * report.MOST_PICTURES
    assert "src=\"data:image/jpeg;base64," in text
    assert "http" not in re.sub(r"data:[^\"]*|http-equiv", "", text)  # nothing is loaded
    assert "<b>&.png" not in text
    assert html.escape(str(folder / "rocket-")) in text
    for words in ("Top-1 accuracy", "Most common confusions", "Worst mistakes", "Most confident mistakes",
                  "Least confident correct answers", "T = ", "efficientnet_lite0", "SHA-256"):
        assert words in text


@pytest.mark.parametrize(("arguments", "variables", "message"), [
    (["--calibrate"], {}, "too few labelled files to calibrate with: 4;"),
    (["--report", "/nowhere/report.html"], {}, "/nowhere/report.html cannot be written: No such file or directory")])
def test_what_cannot_be_done_is_refused_in_one_line(run, labelled, tmp_path, settings, arguments, variables, message):
    folder, labels = labelled
    (tmp_path / "few.csv").write_text("\n".join(labels.read_text().splitlines()[:5]))
    code, out, err = run("evaluate", "--labels", tmp_path / "few.csv", folder, *arguments,
                         MODEL_DIR=settings.model_dir, **variables)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_ocean_has_a_report_but_no_calibration(run, labelled, tmp_path, ocean_settings):
    folder, _ = labelled
    (tmp_path / "labels.csv").write_text(
        "file,neuroticism,openness,agreeableness,extraversion,conscientiousness\n" + "".join(
            f"{path.name},0.5,0.{i},0.4,0.{i},0.2\n" for i, path in enumerate(sorted(folder.glob("c*-1*.png"))[:4]))
        + "gone <i>.png,0,0,0,0,0\n")
    variables = {"MODEL_NAME": "ocean", "MODEL_PATH": ocean_settings.model_path, "MODEL_DIR": ocean_settings.model_dir}
    code, _, err = run("evaluate", "--labels", tmp_path / "labels.csv", folder, "--calibrate", **variables)
    assert (code, err) == (1, "error: --calibrate is for classifiers: ocean has no probabilities\n")
    code, out, _ = run("evaluate", "--labels", tmp_path / "labels.csv", folder, "--report", tmp_path / "r.html",
                       "--json", **variables)
    text, result = (tmp_path / "r.html").read_text(), json.loads(out)
    assert (code, result["failed"]) == (1, 1)
    assert text.count("<svg") == 5
    assert text.count("<circle") == 20
    assert text.count("<figure>") == 4
    assert f"{result['one_minus_mae']['mean']:.4f}" in text
    assert "gone &lt;i&gt;.png" in text
    assert "1 × MISSING_FILE." in text
    assert "tta=true" in text
    assert "95 %" not in text.replace("too few files for an interval", "")
    assert text.count("too few files for an interval") == 1
    points = [float(number) for pair in re.findall(r'<circle cx="(.*?)" cy="(.*?)"', text) for number in pair]
    assert 3 < min(points) <= max(points) < report.PLOT - 3


def test_wilson_interval():
    assert report.wilson(0.8, 100) == pytest.approx((0.7112, 0.8666), abs=1e-4)  # Wilson 1927, as in any table
    assert report.wilson(1.0, 10)[1] == 1.0
