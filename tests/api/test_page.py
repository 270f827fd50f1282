"""The page at /, in a real headless Chromium: files, text, JSON, options, answers of all kinds, the sample, the camera,
the keyboard, its security policy."""
import contextlib
import io
import itertools
import json
import os
import shlex
import subprocess
import wave

import numpy as np
import pytest
import requests
from conftest import ROOT, Service, encoded, exported, need, photo
from own_tasks import HTML, RATE
from pages import (
    CAT,
    DESKTOP,
    PHONE,
    fill,
    find,
    find_all,
    network,
    on_page,
    resize,
    run,
    run_curl,
    run_javascript,
    run_python,
    screenshot,
    scrolls_sideways,
    send_file,
    text_of,
    wait,
    whole_answer,
)
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from videos import pan_over, write

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # selenium's own sockets


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_picture_is_answered(browser, size):
    resize(browser, size)
    send_file(browser, CAT)
    card = find(browser, ".card")
    assert find(card, "h2").text == "tiger cat"
    rows = [row.text.split("\n") for row in find_all(card, ".bars li")]
    assert len(rows) == 5
    assert rows[0][0] == "tiger cat"
    value = float(rows[0][1].removesuffix(" %"))
    assert 35 < value < 42
    bar = find(card, ".bars svg rect").rect["width"] / find(card, ".bars li").rect["width"]
    assert bar == pytest.approx(value / 100, abs=0.02)
    assert find(card, "figcaption").text == "chelsea.jpg · 451 × 300"
    assert "inference" in find(card, ".timings").text
    wait(browser, lambda: browser.execute_script("return document.querySelector('.card img').naturalWidth") == 451)
    if size == PHONE:
        wait(browser, lambda: browser.execute_script(
            "return document.querySelector('.card').getBoundingClientRect().top") < 20)
    assert not scrolls_sideways(browser)
    browser.execute_script("document.querySelector('.card details').open = true")
    assert not scrolls_sideways(browser)
    screenshot(browser, "desktop" if size == DESKTOP else "phone")


def test_the_curl_line_does_the_same(browser, service, tmp_path):
    path = tmp_path / "it's a cat.jpg"
    path.write_bytes(CAT.read_bytes())
    number = find(browser, "[name=top_k]")
    number.clear()
    number.send_keys("2")
    send_file(browser, path)
    line = find(browser, ".card code").get_attribute("textContent")
    assert shlex.split(line) == ["curl", "-F", "file=@it's a cat.jpg", "-F", "top_k=2", service.url + "/predict"]
    answer = json.loads(subprocess.run([need("curl"), "-s", *shlex.split(line)[1:]], cwd=tmp_path, check=True,
                                       capture_output=True).stdout)
    shown = json.loads(find(browser, ".card .json").get_attribute("textContent"))
    assert answer["predictions"] == shown["predictions"]


NASTY_NAMES = [
    "a,b.jpg", "a;b.jpg", "cat.jpg;type=text", 'say "cheese".jpg', '"cat.jpg"', "it's.jpg", "back\\slash.jpg",
    "end\\.jpg", 'both\\".jpg', "$HOME.jpg", "$(touch hacked).jpg", "`touch hacked`.jpg", "two\nlines.jpg",
    "cat.jpg\ntouch hacked", "tab\tand\rreturn\x1b[31m.jpg", "it's\x9b1 \u202egpj.jpg", "@cat.jpg", "-", "-cat.jpg",
    "--help", " spaces ", "<cat.jpg", "*?[a-z]{1,2}.jpg", "~", "!cat!1.jpg", "&cat|;#.jpg", "100%41.jpg",
    "K\u00e4tzchen \U0001f408.jpg", "a=b.jpg"]


def test_the_snippets_are_right_for_any_file_name(browser, tmp_path):
    browser.execute_async_script("""
        const [names, done] = arguments;
        fetch("static/cat.jpg").then(response => response.blob()).then(blob => {
          const event = new DragEvent("drop", {bubbles: true, dataTransfer: new DataTransfer()});
          for (const name of names) event.dataTransfer.items.add(new File([blob], name, {type: "image/jpeg"}));
          document.dispatchEvent(event);
          done();
        });""", NASTY_NAMES)
    wait(browser, lambda: len(find_all(browser, ".card:not(.waiting)")) == len(NASTY_NAMES))
    folders, sources = [], browser.execute_script("""
        return [...document.querySelectorAll(".card")].map(
          card => [...card.querySelectorAll("code")].map(code => code.textContent))""")
    for number, name in enumerate(NASTY_NAMES):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        (folders[-1] / name).write_bytes((ROOT / "app/api/static/cat.jpg").read_bytes())
    # All in one process of bash, one of Python, and one of Node.
    bash = "\n".join(f"cd {shlex.quote(str(folder))} && {source.replace('curl ', 'curl -sS ', 1)}"
                     for folder, (source, _, _) in zip(folders, sources, strict=True))
    assert all(source.isprintable() for source, _, _ in sources)
    answers = run([need("bash"), "-c", bash], tmp_path)
    assert answers.count(b'"class":"tiger cat"') == len(NASTY_NAMES), answers
    python = "import os\n" + "\n".join(
        f"os.chdir({str(folder)!r})\nexec({source!r})" for folder, (_, source, _) in zip(folders, sources, strict=True))
    javascript = "\n".join(f"process.chdir({json.dumps(str(folder))});\n{{\n{body_of(source)}\n}}"
                           for folder, (_, _, source) in zip(folders, sources, strict=True))
    for output in (run_python(python, tmp_path), run_javascript(IMPORT + javascript, tmp_path)):
        assert output.count(b'"status": "success"') == len(NASTY_NAMES)
        assert output.count(b'"class": "tiger cat"') == len(NASTY_NAMES)
    assert [os.listdir(folder) for folder in folders] == [[name] for name in NASTY_NAMES]


