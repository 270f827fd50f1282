"""A page of the service in a real headless Chromium, as the tests look at it."""
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys

from conftest import ROOT, encoded, need, photo
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CAT = ROOT / "tests/images/chelsea.jpg"
DESKTOP, PHONE = (1280, 800), (390, 844)
noted = []  # what Chromium's log of the network has had since the page was opened
INSECURE_HOST = "insecure.test"  # resolves to loopback, but is no origin that browsers trust


def start_chromium(folder):
    """A driver of Chromium, whose camera sees a face. folder: for its files."""
    options = webdriver.ChromeOptions()
    options.binary_location = need("chromium")
    face = encoded(photo("astronaut").crop((0, 0, 480, 360)).resize((640, 480)), "JPEG", subsampling=2)
    (folder / "camera.mjpeg").write_bytes(2 * face)  # what the camera sees
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", f"user-data-dir={folder}",
                 "use-fake-ui-for-media-stream", "use-fake-device-for-media-stream", "disable-dev-shm-usage",
                 "hide-scrollbars", f"use-file-for-fake-video-capture={folder / 'camera.mjpeg'}",
                 f"host-resolver-rules=MAP {INSECURE_HOST} 127.0.0.1",
                 "app=data:,"):  # a window without tabs and an address bar, which take a quarter of a page's time
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("perfLoggingPrefs", {"enableNetwork": True, "enablePage": False})
    return webdriver.Chrome(options, webdriver.ChromeService(need("chromedriver")))


@contextlib.contextmanager
def on_page(chromium, service, model):
    """A browser on the page; afterwards it must have nothing to complain about, nor asked anyone else."""
    resize(chromium, DESKTOP)
    chromium.get_log("browser")
    chromium.get_log("performance")
    noted.clear()
    chromium.get(service.url + "/")
    wait(chromium, lambda: find(chromium, "#name").text == model)
    yield chromium
    complaints = [entry["message"] for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
                  and not re.search(r"/predict(\?stream=true)? - Failed to load resource",
                                    entry["message"])]  # an error that a test asked for
    assert complaints == []
    events(chromium, "")
    asked = {message["params"]["request"]["url"] for message in noted
             if message["method"] == "Network.requestWillBeSent"}
    assert asked
    assert [url for url in asked if not url.startswith((service.url, "blob:", "data:"))] == []


def events(browser, method):
    """What Chromium has noted of its network since this was last asked."""
    new = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    noted.extend(new)
    return [message["params"] for message in new if message["method"] == method]


def resize(browser, size):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE})


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def find_all(browser, selector):
    return browser.find_elements(By.CSS_SELECTOR, selector)


def wait(browser, condition):
    WebDriverWait(browser, 30, poll_frequency=0.05).until(lambda _: condition())


def text_of(browser, selector):
    """Its text, though it may not be shown."""
    return find(browser, selector).get_attribute("textContent")


def fill(browser, selector, text):
    field = find(browser, selector)
    field.clear()
    field.send_keys(text)


def send_file(browser, *paths):
    before = len(find_all(browser, ".card"))
    find(browser, "#choose").send_keys("\n".join(map(str, paths)))
    wait(browser, lambda: len(find_all(browser, ".card:not(.waiting)")) == before + len(paths))


def whole_answer(card):
    return json.loads(text_of(card, ".json"))


def scrolls_sideways(browser):
    return browser.execute_script("return document.documentElement.scrollWidth > document.documentElement.clientWidth")


def screenshot(browser, name):
    """Keep a picture of the page in the folder SCREENSHOTS, where one is named."""
    if os.environ.get("SCREENSHOTS"):
        browser.save_screenshot(f"{os.environ['SCREENSHOTS']}/{name}.png")


@contextlib.contextmanager
def network(browser, **conditions):
    """With other conditions of Chromium's network: offline=True, uploadThroughput=bytes per second."""
    usual = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", usual | conditions)
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", usual)


def run_curl(line, folder):
    """Run a line for curl in bash; returns its output."""
    assert line.isprintable(), repr(line)  # control characters would act on the terminal it is pasted into
    return run([need("bash"), "-c", line.replace("curl ", "curl -sS ", 1)], folder)


def run_python(source, folder):
    """Run it with nothing but the standard library."""
    assert all(line.isprintable() for line in source.split("\n")), repr(source)
    return run([sys.executable, "-I", "-S", "-c", source], folder)


def run_javascript(source, folder):
    assert all(line.isprintable() for line in source.split("\n")), repr(source)
    return run([need("node"), "--input-type=module", "--eval", source], folder)


def run(arguments, folder):
    done = subprocess.run(arguments, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, b""), shlex.join(map(str, arguments))
    return done.stdout
