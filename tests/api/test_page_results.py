"""The page at / when not all is well, and what can be done with its results: many files, a busy service or one that is
away, keys, limits, links, downloads, the panels, a phone."""
import contextlib
import csv
import itertools
import json
import os
import re
import threading

import pytest
import requests
from conftest import Service, encoded, photo
from pages import (
    CAT,
    DESKTOP,
    INSECURE_HOST,
    PHONE,
    events,
    fill,
    find,
    find_all,
    network,
    resize,
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
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from servers import free_port

KEY, UNUSED_KEY = "a-key-of-'the'-page", "a-key-that-nobody-has-used"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]  # selenium's own sockets


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A picture that is decoded quickly."""
    path = tmp_path_factory.mktemp("small") / "small.png"
    path.write_bytes(encoded(photo("chelsea").resize((64, 48))))
    return path


@pytest.fixture(scope="module")
def service(tmp_path_factory, settings, app):
    """One ready Service for this module, with a short queue: a second request of the page's fits, a crowd does not."""
    running = Service(tmp_path_factory.mktemp("service"), {
        "MODEL_NAME": "efficientnet_lite0", "DEVICE": "cpu", "MODEL_DIR": str(settings.model_dir), "MAX_QUEUE": "1"})
    yield running.wait_ready()
    running.kill()


def copies(path, folder, count):
    """That many files with the content of this one: 0.png, 1.png, …"""
    made = [folder / f"{number}{path.suffix}" for number in range(count)]
    for one in made:
        one.write_bytes(path.read_bytes())
    return made


def names_shown(browser):
    return [caption.get_attribute("textContent").partition(" · ")[0] for caption in find_all(browser, "figcaption")]


def drop(browser, data, target="document", event="DragEvent"):
    """Drop or paste {type: text} or {name: bytes of a file} on the page."""
    browser.execute_script("""
        const [data, target, kind] = arguments;
        const transfer = new DataTransfer();
        for (const [type, text] of Object.entries(data)) transfer.setData(type, text);
        const name = kind === "DragEvent" ? "dataTransfer" : "clipboardData";
        const init = {bubbles: true, cancelable: true, [name]: transfer};
        const element = target === "document" ? document : document.querySelector(target);
        element.dispatchEvent(new window[kind](kind === "DragEvent" ? "drop" : "paste", init));""", data, target, event)


# --- many files, a busy service, one that is away ---

def test_40_files_give_40_results_in_their_order(browser, small, tmp_path):
    paths = copies(small, tmp_path, 40)
    send_file(browser, *paths)
    assert names_shown(browser) == [path.name for path in paths]
    assert len(find_all(browser, ".bars li:first-child")) == 40
    assert find(browser, "#count").text == "40 results"
    assert text_of(browser, "#status") == "40 results"
    find(browser, "#clear").click()
    assert (find_all(browser, ".card"), find(browser, "#tools").is_displayed()) == ([], False)
    assert browser.switch_to.active_element.get_attribute("id") == "choose"


def test_refused_by_a_busy_service_it_asks_again(browser, service, small):
    data, is_over = encoded(photo("coffee")), threading.Event()

    def flood():
        while not is_over.is_set():
            if service.predict(data).status_code != 200:
                is_over.wait(0.1)
    crowd = [threading.Thread(target=flood) for _ in range(4 + 2 * os.cpu_count())]
    for thread in crowd:
        thread.start()
    try:
        def is_refused():
            if not find_all(browser, ".card.waiting"):
                find(browser, "#choose").send_keys(str(small))
            return 503 in [event["response"]["status"] for event in events(browser, "Network.responseReceived")]
        wait(browser, is_refused)
    finally:
        is_over.set()
        for thread in crowd:
            thread.join()
    wait(browser, lambda: not find_all(browser, ".card.waiting"))
    assert find_all(browser, ".failed:not([hidden])") == []
    assert len(find_all(browser, ".bars li:first-child")) == len(find_all(browser, ".card"))
    wait(browser, lambda: not find(browser, "#pause").is_displayed())