IMPORT = 'import {openAsBlob} from "node:fs";\n'


def body_of(javascript):
    """What comes after the imports, which may stand at the beginning of a module only."""
    assert IMPORT in javascript
    return javascript.partition(IMPORT)[2]


def test_several_files_of_which_one_is_none(browser, tmp_path):
    text, coffee = tmp_path / "text.jpg", tmp_path / "coffee.png"
    text.write_text("no picture")
    coffee.write_bytes(encoded(photo("coffee")))
    send_file(browser, CAT, text, coffee)
    assert [find(card, "h2").text for card in find_all(browser, ".card")] == ["tiger cat", "No answer", "espresso"]
    assert "not a picture that can be read" in find(browser, ".failed:not([hidden]) .error").text


def test_keyboard_alone_and_what_a_screen_reader_hears(browser):
    def press(key):
        webdriver.ActionChains(browser).send_keys(key).perform()
    press(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("class") == "skip"
    order = []
    for _ in range(7):
        press(Keys.TAB)
        order.append(browser.switch_to.active_element.get_attribute("id"))
    assert order == ["", "show-model", "show-health", "choose", "camera", "sample", ""]
    find(browser, "#sample").send_keys(Keys.ENTER)
    wait(browser, lambda: "tiger cat" in find(browser, "#status").get_attribute("textContent"))
    assert find(browser, "#status").get_attribute("aria-live") == "polite"
    assert find(browser, "#problem").get_attribute("role") == "alert"
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]}
    controls = ("button", "link", "image", "spinbutton", "checkbox")
    nameless = {role for role, name in named if role in controls and not name}
    assert nameless == set()
    assert ("image", "The picture you sent: cat.jpg") in named
    assert ("spinbutton", "Classes") in named


def test_camera(browser):
    find(browser, "#camera").click()
    wait(browser, lambda: browser.execute_script("return document.querySelector('#live').videoWidth > 0"))
    find(browser, "#shoot").click()
    wait(browser, lambda: find_all(browser, ".card:not(.waiting)"))
    assert find(browser, ".card figcaption").text.startswith("camera.jpg")
    assert len(find_all(browser, ".bars li")) == 5
    assert not find(browser, "#viewfinder").is_displayed()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.webm"
    path.write_bytes(write(pan_over(np.asarray(photo("chelsea")), 20), format="webm", codec="libvpx"))
    return path


def test_a_video_is_answered(browser, clip):
    number = find(browser, "[name=frames]")
    number.clear()
    number.send_keys("3")
    send_file(browser, clip)
    assert find(browser, ".card h2").text in ("tiger cat", "Egyptian cat", "tabby")
    assert find(browser, ".card figcaption").text == "clip.webm · 320 × 240"
    assert "-F frames=3" in find(browser, ".card code").get_attribute("textContent")
    shown = json.loads(find(browser, ".card .json").get_attribute("textContent"))
    frames = shown["metadata"]["frames"]
    assert [frame["index"] for frame in frames] == [3, 10, 16]
    assert find(browser, ".frames p").text == "The answer is the mean over 3 frames, at"
    buttons = find_all(browser, ".frames button")
    assert [button.text for button in buttons] == [f"{frame['time_s']:.1f} s" for frame in frames]
    buttons[1].click()
    wait(browser, lambda: browser.execute_script(
        "return document.querySelector('.card video').currentTime") == pytest.approx(frames[1]["time_s"], abs=0.01))
    assert [button.get_attribute("aria-pressed") for button in buttons] == ["false", "true", "false"]
    wait(browser, lambda: browser.execute_script("return document.querySelector('.card video').videoWidth") == 320)


def watch(browser, selector):
    """Note each text that this element has from now on, in window.texts."""
    browser.execute_script("""
        window.texts = [];
        new MutationObserver(() => { window.texts.push(document.querySelector(arguments[0])?.textContent); })
          .observe(document.body, {subtree: true, childList: true, characterData: true});""", selector)


def test_frames_of_a_video_are_shown_as_they_come(browser, clip):
    fill(browser, "[name=frames]", "3")
    watch(browser, ".card h2")
    send_file(browser, clip)
    texts = browser.execute_script("return [...new Set(window.texts.filter(text => text?.startsWith('Frame')))]")
    assert texts == ["Frame 1 of 3…", "Frame 2 of 3…", "Frame 3 of 3…"]


def test_how_sure_in_words(browser):
    send_file(browser, CAT)
    uncertainty = whole_answer(find(browser, ".card"))["metadata"]["uncertainty"]
    assert uncertainty["margin"] < 0.15
    words = find(browser, ".card .sure").text
    ahead = f"{round(100 * uncertainty['margin'])} percentage points ahead"
    assert words.startswith(f"How sure: unsure. The first class is {ahead}")
    assert words.endswith(f"about {round(np.exp(uncertainty['entropy']))} classes.")


WORDS = [
    ([0.97, 0.02, 0.01], "very sure. The first class is 95 percentage points ahead of the second."),
    ([0.85] + 100 * [0.0015], "fairly sure. The first class is 85 percentage points ahead of the second."),
    ([0.6] + 2 * [0.2], "not very sure. The first class is 40 percentage points ahead of the second; the model wavers "
                        "between about 3 classes."),
    ([0.3] + 70 * [0.01], "not very sure. The first class is 29 percentage points ahead of the second; its probability "
                          "is spread over many classes."),
    ([0.5, 0.49, 0.01], "unsure. The first class is 1 percentage point ahead of the second; the model wavers between "
                        "about 2 classes.")]


