"""/docs in a real headless Chromium: what it sends is what the user typed, and it fits a phone."""
import json
import shlex
import subprocess

import numpy as np
import pytest
import requests
from conftest import need, photo
from pages import CAT, PHONE, find, find_all, resize, scrolls_sideways, wait
from selenium.webdriver.common.keys import Keys
from videos import pan_over, write

PREDICT, BATCH, INFER = "#operations-Predict-predict", "#operations-Predict-predictBatch", \
    "#operations-Open_Inference_Protocol-v2Infer"
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # selenium's own sockets


@pytest.fixture
def docs(chromium, service):
    """A browser on /docs, 1280 × 800."""
    resize(chromium, (1280, 800))
    chromium.get(service.url + "/docs")
    wait(chromium, lambda: find_all(chromium, PREDICT))
    return chromium


def shown(parent, selector):
    """The element, once it is there: Swagger UI draws an operation bit by bit."""
    wait(parent, lambda: find_all(parent, selector))
    return find(parent, selector)


def opened(browser, selector):
    """The operation, unfolded."""
    operation = shown(browser, selector)
    browser.execute_script("arguments[0].click()", shown(operation, ".opblock-summary-control"))
    shown(operation, ".execute")
    return operation


def choose_type(operation, media_type):
    shown(operation, f'select[aria-label="Request content type"] option[value="{media_type}"]').click()


def executed(browser, operation):
    """(status, body) of the answer that it shows."""
    browser.execute_script("arguments[0].click()", shown(operation, ".execute"))
    shown(operation, ".live-responses-table tbody .response-col_status")
    # As text of the page, a long answer would be cut off.
    body = shown(operation, ".live-responses-table .highlight-code code").get_attribute("textContent")
    return int(shown(operation, ".live-responses-table tbody .response-col_status").text.split()[0]), json.loads(body)


def test_a_file_is_answered_as_curl_is_and_nothing_else_is_sent(docs, service, tmp_path):
    clip = tmp_path / "clip.webm"
    clip.write_bytes(write(pan_over(np.asarray(photo("chelsea")), 20), format="webm", codec="libvpx"))
    operation = opened(docs, PREDICT)
    shown(operation, 'input[type="file"]').send_keys(str(clip))
    status, body = executed(docs, operation)
    assert status == 200
    assert shown(operation, ".request-url").text == f"Request URL\n{service.url}/predict"
    by_curl = json.loads(subprocess.check_output([need("curl"), "-sF", f"file=@{clip}", f"{service.url}/predict"]))
    assert body["predictions"] == by_curl["predictions"]
    frames = [frame["index"] for frame in by_curl["metadata"]["frames"]]
    assert [frame["index"] for frame in body["metadata"]["frames"]] == frames
    # The command that it shows does the same.
    command = shlex.split(shown(operation, ".curl-command .curl").get_attribute("textContent").replace("\\\n", " "))
    assert [word for word in command if word.startswith("file=")] == ["file=@clip.webm;type=video/webm"]
    assert command.count("-F") == 1


@pytest.mark.slow
def test_an_option_is_sent_once_it_is_chosen(docs):
    operation = opened(docs, PREDICT)
    shown(operation, 'tr[data-param-name="top_k"] input').send_keys("2", Keys.TAB)
    shown(operation, 'tr[data-param-name="embedding"] select option[value="true"]').click()
    shown(operation, 'input[type="file"]').send_keys(str(CAT))
    status, body = executed(docs, operation)
    assert (status, len(body["predictions"])) == (200, 2)
    assert len(body["metadata"]["embedding"]) > 100
    assert shown(operation, ".request-url").text.endswith("/predict?top_k=2&embedding=true")


@pytest.mark.slow
@pytest.mark.parametrize("name", [PREDICT, BATCH, INFER], ids=["predict", "batch", "infer"])
def test_the_json_body_works_as_it_stands(docs, name):
    operation = opened(docs, name)
    choose_type(operation, "application/json")
    wait(docs, lambda: any(text.get_property("value") for text in find_all(operation, "textarea")))
    if name == INFER:
        shown(operation, 'tr[data-param-name="name"] input').send_keys("efficientnet_lite0", Keys.TAB)
    status, body = executed(docs, operation)
    assert status == 200, body


@pytest.mark.slow
def test_every_option_is_there_once_empty_and_of_this_model(docs, service):
    options = [option["name"] for option in requests.get(service.url + "/info", timeout=10).json()["model"]["options"]]
    for name in (PREDICT, BATCH):
        operation = opened(docs, name)
        rows = [row.get_attribute("data-property-name") or row.get_attribute("data-param-name")
                for row in find_all(operation, "[data-param-name], [data-property-name]")]
        file = "file" if name == PREDICT else "files"
        stream = ["stream"] * (name == PREDICT)
        assert [row for row in rows if row] == [*options, *stream, "X-Request-Timeout", file]
        fields = find_all(operation, ".parameters-container input, .parameters-container select")
        assert {field.get_property("value") for field in fields} == {""}
        assert [[option.text for option in find_all(field, "option")] for field in fields
                if field.tag_name == "select"] == (3 + len(stream)) * [["--", "true", "false"]]


@pytest.mark.slow
def test_a_phone_shows_every_operation_without_scrolling_sideways(docs):
    resize(docs, PHONE)
    for control in find_all(docs, ".opblock-summary-control"):
        docs.execute_script("arguments[0].click()", control)
    wait(docs, lambda: len(find_all(docs, ".execute")) == len(find_all(docs, ".opblock")))
    operation = shown(docs, BATCH)
    choose_type(operation, "application/json")
    executed(docs, operation)
    assert not scrolls_sideways(docs)