def test_a_service_that_was_away_comes_back(browser, small, tmp_path):
    with network(browser, offline=True):
        find(browser, "#choose").send_keys("\n".join(map(str, copies(small, tmp_path, 3))))
        wait(browser, lambda: find(browser, "#pause").is_displayed())
        assert find(browser, "#pause-words").text == "The service cannot be reached; is it still running?"
        assert find(browser, "#pause-words").get_attribute("role") == "alert"
        find(browser, "#sample").click()
        assert not find(browser, "#sample").is_enabled()
        find(browser, "#show-health").click()
        wait(browser, lambda: "cannot be reached" in find(browser, "#panel-facts").text)
        find(browser, "#panel-close").click()
        wait(browser, lambda: [title.text for title in find_all(browser, ".card h2")] == [
            "Waiting for the service…", "Waiting for the service…", "Waiting…"])
        wait(browser, lambda: re.search(r"Trying again in \d+ s", find(browser, "#pause").text))
        find(browser, "#try-now").click()
        wait(browser, lambda: re.search(r"Trying again in \d+ s", find(browser, "#pause").text))
        screenshot(browser, "away")
    wait(browser, lambda: len(find_all(browser, ".card:not(.waiting) .bars li:first-child")) == 4)
    assert names_shown(browser) == ["cat.jpg", "0.png", "1.png", "2.png"]
    assert not find(browser, "#pause").is_displayed()
    browser.get_log("browser")


# --- keys, limits of rates, another model in place of the configured one ---

@pytest.fixture(scope="module")
def guarded(tmp_path_factory, settings, app):
    """A service that needs a key, takes few requests, and serves MODEL_FALLBACK as it cannot load its own model."""
    running = Service(tmp_path_factory.mktemp("guarded"), {
        "MODEL_NAME": "wide_resnet101_2", "MODEL_FALLBACK": "efficientnet_lite0", "DEVICE": "cpu",
        "WEIGHTS_MIRROR": f"http://127.0.0.1:{free_port()}", "MODEL_DIR": str(settings.model_dir),
        "API_KEYS": f"{KEY},{UNUSED_KEY}", "RATE_LIMIT": "4/2second"})
    yield running.wait_ready()
    running.kill()


def enter_key(browser, key):
    fill(browser, "#api-key", key)
    find(browser, "#api-key").send_keys(Keys.ENTER)


