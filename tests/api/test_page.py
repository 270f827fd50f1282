"""The page at /, in a real headless Chromium: files, the sample, the camera, the keyboard, its security policy."""
import json
import os
import shlex
import subprocess

import numpy as np
import pytest
import requests
from conftest import ROOT, Service, encoded, need, photo
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from videos import pan_over, write

CAT = ROOT / "tests/images/chelsea.jpg"
DESKTOP, PHONE = (1280, 800), (390, 844)
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # selenium's own sockets


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = need("chromium")
    folder = tmp_path_factory.mktemp("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", f"user-data-dir={folder}",
                 "use-fake-ui-for-media-stream", "use-fake-device-for-media-stream", "disable-dev-shm-usage",
                 "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(need("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, service):
    """A browser on the page, 1280 × 800."""
    yield from on_page(chromium, service, "efficientnet_lite0")


def on_page(chromium, service, model):
    """Yields a browser on the page; afterwards it must have nothing to complain about, nor asked anyone else."""
    resize(chromium, DESKTOP)
    chromium.get_log("browser")
    chromium.get_log("performance")
    chromium.get(service.url + "/")
    wait(chromium, lambda: find(chromium, "#name").text == model)
    yield chromium
    complaints = [entry["message"] for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
                  and "/predict - Failed to load resource" not in entry["message"]]  # an error that a test asked for
    assert complaints == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert asked
    assert [url for url in asked if not url.startswith((service.url, "blob:", "data:"))] == []


def resize(browser, size):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE})


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def find_all(browser, selector):
    return browser.find_elements(By.CSS_SELECTOR, selector)


def wait(browser, condition):
    WebDriverWait(browser, 30, poll_frequency=0.05).until(lambda _: condition())


def send_file(browser, *paths):
    before = len(find_all(browser, ".card"))
    find(browser, "#choose").send_keys("\n".join(map(str, paths)))
    wait(browser, lambda: len(find_all(browser, ".card:not(.waiting)")) == before + len(paths))


def scrolls_sideways(browser):
    return browser.execute_script("return document.documentElement.scrollWidth > document.documentElement.clientWidth")


def screenshot(browser, name):
    """Keep a picture of the page in the folder SCREENSHOTS, where one is named."""
    if os.environ.get("SCREENSHOTS"):
        browser.save_screenshot(f"{os.environ['SCREENSHOTS']}/{name}.png")


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
    assert browser.execute_script("return document.querySelector('.card img').naturalWidth") == 451
    assert not scrolls_sideways(browser)
    browser.execute_script("document.querySelector('details').open = true")
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