def test_words_of_certainty_agree(browser):
    for probabilities, words in WORDS:
        first, second, *_ = sorted(probabilities, reverse=True)
        entropy = -np.sum(np.array(probabilities) * np.log(probabilities))
        uncertainty = {"margin": first - second, "entropy": float(entropy)}
        shown = browser.execute_async_script("""
            const [uncertainty, done] = arguments;
            import(new URL("static/card.js", location.href)).then(({showCertainty}) => {
              const card = document.querySelector("#card").content.firstElementChild.cloneNode(true);
              showCertainty(card, uncertainty);
              done(card.querySelector(".sure").textContent);
            });""", uncertainty)
        assert shown == f"How sure: {words}"


def test_frames_of_a_video_are_shown_again(browser, clip):
    find(browser, "[name=explain]").click()
    fill(browser, "[name=frames]", "1")
    send_file(browser, clip)
    button = find(browser, ".frames button")
    assert find(browser, ".frames").get_attribute("role") == "group"
    wait(browser, lambda: button.get_attribute("aria-pressed") == "true" and find_all(browser, ".picture .overlay"))
    wait(browser, lambda: browser.execute_script("return document.querySelector('.card video').readyState") >= 2)
    browser.execute_script("document.querySelector('.card video').currentTime = 0")
    wait(browser, lambda: button.get_attribute("aria-pressed") == "false")
    assert not find_all(browser, ".picture .overlay")
    button.click()
    wait(browser, lambda: button.get_attribute("aria-pressed") == "true" and find_all(browser, ".picture .overlay"))
    screenshot(browser, "looked-video")


def overlay_of(browser, words):
    """Once there is one with this text: (how far its edges are from the picture's, its source, its opacity)."""
    found = []

    def look():
        found[:] = browser.execute_script("""
            const shown = document.querySelector(".card .overlay");
            if (!shown?.naturalWidth || shown.alt !== arguments[0]) return [];
            const [here, there] = [shown, document.querySelector(".card .picture img")].map(
              one => one.getBoundingClientRect());
            return [["left", "top", "right", "bottom"].map(edge => here[edge] - there[edge]), shown.src,
                    getComputedStyle(shown).opacity]""", words)
        return found
    wait(browser, look)
    return found


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_where_the_model_looked(browser, size):
    resize(browser, size)
    assert [field.get_attribute("name") for field in find_all(browser, "#options [name]")] == [
        "top_k", "frames", "explain"]
    find(browser, "[name=explain]").click()
    send_file(browser, CAT)
    edges, before, opacity = overlay_of(browser, "Where the model looked for tiger cat")
    assert (edges, opacity) == ([0, 0, 0, 0], "0.75")
    assert browser.execute_script("const {naturalWidth: w, naturalHeight: h} = document.querySelector('.overlay');"
                                  "return w / h") == pytest.approx(451 / 300, abs=0.01)
    slider = find(browser, ".looked input")
    assert slider.accessible_name == "Overlay strength"
    assert "The square is what the model saw." in find(browser, ".looked").text
    assert "explain_class" not in find(browser, ".card code").get_attribute("textContent")
    slider.send_keys(*[Keys.ARROW_LEFT] * 5)
    assert overlay_of(browser, "Where the model looked for tiger cat")[2] == "0.7"
    find_all(browser, ".pick")[2].click()
    _, after, opacity = overlay_of(browser, "Where the model looked for tabby")
    assert after != before
    assert opacity == "0.7"
    assert [button.get_attribute("aria-pressed") for button in find_all(browser, ".pick")] == [
        "false", "false", "true", "false", "false"]
    assert find(browser, ".looked .of").text == "Where it looked for tabby"
    assert find(browser, "#status").get_attribute("textContent") == "Where it looked for tabby"
    line = shlex.split(find(browser, ".card code").get_attribute("textContent"))
    answer = subprocess.run([*line, "-s"], cwd=CAT.parent, check=True, capture_output=True).stdout
    explanation, = json.loads(answer)["metadata"]["explanations"]
    assert explanation["class"] == "tabby"
    find(browser, "#meanings summary").click()
    meanings = {term.text: meaning.text for term, meaning in zip(
        find_all(browser, "#meanings dt"), find_all(browser, "#meanings dd"), strict=True)}
    assert "the brighter" in meanings["Show where it looked"]
    assert not scrolls_sideways(browser)
    screenshot(browser, f"looked-{size[0]}")


def go_live(browser):
    find(browser, "#camera").click()
    wait(browser, lambda: browser.execute_script("return document.querySelector('#live').videoWidth > 0"))
    find(browser, "#go-live").click()


def test_live(browser):
    go_live(browser)
    browser.execute_script("window.tracks = document.querySelector('#live').srcObject.getTracks()")
    watch(browser, "#live-answer h2")
    wait(browser, lambda: "pictures per second" in find(browser, "#live-note").text)
    assert len(find_all(browser, "#live-answer .bars li")) == 5
    assert find(browser, "#live-answer .sure").text.startswith("How sure: ")
    assert find(browser, "#go-live").text == "Stop"
    wait(browser, lambda: browser.execute_script("return window.texts.length") > 20)
    screenshot(browser, "live")
    find(browser, "#go-live").click()
    assert not find(browser, "#live-answer").is_displayed()
    times = browser.execute_script("""
        return performance.getEntriesByType("resource").filter(({name}) => name.endsWith("/predict?stream=true"))
          .map(({startTime, responseEnd}) => [startTime, responseEnd])""")
    assert len(times) >= 2
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))  # one at a time
    find(browser, "#close-camera").click()
    assert browser.execute_script("return window.tracks.map(track => track.readyState)") == ["ended"]
    assert not find(browser, "#viewfinder").is_displayed()
    browser.refresh()