def test_with_a_key_and_a_limit(chromium, guarded, small, tmp_path):
    browser = chromium
    resize(browser, DESKTOP)
    browser.get(guarded.url + "/")
    wait(browser, lambda: find(browser, "#key-form").is_displayed())
    assert find(browser, "#key-words").text == "This service needs an API key. Enter the one that you were given."
    assert browser.switch_to.active_element.get_attribute("id") == "api-key"
    assert browser.switch_to.active_element.accessible_name == "API key"
    screenshot(browser, "key")
    find(browser, "#choose").send_keys(str(CAT))
    assert find(browser, "#problem").text == "1 file will be sent as soon as the service answers."
    enter_key(browser, "wrong")
    wait(browser, lambda: "does not accept this API key" in find(browser, "#key-words").text)
    assert find(browser, "#api-key").get_attribute("aria-invalid") == "true"
    enter_key(browser, KEY)
    wait(browser, lambda: find(browser, "#name").text == "efficientnet_lite0")
    assert not find(browser, "#key-form").is_displayed()
    assert find(browser, "#problem").text == ""
    assert find(browser, "#fallback").text == (
        "wide_resnet101_2 could not be loaded. efficientnet_lite0 answers in its place.")
    wait(browser, lambda: find_all(browser, ".card:not(.waiting) .bars"))
    assert find(browser, ".card h2").text == "tiger cat"
    assert not find(browser, "#apply").is_enabled()  # it was sent with the options of the form
    screenshot(browser, "fallback")

    expected = whole_answer(find(browser, ".card"))["predictions"]
    for selector, call in ((".curl", run_curl), (".python", run_python), (".javascript", run_javascript)):
        source = text_of(browser, f".card {selector}")
        assert "Authorization" in source
        assert json.loads(call(source, CAT.parent))["predictions"] == expected

    events(browser, "")
    send_file(browser, *copies(small, tmp_path, 9))
    refused = [event["response"] for event in events(browser, "Network.responseReceived")
               if event["response"]["status"] == 429]
    assert refused
    assert len(find_all(browser, ".card .bars li:first-child")) == 10
    assert find_all(browser, ".failed:not([hidden])") == []

    browser.refresh()
    wait(browser, lambda: find(browser, "#name").text == "efficientnet_lite0")
    assert not find(browser, "#key-form").is_displayed()
    find(browser, "#show-model").click()
    wait(browser, lambda: "In place of\nwide_resnet101_2" in find(browser, "#panel-facts").text)
    find(browser, "#panel-close").click()
    stored = browser.execute_script("return [sessionStorage.length, localStorage.length, document.cookie]")
    assert stored == [1, 0, ""]

    find(browser, "#camera").click()
    wait(browser, lambda: browser.execute_script("return document.querySelector('#live').videoWidth > 0"))
    find(browser, "#go-live").click()
    wait(browser, lambda: "Too many predictions" in find(browser, "#live-note").text)
    assert find(browser, "#go-live").text == "Stop"
    find(browser, "#change-key").click()
    enter_key(browser, "another")
    wait(browser, lambda: find(browser, "#go-live").text == "Go live")
    assert "valid key" in find(browser, "#problem").text
    find(browser, "#close-camera").click()
    browser.execute_script("sessionStorage.clear()")
    browser.get("about:blank")
    browser.get_log("browser")


def test_a_page_that_is_refused_at_first_waits(chromium, guarded):
    chromium.get(guarded.url + "/static/icon.svg")
    chromium.execute_script("sessionStorage.setItem('api-key', arguments[0])", UNUSED_KEY)
    statuses = {requests.get(guarded.url + "/info", headers={"X-API-Key": "guessed"}).status_code for _ in range(40)}
    assert statuses == {401, 429}
    chromium.get(guarded.url + "/")
    wait(chromium, lambda: find(chromium, "#pause").is_displayed())
    assert "Too many requests without a valid key" in find(chromium, "#pause-words").text
    assert find(chromium, "#problem").text == ""
    chromium.get("about:blank")


# --- files, links ---