def test_the_curl_line_is_right_for_any_file_name(browser, tmp_path):
    for number, name in enumerate(NASTY_NAMES):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(CAT.read_bytes())
        browser.execute_async_script("""
            const [name, done] = arguments;
            fetch("static/cat.jpg").then(response => response.blob()).then(blob => {
              take([new File([blob], name, {type: "image/jpeg"})]);
              done();
            });""", name)
        wait(browser, lambda: not find_all(browser, ".card.waiting"))
        line = find(browser, ".card code").get_attribute("textContent")
        assert line.isprintable(), repr(name)  # control characters would act on the terminal it is pasted into
        answer = subprocess.run([need("bash"), "-c", line.replace("curl ", "curl -sS ", 1)], cwd=folder,
                                stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
        assert (answer.returncode, answer.stderr) == (0, b""), line
        assert json.loads(answer.stdout).get("predictions", [{}])[0].get("class") == "tiger cat", line
        assert os.listdir(folder) == [name], line


def test_several_files_of_which_one_is_none(browser, tmp_path):
    text, coffee = tmp_path / "text.jpg", tmp_path / "coffee.png"
    text.write_text("no picture")
    coffee.write_bytes(encoded(photo("coffee")))
    send_file(browser, CAT, text, coffee)
    assert [find(card, "h2").text for card in find_all(browser, ".card")] == ["tiger cat", "No answer", "espresso"]
    assert "not a picture that can be read" in find(browser, ".card .error:not([hidden])").text


def test_keyboard_alone_and_what_a_screen_reader_hears(browser):
    def press(key):
        webdriver.ActionChains(browser).send_keys(key).perform()
    press(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("class") == "skip"
    order = []
    for _ in range(7):
        press(Keys.TAB)
        order.append(browser.switch_to.active_element.get_attribute("id"))
    assert order[3:] == ["choose", "camera", "sample", ""]
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


def test_a_video_is_answered(browser, tmp_path):
    path = tmp_path / "clip.webm"
    path.write_bytes(write(pan_over(np.asarray(photo("chelsea")), 20), format="webm", codec="libvpx"))
    number = find(browser, "[name=frames]")
    number.clear()
    number.send_keys("3")
    send_file(browser, path)
    assert find(browser, ".card h2").text in ("tiger cat", "Egyptian cat", "tabby")
    assert find(browser, ".card figcaption").text == "clip.webm · 320 × 240"
    assert "-F frames=3" in find(browser, ".card code").get_attribute("textContent")
    shown = json.loads(find(browser, ".card .json").get_attribute("textContent"))
    assert [frame["index"] for frame in shown["metadata"]["frames"]] == [3, 10, 16]
    wait(browser, lambda: browser.execute_script("return document.querySelector('.card video').videoWidth") == 320)


@pytest.fixture(scope="module")
def ocean_service(tmp_path_factory, ocean_settings):
    running = Service(tmp_path_factory.mktemp("ocean-service"), {
        "MODEL_NAME": "ocean", "MODEL_PATH": str(ocean_settings.model_path), "DEVICE": "cpu",
        "MODEL_DIR": str(ocean_settings.model_dir)})
    yield running.wait_ready()
    running.stop()


@pytest.fixture
def ocean_browser(chromium, ocean_service):
    """A browser on the page of a service with the OCEAN model."""
    yield from on_page(chromium, ocean_service, "ocean")


def test_scores_and_face_box_of_the_ocean_model(ocean_browser, ocean_service, tmp_path):
    browser, path = ocean_browser, tmp_path / "portrait.png"
    path.write_bytes(encoded(photo("astronaut").crop((0, 0, 512, 400))))
    answer = ocean_service.predict(path.read_bytes()).json()
    predictions, metadata = answer["predictions"], answer["metadata"]
    wait(browser, lambda: [field.get_attribute("name") for field in find_all(browser, "#options [name]")] == [
        "method", "tta", "frames"])
    send_file(browser, path)
    assert find(browser, ".card h2").text == "Apparent traits"
    assert len(predictions) == 5
    assert [li.text for li in find_all(browser, ".bars li")] == [
        f"{trait}\n{score:.2f} ± {metadata['spread'][trait]:.2f}" for trait, score in predictions.items()]
    assert find(browser, "figcaption").text == "portrait.png · 512 × 400 · face found"
    x, y, width, height = metadata["frames"][0]["face_box"]
    box, img = find(browser, ".picture rect.box").rect, find(browser, ".picture img").rect
    scale = img["width"] / 512
    assert box["x"] - img["x"] == pytest.approx(x * scale, abs=2)
    assert box["y"] - img["y"] == pytest.approx(y * scale, abs=2)
    assert box["width"] == pytest.approx(width * scale, abs=4)
    assert box["height"] == pytest.approx(height * scale, abs=4)
    screenshot(browser, "traits")


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


def test_a_key_is_asked_for_where_one_is_needed(chromium, start_service):
    service = start_service(API_KEYS="a-key-of-the-page").wait_ready()
    chromium.get(service.url + "/")
    field = WebDriverWait(chromium, 20).until(lambda _: find(chromium, "#api-key"))
    assert "valid key" in find(chromium, "#problem").text
    field.send_keys("a-key-of-the-page", Keys.ENTER)
    wait(chromium, lambda: find(chromium, "#name").text == "efficientnet_lite0")
    assert find(chromium, "#problem").text == ""
    find(chromium, "#choose").send_keys(str(CAT))
    wait(chromium, lambda: chromium.find_elements(By.CSS_SELECTOR, "#results .bars li"))


def test_service_that_is_gone(chromium, browser):
    chromium.execute_cdp_cmd("Network.enable", {})
    chromium.execute_cdp_cmd("Network.emulateNetworkConditions",
                             {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0})
    try:
        send_file(browser, CAT)
    finally:
        chromium.execute_cdp_cmd("Network.emulateNetworkConditions",
                                 {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1})
    assert find(browser, ".card .error").text == "The service cannot be reached; is it still running?"
    chromium.get_log("browser")


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
    for path in ("", "docs", *[f"static/{n}" for n in ("style.css", "page.js", "docs.js", "icon.svg")]):
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