def test_the_camera_ends_with_what_it_needs(browser):
    """Hidden, unplugged, refused, or not there: browsers have no switches for these, so their answers are replaced."""
    def closed(words):
        wait(browser, lambda: find(browser, "#problem").text == words)
        assert not find(browser, "#viewfinder").is_displayed()
        assert browser.execute_script("return (window.tracks || []).every(track => track.readyState === 'ended')")

    def sent():
        return browser.execute_script("""return performance.getEntriesByType("resource").filter(
            ({name}) => name.endsWith("/predict?stream=true")).length""")
    go_live(browser)
    wait(browser, lambda: "pictures per second" in find(browser, "#live-note").text)
    browser.execute_script("""
        window.tracks = document.querySelector("#live").srcObject.getTracks();
        Object.defineProperty(document, "hidden", {value: true, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));""")
    closed("The camera was closed as the page was hidden.")
    before = sent()
    browser.execute_script("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    go_live(browser)
    wait(browser, lambda: sent() > before)
    browser.execute_script("""
        window.tracks = document.querySelector("#live").srcObject.getTracks();
        for (const track of window.tracks) { track.stop(); track.dispatchEvent(new Event("ended")); }""")
    closed("The camera is gone.")
    refused = "The camera cannot be used without your permission. Give it in the browser's settings of this page."
    for name, words in (("NotAllowedError", refused), ("NotFoundError", "There is no camera.")):
        browser.execute_script("""navigator.mediaDevices.getUserMedia = async () => {
            throw new DOMException("", arguments[0]); };""".replace("arguments[0]", repr(name)))
        find(browser, "#camera").click()
        closed(words)
    browser.execute_script("""navigator.mediaDevices.enumerateDevices = async () => [];
        navigator.mediaDevices.dispatchEvent(new Event("devicechange"));""")
    wait(browser, lambda: not find(browser, "#camera").is_displayed())
    assert find(browser, "#sample").is_displayed()
    browser.refresh()


def test_nothing_moves_for_those_who_want_less_motion(browser):
    def animation():
        return browser.execute_script("""
            const waiting = document.querySelector("#card").content.firstElementChild.cloneNode(true);
            document.querySelector("#results").append(waiting);
            const name = getComputedStyle(waiting.querySelector(".picture"), "::after").animationName;
            waiting.remove();
            return name;""")
    assert animation() == "wait"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
        {"name": "prefers-reduced-motion", "value": "reduce"}]})
    try:
        assert animation() == "none"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_live_says_of_which_class_the_overlay_is(browser):
    find(browser, "[name=explain]").click()
    go_live(browser)
    wait(browser, lambda: find_all(browser, "#stage .overlay"))

    def pressed():
        return browser.execute_script("""
            const pressed = [...document.querySelectorAll("#live-answer .pick[aria-pressed=true]")];
            return [pressed.map(one => one.textContent), document.querySelector("#live-answer .of b").textContent,
                    document.querySelector("#stage .overlay")?.alt]""")
    first = find(browser, "#live-answer h2").text
    wait(browser, lambda: pressed() == [[first], first, f"Where the model looked for {first}"])
    find(browser, "#live-answer .looked input").send_keys(*[Keys.ARROW_LEFT] * 5)
    button = find_all(browser, "#live-answer .pick")[2]
    third = button.text
    button.send_keys(Keys.ENTER)
    wait(browser, lambda: pressed() == [[third], third, f"Where the model looked for {third}"])
    assert browser.execute_script("return document.activeElement.textContent") == third
    assert find(browser, "#status").get_attribute("textContent") == f"Where it looks for {third}"
    assert browser.execute_script("return document.querySelector('#stage .overlay')?.style.opacity ?? '0.7'") == "0.7"
    screenshot(browser, "live-looked")
    find(browser, "#live-answer .looked button").click()
    wait(browser, lambda: pressed()[0] == [first])
    find(browser, "#close-camera").click()


def test_live_survives_a_service_that_is_away(chromium, browser):
    go_live(browser)
    wait(browser, lambda: "pictures per second" in find(browser, "#live-note").text)
    with network(browser, offline=True):
        wait(browser, lambda: "cannot be reached. Trying again in 2 s" in find(browser, "#live-note").text)
    wait(browser, lambda: "pictures per second" in find(browser, "#live-note").text)
    chromium.get_log("browser")
    find(browser, "#close-camera").click()


@pytest.fixture(scope="module")
def ocean_service(tmp_path_factory, ocean_settings):
    exported(ocean_settings)
    running = Service(tmp_path_factory.mktemp("ocean-service"), {
        "MODEL_NAME": "ocean", "MODEL_PATH": str(ocean_settings.model_path), "DEVICE": "cpu",
        "MODEL_DIR": str(ocean_settings.model_dir)})
    yield running.wait_ready()
    running.kill()


@pytest.fixture
def ocean_browser(chromium, ocean_service):
    """A browser on the page of a service with the OCEAN model."""
    with on_page(chromium, ocean_service, "ocean") as browser:
        yield browser