def test_files_that_would_be_refused_are_not_sent(browser, tmp_path):
    for name, size in (("large.jpg", 10 * 2**20 + 1), ("large.webm", 51 * 2**20), ("empty.png", 0)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    events(browser, "")
    send_file(browser, *[tmp_path / name for name in ("large.jpg", "large.webm", "empty.png")])
    assert [error.text for error in find_all(browser, ".card .error")] == [
        "This picture has 10,485,761 bytes; the limit is 10,485,760 bytes. It was not sent.",
        "This video has 53.5 MB; the limit is 52.4 MB. It was not sent.",
        "empty.png is empty: it has 0 bytes. Choose one that has content."]
    assert [event["request"]["url"] for event in events(browser, "Network.requestWillBeSent")
            if event["request"]["method"] == "POST"] == []
    assert find_all(browser, ".again:not([hidden])") == []


def test_a_picture_with_too_many_pixels_is_refused_in_words(browser, tmp_path):
    Image.new("1", (10_000, 6_000)).save(tmp_path / "huge.png")
    send_file(browser, tmp_path / "huge.png")
    assert [error.text for error in find_all(browser, ".card .error")] == [
        "The picture has 10000 × 6000 pixels; at most 50,000,000 are allowed."]


def test_a_large_file_shows_how_much_is_sent(browser, tmp_path):
    path = tmp_path / "large.jpg"
    path.write_bytes(encoded(photo("coffee").resize((4000, 3000)), "JPEG", quality=98))
    assert path.stat().st_size > 2**21
    with network(browser, uploadThroughput=2**21):
        browser.execute_script("""
            window.parts = [];
            new MutationObserver(() => {
              const progress = document.querySelector(".card progress");
              if (progress && !progress.hidden) window.parts.push(progress.value);
            }).observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});""")
        send_file(browser, path)
    parts = browser.execute_script("return window.parts")
    assert len(set(parts)) > 1
    assert parts == sorted(parts)
    assert not find(browser, ".card progress").is_displayed()
    assert find_all(browser, ".card .bars li")


LINKS = [
    ({"text/uri-list": "https://example.org/cat.jpg"}, "This is a link to a file of example.org, which this page"),
    ({"text/html": '<img src="https://example.org/a.png">', "text/plain": "a cat"}, "a file of example.org"),
    ({"text/uri-list": "file:///home/me/cat.jpg"}, "keep pages from opening files by their path. Choose the file"),
    ({"text/uri-list": "data:text/html,<b>"}, "There is no picture in this link."),
]


@pytest.mark.parametrize("event", ["DragEvent", "ClipboardEvent"])
def test_links_that_cannot_be_followed_say_why(browser, event):
    for data, words in LINKS:
        drop(browser, data, event=event)
        wait(browser, lambda words=words: words in find(browser, "#problem").text)
    assert find_all(browser, ".card") == []
    drop(browser, {"text/plain": "https://example.org/of-a-text"}, target="[name=top_k]", event=event)
    drop(browser, {"text/plain": "what"}, event=event)
    assert ("There is no" in find(browser, "#problem").text) == (event == "ClipboardEvent" or "no picture in" in words)


def test_links_that_can_be_followed_are(browser, service):
    drop(browser, {"text/uri-list": f"# a comment\r\n{service.url}/static/cat.jpg"})
    wait(browser, lambda: find_all(browser, ".card:not(.waiting)"))
    assert names_shown(browser) == ["cat.jpg"]
    picture = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    drop(browser, {"text/plain": picture}, event="ClipboardEvent")
    wait(browser, lambda: len(find_all(browser, ".card:not(.waiting) .bars li")) == 10)
    assert names_shown(browser) == ["pasted.gif", "cat.jpg"]


def test_a_folder_gives_its_pictures(browser, small, tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    for name in ("10.png", "9.png", "inner/1.png", ".hidden.png", "notes.txt", "of-a-phone.heic"):
        (folder / name).write_bytes(small.read_bytes())
    data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": data})
    wait(browser, lambda: len(find_all(browser, ".card:not(.waiting)")) == 4)
    assert names_shown(browser) == ["9.png", "10.png", "1.png", "of-a-phone.heic"]
    assert find(browser, "#problem").text == "2 other files of the folder were left out."


# --- what can be done with results ---

def test_options_are_applied_to_all_and_cards_are_removed(browser, small):
    send_file(browser, CAT, small)
    assert not find(browser, "#apply").is_enabled()
    fill(browser, "[name=top_k]", "2")
    find(browser, "#apply").click()
    wait(browser, lambda: [len(find_all(card, ".bars li")) for card in find_all(browser, ".card")] == [2, 2])
    wait(browser, lambda: not find(browser, "#apply").is_enabled())
    assert names_shown(browser) == [CAT.name, small.name]
    assert "-F top_k=2" in text_of(browser, ".card .curl")
    urls = browser.execute_script("""
        window.revoked = [];
        const revoke = URL.revokeObjectURL;
        URL.revokeObjectURL = url => { window.revoked.push(url); revoke.call(URL, url); };
        return [...document.querySelectorAll(".picture img")].map(({src}) => src)""")
    assert find(browser, ".remove").accessible_name == f"Remove {CAT.name}"
    find(browser, ".remove").send_keys(Keys.ENTER)
    assert names_shown(browser) == [small.name]
    assert browser.execute_script("return window.revoked") == urls[:1]
    assert browser.switch_to.active_element.accessible_name == f"Remove {small.name}"
    assert text_of(browser, "#status") == f"{CAT.name} is removed"


def test_what_failed_is_tried_again(browser, tmp_path):
    fill(browser, "[name=top_k]", "99")
    send_file(browser, CAT)
    assert "top_k must be an integer from 1 to 10" in find(browser, ".card .error").text
    assert find(browser, "#count").text == "1 result, 1 failed"
    find(browser, ".card .again").click()
    wait(browser, lambda: not find_all(browser, ".card.waiting"))
    assert find(browser, ".card h2").text == "No answer"
    find(browser, "#again").click()
    wait(browser, lambda: not find_all(browser, ".card.waiting"))
    fill(browser, "[name=top_k]", "3")
    find(browser, "#apply").click()
    wait(browser, lambda: len(find_all(browser, ".card .bars li")) == 3)
    assert not find(browser, "#again").is_displayed()


def test_results_are_saved_as_csv_and_json(browser, tmp_path):
    nasty = tmp_path / '=HYPERLINK("x"),.jpg'
    nasty.write_bytes(CAT.read_bytes())
    (tmp_path / "-no.txt").write_text("no picture")
    send_file(browser, nasty, tmp_path / "-no.txt")
    expected = whole_answer(find(browser, ".card"))["predictions"]
    folder = tmp_path / "saved"
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    for button in ("#csv", "#json"):
        find(browser, button).click()
    wait(browser, lambda: (folder / "results.csv").exists() and (folder / "results.json").exists())
    with open(folder / "results.csv", encoding="utf-8-sig", newline="") as file:
        first, second = csv.DictReader(file)
    assert first["file"] == "'" + nasty.name
    assert second["file"] == "'-no.txt"
    assert (first["status"], second["status"], second["class_1"]) == ("success", "error", "")
    assert "not a picture" in second["message"]
    assert (first["model"], first["options"]) == ("efficientnet_lite0", "top_k=5")
    ranked = [(first[f"class_{i}"], float(first[f"confidence_{i}"])) for i in range(1, 6)]
    assert ranked == [(one["class"], one["confidence"]) for one in expected]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [(one["file"], one["status"]) for one in results] == [(nasty.name, "success"), ("-no.txt", "error")]
    assert results[0]["predictions"] == expected
    assert results[1]["error"] == "INVALID_IMAGE"


def test_texts_in_a_table_are_harmless(browser):
    cells = browser.execute_async_script("""
        const done = arguments[0];
        import(new URL("static/table.js", location.href)).then(({asCsv}) => {
          const model = {name: "m"}, options = {};
          const names = ["=1", "+1", "-1", "@a", " =1", "\\t=1", "\\uff1d1", "a=1", 'say "a", b', "two\\nlines"];
          done(asCsv([...names.map(name => ({name, model, options, answer: {body: {predictions: "=2"}}})),
                      {name: "x", model, options, answer: {body: {predictions: {low: -0.5, file: 1}}}}]));
        });""")
    *rows, last = csv.DictReader(cells.removeprefix("\ufeff").splitlines(keepends=True))
    assert [row["file"] for row in rows] == [
        "'=1", "'+1", "'-1", "'@a", "' =1", "'\t=1", "'\uff1d1", "a=1", 'say "a", b', "two\nlines"]
    assert {row["answer"] for row in rows} == {"'=2"}
    assert (last["file"], last["low"], last["file (score)"]) == ("x", "-0.5", "1")


# --- panels, phones, looks ---

def test_model_and_health_can_be_read(browser):
    find(browser, "#show-model").click()
    wait(browser, lambda: "4,652,008" in find(browser, "#panel-facts").text)
    facts = find(browser, "#panel-facts").text
    for words in ("Task\nClassification", "Input\n224 × 224 pixels", "1,000 classes", "File\n10.5 MB", ""
                  "Video\n52.4 MB, 300 s"):
        assert words in facts
    assert "{" not in facts
    assert json.loads(text_of(browser, "#panel-json"))["model"]["name"] == "efficientnet_lite0"
    screenshot(browser, "model")
    webdriver.ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not find(browser, "#panel").is_displayed()
    assert browser.switch_to.active_element.get_attribute("id") == "show-model"
    resize(browser, PHONE)
    find(browser, "#show-health").click()
    wait(browser, lambda: "State\nReady" in find(browser, "#panel-facts").text)
    assert re.search(r"Running for\n.*(second|minute)", find(browser, "#panel-facts").text)
    assert not scrolls_sideways(browser)
    screenshot(browser, "health-390")
    find(browser, "#panel-close").click()


def test_a_phone_is_not_told_to_drop(browser):
    assert find(browser, "#drop strong").text == "Drop pictures or videos here"
    with contextlib.ExitStack() as stack:
        stack.callback(browser.execute_cdp_cmd, "Emulation.setTouchEmulationEnabled", {"enabled": False})
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        resize(browser, PHONE)
        wait(browser, lambda: find(browser, "#choose-label").text == "Take or choose a photo or video")
        assert find(browser, "#drop strong").text == "Choose pictures or videos"
        assert "paste" not in find(browser, "#drop").text
        screenshot(browser, "phone-empty")


def test_the_camera_is_not_offered_where_it_cannot_work(browser, service):
    assert find(browser, "#camera").is_displayed()
    browser.get(f"http://{INSECURE_HOST}:{service.port}/")
    wait(browser, lambda: find(browser, "#name").text == "efficientnet_lite0")
    assert not find(browser, "#camera").is_displayed()
    assert find(browser, "#sample").is_displayed()
    browser.get_log("performance")
    browser.get(service.url)  # so that the test of who was asked has one


LUMINANCE = """
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const luminance = color => {
      canvas.fillStyle = color;
      canvas.fillRect(0, 0, 1, 1);
      const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255).map(
        v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = getComputedStyle(document.body).backgroundColor;
    const controls = "#drop, .button:not(:disabled), input:not(.hidden, [type=checkbox]), select, textarea";
    const card = getComputedStyle(document.querySelector(".card")).backgroundColor;
    return [...document.querySelectorAll(controls)].filter(one => one.checkVisibility()).map(one => {
        const [edge, ...around] = [getComputedStyle(one).borderTopColor, ground, card].map(luminance);
        return [one.id || one.name || one.textContent, Math.min(...around.map(
          other => (Math.max(edge, other) + 0.05) / (Math.min(edge, other) + 0.05)))];
      });"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_borders_of_controls_can_be_seen(browser, small, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        send_file(browser, small)
        contrasts = browser.execute_script(LUMINANCE)
        assert len(contrasts) > 6
        assert [(name, contrast) for name, contrast in contrasts if contrast < 3] == []
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_nothing_jumps(browser, service):
    browser.get(service.url)
    wait(browser, lambda: find(browser, "#name").text == "efficientnet_lite0")
    find(browser, "#sample").click()
    wait(browser, lambda: find_all(browser, ".card:not(.waiting)"))
    shift = browser.execute_async_script("""
        const done = arguments[0];
        new PerformanceObserver(list => done(list.getEntries().filter(one => !one.hadRecentInput)
          .reduce((sum, {value}) => sum + value, 0))).observe({type: "layout-shift", buffered: true});
        setTimeout(() => done(0), 500);""")
    assert shift < 0.1


def test_long_names_stay_inside(browser, small, tmp_path):
    path = tmp_path / f"{'x' * 250}.png"
    path.write_bytes(small.read_bytes())
    resize(browser, PHONE)
    send_file(browser, path)
    assert not scrolls_sideways(browser)
    sides = browser.execute_script("""
        return [...document.querySelectorAll(".card *")].filter(one => one.checkVisibility())
          .map(one => one.getBoundingClientRect().right)""")
    assert max(itertools.chain(sides, [0])) <= PHONE[0]