def test_scores_and_face_box_of_the_ocean_model(ocean_browser, ocean_service, tmp_path):
    browser, path = ocean_browser, tmp_path / "portrait.png"
    path.write_bytes(encoded(photo("astronaut").crop((0, 0, 512, 400))))
    answer = ocean_service.predict(path.read_bytes()).json()
    predictions, metadata = answer["predictions"], answer["metadata"]
    wait(browser, lambda: [field.get_attribute("name") for field in find_all(browser, "#options [name]")] == [
        "method", "tta", "frames", "explain"])
    send_file(browser, path)
    assert find(browser, ".card h2").text == "Scores"
    assert len(predictions) == 5
    assert [li.text for li in find_all(browser, ".bars li")] == [
        f"{trait}\n{score:.2f} ± {metadata['spread'][trait]:.2f}".replace("-", "−")
        for trait, score in predictions.items()]
    assert find(browser, "#model").text.startswith("Big Five traits · ")
    about = find(browser, "#about.notice").text
    assert "not what the person is like. Do not use them for decisions about people." in about
    assert about in (ROOT / "docs/ocean.md").read_text(encoding="utf-8").replace("\n> ", " ")
    assert find(browser, "figcaption").text == "portrait.png · 512 × 400 · face found"
    x, y, width, height = metadata["frames"][0]["face_box"]
    box, img = find(browser, ".picture rect.box").rect, find(browser, ".picture img").rect
    scale = img["width"] / 512
    assert box["x"] - img["x"] == pytest.approx(x * scale, abs=2)
    assert box["y"] - img["y"] == pytest.approx(y * scale, abs=2)
    assert box["width"] == pytest.approx(width * scale, abs=4)
    assert box["height"] == pytest.approx(height * scale, abs=4)
    screenshot(browser, "traits")


def test_a_trait_is_chosen_and_the_face_stays(ocean_browser, tmp_path):
    browser, path = ocean_browser, tmp_path / "portrait.png"
    path.write_bytes(encoded(photo("astronaut").crop((0, 0, 512, 400))))
    wait(browser, lambda: find_all(browser, "[name=explain]"))
    find(browser, "[name=explain]").click()
    send_file(browser, path)
    traits = list(whole_answer(find(browser, ".card"))["predictions"])
    edges, before, _ = overlay_of(browser, f"Where the model looked for {traits[0]}")
    assert edges == [0, 0, 0, 0]
    find_all(browser, ".pick")[3].send_keys(Keys.ENTER)
    assert overlay_of(browser, f"Where the model looked for {traits[3]}")[1] != before
    assert find(browser, ".picture rect.box").rect["width"] > 0
    assert "each map is scaled to its own maximum" in find(browser, ".looked").text
    line = find(browser, ".card code").get_attribute("textContent")
    assert f"explain_class={traits[3]}" in line.replace("'", "")
    screenshot(browser, "looked-traits")


def test_it_says_where_almost_nothing_adds_to_a_score(ocean_browser):
    words = ocean_browser.execute_async_script("""
        const done = arguments[0];
        import(new URL("static/looked.js", location.href)).then(({controls}) => {
          const of = (trait, peak) => ({trait, map: [[0, peak], [0, 0]]});
          const all = [of("strong", 10), of("weak", 0.6), of("faint", 0.4), of("none", 0)];
          const {words, show} = controls(true);
          done(all.map(one => { show(one.trait, one, all); return words.textContent; }));
        });""")
    assert words == ["Where it looked for strong", "Where it looked for weak",
                     "Where it looked for faint: almost nothing adds to this score.",
                     "Where it looked for none: almost nothing adds to this score."]


def test_scores_below_0_and_above_1(ocean_browser):
    shown = ocean_browser.execute_async_script("""
        const done = arguments[0];
        import(new URL("static/card.js", location.href)).then(({showPredictions}) => {
          const card = document.querySelector("#card").content.firstElementChild.cloneNode(true);
          const words = showPredictions(card, {low: -0.5, high: 1.5});
          const bars = [...card.querySelectorAll(".bars rect:not(.zero)")].map(
            bar => [bar.getAttribute("x"), bar.getAttribute("width")]);
          const zero = card.querySelectorAll(".bars .zero")[1].getAttribute("x");
          done([words, bars, zero, card.querySelector(".scale").textContent]);
        });""")
    assert shown == ["low −0.50, high 1.50", [["0%", "25%"], ["25%", "75%"]], "25%",
                     "The bars go from −0.50 to 1.50; the line is 0."]


def test_live_traits_and_face(ocean_browser):
    browser = ocean_browser
    go_live(browser)
    wait(browser, lambda: find_all(browser, "#stage rect.box"))
    assert len(find_all(browser, "#live-answer .bars li")) == 5
    box, video = find(browser, "#stage rect.box").rect, find(browser, "#live").rect
    assert 0.1 < box["width"] / video["width"] < 0.5
    assert 0.1 < (box["x"] - video["x"]) / video["width"] < 0.6
    screenshot(browser, "live-traits")
    find(browser, "#close-camera").click()
    assert not find_all(browser, "#stage rect.box")


def test_options_of_the_ocean_model_are_sent(ocean_browser, ocean_service):
    browser = ocean_browser
    wait(browser, lambda: find_all(browser, "[name=method]"))
    find(browser, "[name=method] [value=middle]").click()
    find(browser, "[name=tta]").click()
    send_file(browser, CAT)
    expected = ocean_service.predict(CAT.read_bytes(), method="middle", tta="false").json()
    shown = json.loads(find(browser, ".card .json").get_attribute("textContent"))
    assert shown["predictions"] == expected["predictions"]
    assert (shown["metadata"]["method"], shown["metadata"]["tta"]) == ("middle", False)
    assert find(browser, "figcaption").text == "chelsea.jpg · 451 × 300"
    assert not find_all(browser, ".picture rect.box")


def test_what_failed_is_answered_with_other_options(ocean_browser):
    browser = ocean_browser
    wait(browser, lambda: find_all(browser, "[name=method]"))
    find(browser, "[name=method] [value=face]").click()
    send_file(browser, CAT)
    assert "No face was found" in find(browser, ".card .error").text
    assert find(browser, "#count").text == "1 result, 1 failed"
    find(browser, "[name=method] [value=middle]").click()
    find(browser, "#apply").click()
    wait(browser, lambda: len(find_all(browser, ".card .bars li")) == 5)
    assert not find(browser, ".card .failed").is_displayed()


@pytest.fixture(scope="module")
def own_services(tmp_path_factory):
    """{name: Service} of the models in own_tasks.py."""
    folder = tmp_path_factory.mktemp("own")
    services = {name.lower(): Service(folder, {"MODEL_NAME": f"tests.own_tasks:{name}", "DEVICE": "cpu",
                                               "MODEL_DIR": str(folder)}) for name in ("Sum", "Tone", "Length")}
    yield {name: service.wait_ready() for name, service in services.items()}
    for service in services.values():
        service.kill()


@pytest.fixture
def open_page(chromium, own_services):
    """open_page(name): a browser on the page of that model."""
    with contextlib.ExitStack() as pages:
        yield lambda name: pages.enter_context(on_page(chromium, own_services[name], name))


def choose(browser, name, value):
    find(browser, f"[name={name}] [value='{value}']").click()


def press_send(browser):
    """Send what the form holds; returns the card of the answer."""
    before = len(find_all(browser, ".card"))
    find(browser, "#send button").click()
    wait(browser, lambda: len(find_all(browser, ".card:not(.waiting)")) == before + 1)
    return find(browser, ".card")


def run_snippets(card, folder):
    """Run the card's line for curl, its Python and its JavaScript; returns the output of the first, or the file that it
    made. The others must have the same."""
    results = []
    for selector, call in ((".curl", run_curl), (".python", run_python), (".javascript", run_javascript)):
        before = set(os.listdir(folder))
        output = call(text_of(card, selector), folder)
        made = set(os.listdir(folder)) - before
        assert made <= {"answer.wav"}
        for name in made:
            assert output == b""
            output = (folder / name).read_bytes()
            (folder / name).unlink()
        results.append(output)
    assert answer_in(results[1]) == answer_in(results[2]) == answer_in(results[0])
    return results[0]


def answer_in(output):
    return json.loads(output)["predictions"] if output.startswith(b"{") else output


def rows_of(card):
    return [tuple(row.text.split("\n")) for row in find_all(card, ".bars li")]


def test_the_form_is_made_of_the_declared_options(open_page):
    browser = open_page("sum")
    assert find(browser, "#about").text == (
        "Adds numbers up, and answers in the shape that is asked for, with <b>no tags</b>.")
    assert find(browser, "#model").text == "own · cpu"
    fields = {field.get_attribute("name"): field for field in find_all(browser, "#options [name]")}

    def is_like(name, *names):
        return tuple(fields[name].get_attribute(attribute) for attribute in names)
    assert [field.accessible_name for field in fields.values()] == [
        "Times", "Shape", "Is rounded", "Is negative", "Add", "Note", "More"]
    assert is_like("times", "type", "min", "max", "step", "value") == ("number", "1", "9", "1", "2")
    assert is_like("add", "type", "min", "max", "step", "value") == ("number", "-10", "10", "any", "")
    assert is_like("shape", "type", "value") == ("select-one", "Members")
    assert is_like("is_rounded", "type", "checked") == ("checkbox", "true")
    assert is_like("is_negative", "type", "value") == ("select-one", "")
    assert is_like("note", "type", "maxLength", "value") == ("text", "99", "")
    assert is_like("more", "type") == ("file",)
    assert is_like("times", "title") == (f"What the sum is multiplied by. {HTML}",)
    find(browser, "#meanings summary").click()
    assert [term.text for term in find_all(browser, "#meanings dt")] == [
        "Times", "Shape", "Is rounded", "Is negative", "Add", "More"]
    assert find(browser, "#meanings dd").text == f"What the sum is multiplied by. {HTML}"
    assert not find(browser, "#drop").is_displayed()
    assert json.loads(find(browser, "#text").get_property("value")) == {"numbers": [1, 2.5, 3]}


def test_json_and_options_are_sent_and_curl_does_the_same(open_page, own_services, tmp_path):
    browser = open_page("sum")
    assert whole_answer(press_send(browser))["predictions"]["sum"] == 13
    fill(browser, "#text", '{"numbers": [0.5, 1]}')
    fill(browser, "[name=times]", "3")
    find(browser, "[name=is_rounded]").click()
    choose(browser, "is_negative", "true")
    fill(browser, "[name=add]", "0.25")
    fill(browser, "[name=note]", "it's \\ \"$HOME\" `touch hacked` \u202e")
    card = press_send(browser)
    body = {"numbers": [0.5, 1], "times": 3, "shape": "Members", "is_rounded": False, "is_negative": True, "add": 0.25,
            "note": "it's \\ \"$HOME\" `touch hacked` \u202e"}
    expected = {"sum": -4.75, "note": body["note"], "of": {"times": 3, body["note"]: None}}
    answer = requests.post(own_services["sum"].url + "/predict", json=body, timeout=10).json()
    assert answer["predictions"] == whole_answer(card)["predictions"] == expected
    assert json.loads(run_snippets(card, tmp_path))["predictions"] == expected
    assert '"times":3,' in find(card, ".card code").get_attribute("textContent")
    terms, values = find_all(card, ".shown dt"), find_all(card, ".shown dd")
    assert [term.text for term in terms] == ["sum", "note", "of"]
    assert values[0].text == "-4.75"
    assert json.loads(values[2].text) == expected["of"]


def test_what_is_written_goes_before_what_is_chosen(open_page):
    browser = open_page("sum")
    fill(browser, "#text", '{"numbers": [1], "times": 9}')
    card = press_send(browser)
    assert whole_answer(card)["predictions"]["sum"] == 9
    assert '"times":9' in find(card, ".card code").get_attribute("textContent")


def test_a_file_among_the_options_of_json(open_page, tmp_path):
    browser, path = open_page("sum"), tmp_path / "it's \"more\".bin"
    path.write_bytes(bytes(range(256)) * 2)
    find(browser, "[name=more]").send_keys(str(path))
    card = press_send(browser)
    assert whole_answer(card)["predictions"]["sum"] == 13 + 2 * sum(range(256))
    assert json.loads(run_snippets(card, tmp_path))["predictions"] == whole_answer(card)["predictions"]


def test_what_is_no_json_object_is_not_sent(open_page):
    browser = open_page("sum")
    for text in ('{"numbers": [1,}', "[1, 2]", "null", "1 2"):
        fill(browser, "#text", text)
        find(browser, "#send button").click()
        problem = find(browser, "#text-problem")
        assert problem.text.startswith("Write an object" if text in ("[1, 2]", "null") else "This is not JSON: ")
        assert problem.get_attribute("role") == "alert"
        field = browser.switch_to.active_element
        assert field.get_attribute("id") == "text"
        assert field.get_attribute("aria-invalid") == "true"
        assert find_all(browser, ".card") == []
        fill(browser, "#text", '{"numbers": [1]}')
        assert (field.get_attribute("aria-invalid"), problem.text) == ("false", "")
    field.send_keys(Keys.CONTROL, Keys.ENTER)
    wait(browser, lambda: find_all(browser, ".card:not(.waiting)"))
    assert whole_answer(find(browser, ".card"))["predictions"]["sum"] == 2


def test_the_service_says_what_is_wrong_with_json(open_page):
    browser = open_page("sum")
    fill(browser, "#text", '{"numbers": "many"}')
    card = press_send(browser)
    assert find(card, "h2").text == "No answer"
    assert find(card, ".error").text == "numbers must be a list of numbers, got 'many'"


def test_answers_of_every_shape_with_html_as_text(open_page):
    browser = open_page("sum")
    fill(browser, "[name=note]", HTML)
    expected = {
        "scores": ("Scores", [("sum", "13"), (HTML, "0.25"), ("tiny", "0.00012")]),
        "probabilities": (HTML, [(HTML, "75.0 %"), ("other", "25.0 %")]),
        "classes": (HTML, [(HTML, "90.0 %"), ("other", "10.0 %")]),
        "Members": ("Answer", []), "text": ("Answer", []), "list": ("Answer", [])}
    for shape, (title, rows) in expected.items():
        choose(browser, "shape", shape)
        card = press_send(browser)
        assert (find(card, "h2").text, rows_of(card)) == (title, rows)
        shown = find(card, ".shown")
        assert shown.is_displayed() == (rows == [])
        status = find(browser, "#status").get_attribute("textContent")
        if shape == "Members":
            assert [value.text for value in find_all(shown, "dd")][:2] == ["13", HTML]
        elif shape == "text":
            assert shown.text == HTML
            assert status == f"JSON: {HTML}"
        elif shape == "list":
            assert json.loads(shown.text) == [13, HTML, []]
        else:
            assert status == f"JSON: {', '.join(' '.join(row) for row in rows)}"
    bars = [find_all(card, ".bars svg rect") for card in find_all(browser, ".card")]
    widths = [[rect.get_attribute("width") for rect in rects] for rects in bars]
    assert [widths[3], widths[4]] == [["90%", "10%"], ["75%", "25%"]]
    assert [float(width.removesuffix("%")) for width in widths[5]] == pytest.approx([100, 1.92, 0.00092], abs=0.01)
    screenshot(browser, "own-json")
    assert find_all(browser, "#results b:not(.stage b), #results img, #meanings b, header b") == []
    assert browser.title == "Try sum"


def duration(browser):
    """The seconds that the newest card's player has read of its sound."""
    read = "return document.querySelector('.shown audio').duration"
    wait(browser, lambda: browser.execute_script(read))
    return browser.execute_script(read)


def test_text_becomes_sound(open_page, own_services, tmp_path):
    browser, text = open_page("tone"), "it's $HOME;\n'la'; @la"
    resize(browser, PHONE)
    assert find(browser, "#text").get_property("value") == "la la la la"
    fill(browser, "#text", text)
    fill(browser, "[name=pitch]", "880")
    card = press_send(browser)
    assert find(card, "h2").text == "Audio"
    assert find(card, ".sent").text == text
    assert duration(browser) == pytest.approx(len(text) / 20)
    assert not scrolls_sideways(browser)
    screenshot(browser, "own-text")
    expected = requests.post(own_services["tone"].url + "/predict", timeout=10, json={
        "text": text, "pitch": 880})
    assert expected.headers["Content-Type"] == "audio/wav"
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    find(card, ".shown a").click()
    saved = tmp_path / "answer.wav"
    wait(browser, lambda: saved.exists() and saved.stat().st_size == len(expected.content))
    assert saved.read_bytes() == expected.content
    saved.unlink()
    assert run_snippets(card, tmp_path) == expected.content


def test_a_file_among_the_options_of_a_text(open_page, tmp_path):
    browser, path, text = open_page("tone"), tmp_path / "a;voice,.bin", '@la; "la"\nla'
    path.write_bytes(b"voice")
    fill(browser, "#text", text)
    find(browser, "[name=voice]").send_keys(str(path))
    card = press_send(browser)
    assert duration(browser) == pytest.approx(len(text) / 20 + 5 / RATE)
    assert "-F voice=@" in find(card, ".card code").get_attribute("textContent").replace("'", "").replace('"', "")
    with wave.open(io.BytesIO(run_snippets(card, tmp_path))) as sound:
        assert sound.readframes(5) == bytes(b for letter in b"voice" for b in (letter, 0))
        assert sound.getnframes() == len(text) / 20 * RATE + 5


def test_an_audio_file_is_answered(open_page, tmp_path):
    browser, path, data = open_page("length"), tmp_path / "sound.wav", io.BytesIO()
    with wave.open(data, "wb") as to:
        to.setparams((1, 2, RATE, 0, "NONE", ""))
        to.writeframes(bytes(RATE))
    path.write_bytes(data.getvalue())
    assert find(browser, "#drop strong").text == "Drop audio files here"
    assert find(browser, "#choose").get_attribute("accept") == "audio/*"
    for selector in ("#camera", "#sample", "#write", "#send"):
        assert not find(browser, selector).is_displayed()
    fill(browser, "[name=prefix]", "<@it's; type=x")
    send_file(browser, path)
    card = find(browser, ".card")
    assert find(card, ".shown").text == "<@it's; type=x 0.5"
    assert find(card, ".picture audio").get_attribute("aria-label") == "The recording you sent: sound.wav"
    assert json.loads(run_snippets(card, tmp_path))["predictions"] == "<@it's; type=x 0.5"


def test_keyboard_alone_on_a_form(open_page):
    browser, order = open_page("tone"), []
    for _ in range(9):
        webdriver.ActionChains(browser).send_keys(Keys.TAB).perform()
        field = browser.switch_to.active_element
        order.append(field.get_attribute("id") or field.get_attribute("name") or field.text)
    assert order[1:] == ["API", "show-model", "show-health", "text", "pitch", "voice", "What the options mean", "Send"]
    webdriver.ActionChains(browser).send_keys(Keys.SPACE).perform()
    wait(browser, lambda: find(browser, "#status").get_attribute("textContent").startswith("Text: audio/wav, "))
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]}
    controls = ("button", "link", "spinbutton", "textbox", "combobox", "Audio", "DisclosureTriangle")
    assert {role for role, name in named if role in controls and not name} == set()
    assert {("textbox", "Text"), ("spinbutton", "Pitch"), ("link", "Download"), ("Audio", "The answer")} <= named


def test_one_of_several_models_is_chosen(chromium, start_service, tmp_path):
    models = "sum=tests.own_tasks:Sum,tone@1=tests.own_tasks:Tone,tone@2=tests.own_tasks:Tone"
    service = start_service(MODEL_NAME="", MODELS=models).wait_ready()
    with on_page(chromium, service, "sum") as browser:
        wait(browser, lambda: find(browser, "#which").is_displayed())
        assert find(browser, "#which").accessible_name == "Model"
        assert [one.text for one in find_all(browser, "#which option")] == ["sum", "tone", "tone@1", "tone@2"]
        assert find(browser, "#which").get_attribute("value") == "sum"
        card = press_send(browser)
        assert whole_answer(card)["predictions"]["sum"] == 13
        find(browser, "#which [value='tone@2']").click()
        wait(browser, lambda: find(browser, "#name").text == "tone@2")
        assert [field.get_attribute("name") for field in find_all(browser, "#options [name]")] == ["pitch", "voice"]
        card = press_send(browser)
        assert find(card, "h2").text == "Audio"
        assert service.url + "/models/tone%402/predict" in find(card, ".card code").get_attribute("textContent")
        with wave.open(io.BytesIO(run_snippets(card, tmp_path))) as sound:
            assert sound.getnframes() == 0.55 * RATE
        screenshot(browser, "models")


def test_one_model_needs_no_choice(browser):
    assert not find(browser, "#which").is_displayed()


def test_page_is_for_browsers_only(service):
    accepts = {"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8": "text/html; charset=utf-8",
               "*/*": "application/json", "application/json": "application/json",
               "application/json, text/html;q=0.5": "application/json"}
    for accept, content_type in accepts.items():
        response = requests.get(service.url + "/", headers={"Accept": accept}, timeout=10)
        assert response.headers["Content-Type"] == content_type
        assert response.headers["Vary"] == "Accept"


def test_pages_hold_no_inline_script_or_style_and_no_other_host(service):
    page = requests.get(service.url + "/", headers={"Accept": "text/html"}, timeout=10)
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for path in ("", "docs", *[f"static/{path.name}" for path in (ROOT / "app/api/static").glob("*[!g]")]):
        response = requests.get(f"{service.url}/{path}", headers={"Accept": "text/html"}, timeout=10)
        assert response.status_code == 200
        text = response.text
        assert "https://" not in text
        assert " style=" not in text
        assert " onclick=" not in text
        assert "<style" not in text


def test_docs_are_drawn(chromium, service):
    resize(chromium, DESKTOP)
    chromium.get_log("browser")
    chromium.get(service.url + "/docs")
    wait(chromium, lambda: len(find_all(chromium, ".opblock")) >= 9)
    assert "3.1" in find(chromium, ".info").text
    screenshot(chromium, "docs")
    assert [e["message"] for e in chromium.get_log("browser") if e["level"] == "SEVERE"] == []
