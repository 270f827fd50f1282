"""Every form in which a file may come, and what bad ones are told."""
import base64
import contextlib
import dataclasses
import gc
import gzip
import http.client
import io
import json
import random
import re
import socket
import time
import tracemalloc

import pytest
import requests
from conftest import encoded, photo, post
from urllib3 import encode_multipart_formdata
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import FormDataParser

from app import create_app
from app.api import json_body, long_texts, uploads
from app.api.uploads import FormParser, MemoryRequest
from app.errors import ServiceError

UNIT = 2**16  # bytes; a body is counted in pieces that double up to a megabyte

CAT = encoded(photo("chelsea"), "JPEG")
CAT_64 = base64.b64encode(CAT).decode()


@pytest.fixture(scope="module")
def answer(app):
    """What multipart/form-data is answered: the other forms must be answered the same."""
    return post(app.test_client(), CAT, "cat.jpg").json["predictions"]


def error_of(response):
    assert sorted(response.json) == ["error", "message", "request_id", "status"]
    return response.status_code, response.json["error"], response.json["message"]


def form(client, *parts, path="/predict"):
    """POST multipart/form-data; parts: (name, text) or (name, (filename, bytes))."""
    body, content_type = encode_multipart_formdata(parts)
    return client.post(path, data=body, content_type=content_type)


@pytest.mark.parametrize("content_type", ["image/jpeg", "image/x-any", "video/mp4", "application/octet-stream", None])
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_raw_body(client, answer, content_type, method):
    response = client.open("/predict", method=method, data=CAT, content_type=content_type)
    assert response.json["predictions"] == answer
    assert response.json["metadata"]["filename"] is None


@pytest.mark.parametrize("body", [
    {"image": CAT_64},
    {"file": CAT_64},
    {"image": f"data:image/jpeg;base64,{CAT_64}"},
    {"image": f"data:image/jpeg;charset=x;BASE64,{CAT_64}"},
    {"image": f"data:application/octet-stream;base64,{CAT_64}"},
    {"image": "\n".join(CAT_64[i:i + 76] for i in range(0, len(CAT_64), 76))},
    {"image": base64.urlsafe_b64encode(CAT).decode().rstrip("=")},
    {"image": {"b64": CAT_64}},
    {"instances": [{"b64": CAT_64}]},
    {"instances": [{"image_bytes": {"b64": CAT_64}}], "signature_name": "serving_default"},
    {"instances": [CAT_64]},
    {"image": CAT_64, "video": None, "top_k": None},
], ids=range(12))
def test_json(client, answer, body):
    assert client.post("/predict", json=body).json["predictions"] == answer


def post_parts(client, *parts, path="/predict", boundary="b--b"):
    """POST a form of (field, further headers, content) parts without file names."""
    body = b"".join(f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"{headers}\r\n\r\n'.encode()
                    + content + b"\r\n" for field, headers, content in parts) + f"--{boundary}--\r\n".encode()
    return client.post(path, data=body, content_type=f'multipart/form-data; boundary="{boundary}"')


def test_a_part_without_file_name_is_a_file_if_its_content_type_says_so(client, answer):
    for headers in ("\r\nContent-Type: image/jpeg", "\r\ncontent-type:IMAGE/JPEG\r\nX-Other: 1"):
        assert post_parts(client, ("file", headers, CAT)).json["predictions"] == answer
        response = post_parts(client, ("top_k", "", b"2"), ("image", headers, CAT), ("_note", "", b"x"))
        assert response.json["predictions"] == answer[:2]
        assert response.json["metadata"]["filename"] in (None, "")
    batch = post_parts(client, *[("files", "\r\nContent-Type: image/jpeg", CAT)] * 2, path="/predict/batch")
    assert [result["predictions"] for result in batch.json["results"]] == [answer] * 2
    word = CAT[:2] + b"\xff\xfe\0\x10filename=\"a\"xx" + CAT[2:]
    assert post_parts(client, ("file", "\r\nContent-Type: image/jpeg", word)).json["predictions"] == answer
    named = ("files", "; filename=\"a.jpg\"\r\nContent-Type: image/jpeg", CAT)
    batch = post_parts(client, ("files", "\r\nContent-Type: image/jpeg", CAT), named, path="/predict/batch")
    assert [result["filename"] for result in batch.json["results"]] == [None, "a.jpg"]
    large = CAT + bytes(2**20)  # more than Werkzeug allows text
    assert post_parts(client, ("file", "\r\nContent-Type: image/jpeg", large)).json["predictions"] == answer


def test_a_part_without_file_name_and_media_type_is_text(client):
    for headers in ("", "\r\nContent-Type: text/plain"):
        status, code, message = error_of(post_parts(client, ("file", headers, b"hello")))
        assert (status, code) == (400, "MISSING_FILE")
        assert "-F file=@photo.jpg" in message


def test_many_boundaries_in_a_body_without_file_names_cost_nothing(client):
    started = time.process_time()
    body = b"--b\r\n" * 10**6
    assert client.post("/predict", data=body, content_type="multipart/form-data; boundary=b").status_code in (400, 413)
    assert time.process_time() - started < 10


def test_json_of_a_vendors_type(client, answer):
    body = json.dumps({"image": CAT_64})
    assert client.post("/predict", data=body, content_type="application/vnd.api+json").json["predictions"] == answer


def test_base64_of_the_largest_file_fits(app, settings):
    exact = create_app(dataclasses.replace(settings, max_file_size=2 * 2**20), app.extensions["model"]).test_client()
    padded = CAT + bytes(2 * 2**20 - len(CAT))
    assert exact.post("/predict", json={"image": base64.b64encode(padded).decode()}).status_code == 200
    status, code, _ = error_of(exact.post("/predict", json={"image": base64.b64encode(padded + b"\0").decode()}))
    assert (status, code) == (413, "FILE_TOO_LARGE")


@pytest.mark.parametrize("top_k", [3, "3", 3.0])
def test_options_in_json(client, top_k):
    assert len(client.post("/predict", json={"image": CAT_64, "top_k": top_k}).json["predictions"]) == 3


def test_options_of_a_raw_body_are_in_the_query(client):
    assert len(client.post("/predict?top_k=2", data=CAT, content_type="image/jpeg").json["predictions"]) == 2


def test_an_option_in_the_body_wins_over_the_query(client):
    assert len(form(client, ("file", ("c.jpg", CAT)), ("top_k", "3"), path="/predict?top_k=2").json["predictions"]) == 3
    assert len(client.post("/predict?top_k=2", json={"image": CAT_64, "top_k": 3}).json["predictions"]) == 3


def test_a_repeated_option_is_refused(client):
    twice = (400, "INVALID_PARAMETER", "top_k must be sent once, not 2 times")
    cat = ("file", ("c.jpg", CAT))
    assert error_of(form(client, cat, path="/predict?top_k=2&top_k=2")) == twice
    assert error_of(form(client, cat, ("top_k", "1"), ("top_k", "1"))) == twice


@pytest.mark.parametrize(("top_k", "got"), [([1], "a list"), ({}, "an object"), (True, "true"), (1.5, "1.5"),
                                             ("abc", "abc"), (10**30, "1" + 30 * "0")])
def test_bad_option_in_json_is_named(client, top_k, got):
    status, code, message = error_of(client.post("/predict", json={"image": CAT_64, "top_k": top_k}))
    assert (status, code) == (400, "INVALID_PARAMETER")
    assert message.startswith("top_k must be ")
    assert message.endswith(f", got {got}")


def test_an_unchosen_file_input_beside_a_chosen_one(client, answer):
    assert form(client, ("file", ("", b"")), ("image", ("c.jpg", CAT))).json["predictions"] == answer
    assert error_of(form(client, ("file", ("", b""))))[:2] == (400, "MISSING_FILE")


def test_a_file_in_another_field_is_named(client):
    status, code, message = error_of(form(client, ("upload", ("c.jpg", CAT))))
    assert (status, code) == (400, "MISSING_FILE")
    assert message.startswith("No file provided: the form's file is in the field 'upload'; send the file as multipart/")


@pytest.mark.parametrize("value", ["@@@", "abcde", "data:image/png;base64,@", "data:image/png,abc", 5, True, [], ["x"],
                                   {"b64": None}, {"b64": "AAAA", "x": 1}, {"a": {"b": {"c": "AAAA"}}}, "é"])
def test_broken_base64(client, value):
    for body, field in (({"image": value}, "image"), ({"instances": [value]}, "instances[0]")):
        status, code, message = error_of(client.post("/predict", json=body))
        assert (status, code) == (400, "INVALID_PARAMETER")
        assert message.startswith(f"{field} must be base64, a base64 data: URL or ")


@pytest.mark.parametrize("url", ["data:text/plain;base64,aGVsbG8=", "data:,hello", "data:text/html,<b>",
                                 "DATA:application/pdf;base64,"])
def test_data_url_of_something_else(client, url):
    status, code, message = error_of(client.post("/predict", json={"image": url}))
    assert (status, code) == (415, "UNSUPPORTED_MEDIA_TYPE")
    assert "send one that holds image/" in message


@pytest.mark.parametrize(("body", "code", "says"), [
    (b"[1, 2]", "INVALID_JSON", "must be a JSON object, got a list"),
    (b"\"text\"", "INVALID_JSON", "got a string"),
    (b"null", "INVALID_JSON", "got null"),
    (b"7", "INVALID_JSON", "got a number"),
    (b"{\"image\": ", "INVALID_JSON", "cannot be parsed"),
    (b"", "INVALID_JSON", "cannot be parsed"),
    (b"\xff\xfe\xfd", "INVALID_JSON", "cannot be parsed"),
    (b"[" * 9_000, "INVALID_JSON", "cannot be parsed"),
    (b"{\"a\":" * 5000 + b"1" + b"}" * 5000, "INVALID_JSON", "cannot be parsed"),
    (b"{\"image\": " + b"{\"b64\":" * 3000 + b"\"AAAA\"" + b"}" * 3001, "INVALID_JSON", "cannot be parsed"),
    (b"{\"image\": \"AAAA\", \"x\": " + b"9" * 5000 + b"}", "INVALID_JSON", "cannot be parsed"),
    (b"{\"image\": \"\\ud800\"}", "INVALID_PARAMETER", "text that cannot be decoded"),
    (b"[" * 50_000, "INVALID_JSON", "more than 10000 lists, objects and members"),
    (b"{\"image\": \"AAAA\", \"top_k\": 1, \"top_k\": 2}", "INVALID_JSON", "'top_k' is repeated"),
    (b"{}", "MISSING_FILE", "No file provided: send the file as"),
    (b"{\"image\": null}", "MISSING_FILE", "No file provided: send the file as"),
    (b"{\"instances\": []}", "MISSING_FILE", "No file provided: the list instances is empty"),
    (b"{\"instances\": {\"b64\": \"AAAA\"}}", "INVALID_JSON", "instances must be a list"),
    (b"{\"instances\": [\"AAAA\", \"AAAA\"]}", "TOO_MANY_FILES", "send one, or all of them to /predict/batch"),
    (b"{\"image\": \"AAAA\", \"instances\": [\"AAAA\"]}", "TOO_MANY_FILES", "has image and instances; send one"),
    (b"{\"image\": \"\"}", "EMPTY_FILE", "The file sent as image is empty"),
    (b"{\"image\": \"aGVsbG8=\"}", "INVALID_IMAGE", "not a picture"),
])
def test_bad_json(client, body, code, says):
    status, found, message = error_of(client.post("/predict", data=body, content_type="application/json"))
    assert (status, found) == (400, code)
    assert says in message


def test_two_files_in_a_form(client):
    for names in (("file", "file"), ("file", "image")):
        status, code, message = error_of(form(client, *[(name, ("c.jpg", CAT)) for name in names]))
        assert (status, code) == (400, "TOO_MANY_FILES")
        assert "/predict/batch" in message


@pytest.mark.parametrize("name", ["image", "instances"])
def test_a_file_and_text_where_a_file_belongs(client, name):
    status, code, message = error_of(form(client, ("file", ("c.jpg", CAT)), (name, '{"b64": "AAAA"}')))
    assert (status, code) == (400, "TOO_MANY_FILES")
    assert f"leave {name} out" in message


def test_a_forgotten_at_sign_of_curl(client):
    status, code, message = error_of(form(client, ("file", "photo.jpg")))
    assert (status, code) == (400, "MISSING_FILE")
    assert message.startswith("No file provided")
    assert "-F file=@photo.jpg" in message


def test_curls_data_binary_without_a_type_is_told_what_to_add(client):
    response = client.post("/predict", data=CAT, content_type="application/x-www-form-urlencoded")
    status, code, message = error_of(response)
    assert (status, code) == (415, "UNSUPPORTED_MEDIA_TYPE")
    assert "add -H 'Content-Type: image/jpeg'" in message


def test_empty_raw_body(client):
    assert error_of(client.post("/predict", data=b"", content_type="image/jpeg"))[:2] == (400, "EMPTY_FILE")


@pytest.mark.parametrize("body", [
    b'{"image": "data:' + b"a" * 1_000_000 + b'"}',
    b'{"image": "data:image/png' + b";a" * 500_000 + b'"}',
    b'{"instances": [' + b"0," * 2_000_000 + b"0]}",
    b'{"image": ' + b"[" * 1_000_000 + b"}",
    b"{" + b",".join(b'"%d": 1' % i for i in range(9_000)) + b', "1": 1}',
    b"{" + b",".join(b'"%d": 1' % i for i in range(200_000)) + b', "1": 1}'],
    ids=["no comma", "parameters without end", "many instances", "deep", "repeated member", "many members"])
def test_json_that_is_made_to_take_long_is_refused_in_no_time(client, body):
    for path in ("/predict", "/predict/batch"):
        started = time.process_time()
        response = client.post(path, data=body, content_type="application/json")
        assert response.status_code in (400, 415, 422), response.json
        assert time.process_time() - started < 5  # it was minutes and hours


# --- large JSON, which is read in pieces ---

TEXTS = [base64.b64encode(bytes(range(256)) * 4).decode(), "data:image/png;base64," + "AAAA" * 99, "-_" * 150,
         "ä€😀" * 99, '\\"\n/' * 99, "\ud800" * 300, "\\u00e4\\" * 99, '", "a": [1]' * 30, " = " * 100, "", "a b"]


@pytest.fixture
def in_small_pieces(monkeypatch):
    """All JSON is large, and read in pieces that begin anywhere."""
    monkeypatch.setattr(json_body, "LARGE", 0)
    monkeypatch.setattr(json_body, "PIECE", 61)
    monkeypatch.setattr(long_texts, "LOOK", 61)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_large_json_is_what_json_reads(in_small_pieces, is_ascii, encoding):
    value = {"file": TEXTS, "instances": [{"b64": one, "n": [1, 2.5, None, [one]]} for one in TEXTS], "x": TEXTS,
             "y": {one: {one: [True]} for one in TEXTS}, "long" * 99: {"url": TEXTS[0]}}
    body = json.dumps(value, ensure_ascii=is_ascii, indent=1).replace("/", r"\/").encode(encoding, "surrogatepass")
    found = json_body.parse(body, 1000)
    assert isinstance(found["file"][0], long_texts.Text)
    assert isinstance(found["instances"][1]["n"][3][0], long_texts.Text)
    assert (found["x"], found["y"], found["long" * 99]) == (TEXTS, value["y"], {"url": TEXTS[0]})
    assert long_texts.whole(found) == value


@pytest.mark.parametrize("body", [
    '{"a": "@}', '{"a": "@\\"}', '{"a": @}', '{"@": 1, "@": 2}', '["@"]', '{"a": "@" "b"}', '"@', '{"a": 1@}', "{}@",
    '{"@": "\\x"}', '{"a": "@", "b": "\n"}', '{"a": "@", "b": 1 2}', '{"a": "@", "b": 1' + " " * 61 + "2}"])
def test_large_text_that_is_no_json_object(in_small_pieces, body):
    for much in ("a" * 999, '\\"' * 500, "\\\\" * 500):
        with pytest.raises(ServiceError) as caught:
            json_body.parse(body.replace("@", much).encode(), 1000)
        assert (caught.value.status, caught.value.code) == (400, "INVALID_JSON")


@pytest.mark.parametrize("sent", [
    "{}", "{}=", "{}==", " {}\n", "{}====", "data:image/png;base64,{}", "DATA:;a=b;BASE64, {}"])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 44, 45, 46, 400, 1001])
def test_base64_in_pieces(in_small_pieces, sent, size):
    data = bytes(i * i % 251 for i in range(size))
    for encoded_by in (base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes):
        text = encoded_by(data).decode()
        for value in (sent.format(text), sent.format(text.rstrip("=\n"))):
            body = json.dumps({"file": value + " " * 300}).replace("/", r"\/").encode()
            for one in (value, json_body.parse(body, 10)["file"]):
                assert json_body.from_base64(one, "file") == data


@pytest.mark.parametrize("text", ["{}A", "{}=A", "{}é", "{}@", "=={}", "{}=={}", "{}" + 20 * "=" + "{}", r"{}\ud800",
                                  "data:image/png,{}"])
def test_broken_base64_in_pieces(in_small_pieces, text):
    body = ('{"file": "' + text.replace("{}", "AAAA" * 300) + '"}').encode()
    with pytest.raises(ServiceError) as caught:
        json_body.from_base64(json_body.parse(body, 10)["file"], "file")
    assert (caught.value.status, caught.value.code) == (400, "INVALID_PARAMETER")


@pytest.mark.parametrize("text", [r"\x", r"\u12", r"\uD80x"])
def test_escapes_that_are_none_in_base64(in_small_pieces, text):
    body = b'{"file": "' + b"AAAA" * 300 + text.encode() + b'"}'
    with pytest.raises(ServiceError) as caught:
        json_body.from_base64(json_body.parse(body, 10)["file"], "file")
    assert (caught.value.status, caught.value.code) == (400, "INVALID_JSON")


@pytest.mark.parametrize("escape", [False, True])
def test_large_json_lets_other_threads_go_on(monkeypatch, escape):
    """Neither json.loads nor base64 gets much at once, as they let no other thread run meanwhile; nor is a text copied
    as a whole."""
    sizes, loads, decode = [], json.loads, base64.b64decode

    def noted(call):
        def measured(data, *arguments, **options):
            sizes.append(len(data))
            return call(data, *arguments, **options)
        return measured
    monkeypatch.setattr(json, "loads", noted(loads))
    monkeypatch.setattr(base64, "b64decode", noted(decode))
    data = bytes(2**21)
    text = base64.b64encode(data)
    text = text.replace(b"A", rb"\u0041", 2**17) if escape else text
    body = b'{"instances": ["' + text + b'"]' + b" " * 2**21 + b"}"
    tracemalloc.start()
    try:
        found = json_body.from_base64(json_body.parse(body, 10)["instances"][0], "file")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == data
    assert len(sizes) > 8
    assert max(sizes) <= long_texts.LOOK + 10
    assert peak < len(data) + 8 * long_texts.LOOK


@pytest.mark.parametrize("body", [
    b'{"a": ' + b"1" * 2**22 + b"}", b'{"a": [' + b"1 " * 2**21 + b"]}", b'{"a": "" ' + b'"" ' * 2**19 + b"}"],
    ids=["digits", "numbers without commas", "texts without commas"])
def test_much_that_is_no_long_text_is_refused_unparsed(monkeypatch, body):
    monkeypatch.setattr(json_body.json, "loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(ServiceError) as caught:
        json_body.parse(body, 10_000)
    assert caught.value.code == "INVALID_JSON"


def test_too_many_instances_are_counted_before_they_are_looked_at(client):
    response = client.post("/predict/batch", json={"instances": [0] * 5000})
    assert (response.status_code, response.json["error"]) == (400, "TOO_MANY_FILES")


DISPOSITION = b'Content-Disposition: form-data; name="file"; filename="c.jpg"'


def parts(*sent, boundary=b"b"):
    """A multipart body of parts, (headers, content), exactly as given."""
    return b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary, *part) for part in sent) + b"--%s--\r\n" % boundary


NESTED = parts((b'Content-Disposition: attachment; filename="c.jpg"', CAT), boundary=b"inner")
OF_FORM = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(("body", "content_type"), [
    (parts((DISPOSITION + b"\r\nX-A: " + b"a" * 100_000, CAT)), OF_FORM),
    (parts((DISPOSITION + b"\r\nX-A: a" * 5000, CAT)), OF_FORM),
    (parts((DISPOSITION + b"\r\nrubbish", CAT)), OF_FORM),
    (parts((DISPOSITION.replace(b"; ", b";\r\n "), CAT)), OF_FORM),
    (parts((DISPOSITION + b"\r\nContent-Length: 5", CAT)), OF_FORM),
    (parts((DISPOSITION + b'\r\nContent-Disposition: form-data; name="top_k"', CAT)), OF_FORM),
    (parts((b'Content-Disposition: form-data; name="a"; name="file"; filename="c.jpg"', CAT)), OF_FORM),
    (b"preamble\r\n" + parts((DISPOSITION, CAT)) + b"epilogue", OF_FORM),
    (parts((DISPOSITION, CAT)), 'multipart/form-data; boundary="b"'),
    (parts((DISPOSITION, CAT), boundary=b"b" * 70), "multipart/form-data; boundary=" + "b" * 70),
    (parts((DISPOSITION, CAT), boundary=b"b" * 71), "multipart/form-data; boundary=" + "b" * 71),
    (parts((DISPOSITION, CAT), boundary=b"b" * 3000), "multipart/form-data; boundary=" + "b" * 3000),
    (parts((DISPOSITION, CAT), (b"Content-Disposition: form-data", b"1")), OF_FORM),
    (parts((DISPOSITION, CAT), (b'Content-Disposition: form-data; name="_x"\r\nContent-Type: a/b; charset=zip', b"1")),
     OF_FORM),
], ids=["long header", "many headers", "header without colon", "folded header", "length of a part", "two dispositions",
        "two names", "around the parts", "quoted boundary", "boundary of 70", "boundary of 71", "boundary of 3000",
        "no name", "unknown charset"])
def test_odd_forms_in_which_the_file_is_certain(client, answer, body, content_type):
    response = client.post("/predict", data=body, content_type=content_type)
    assert response.json["predictions"] == answer
    assert response.json["metadata"]["filename"] == "c.jpg"


@pytest.mark.parametrize(("body", "content_type", "status", "code"), [
    (parts((b'Content-Disposition: form-data; name="file"\r\nContent-Type: multipart/mixed; boundary=inner', NESTED)),
     OF_FORM, 400, "MISSING_FILE"),
    (parts((DISPOSITION + b"\r\nContent-Type: multipart/mixed; boundary=inner", NESTED)),
     OF_FORM, 400, "INVALID_IMAGE"),
    (parts((DISPOSITION + b"\r\nContent-Type: multipart/mixed; boundary=b", parts((DISPOSITION, CAT)))),
     OF_FORM, 400, "TOO_MANY_FILES"),
    (parts((b'Content-Disposition: form-data; filename="c.jpg"', CAT)), OF_FORM, 400, "MISSING_FILE"),
    (parts((b'Content-Disposition: form-data; name=""; filename="c.jpg"', CAT)), OF_FORM, 400, "MISSING_FILE"),
    (parts((b"Content-Type: image/jpeg", CAT)), OF_FORM, 400, "MISSING_FILE"),
    (b"--b\r\n\r\n" + CAT + b"\r\n--b--\r\n", OF_FORM, 400, "MISSING_FILE"),
    (parts((b'Content-Disposition: form-data; name="top_k"\r\n' + DISPOSITION, CAT)), OF_FORM, 400, "MISSING_FILE"),
    (parts((DISPOSITION + b"\r\nX-A: " + b"a" * 600_000, CAT)), OF_FORM, 413, "FILE_TOO_LARGE"),
    (parts((DISPOSITION, CAT))[:-7], OF_FORM, 400, "MISSING_FILE"),
    (parts((DISPOSITION, CAT)), "multipart/form-data; boundary=", 400, "MISSING_FILE"),
    (parts((DISPOSITION, CAT)), "multipart/form-data; boundary=b; boundary=c", 400, "MISSING_FILE"),
    (parts((DISPOSITION, CAT)), "multipart/form-data; boundary=\xfc", 400, "MISSING_FILE"),
    (b"--b--\r\n", OF_FORM, 400, "MISSING_FILE"),
    (b"", OF_FORM, 400, "MISSING_FILE"),
    (parts((DISPOSITION + b"\r\nContent-Transfer-Encoding: base64", CAT_64.encode())), OF_FORM, 400, "INVALID_IMAGE"),
    (parts((DISPOSITION + b"\r\nContent-Encoding: gzip", gzip.compress(CAT))), OF_FORM, 400, "INVALID_IMAGE"),
    (parts((DISPOSITION, CAT)), "multipart/mixed; boundary=b", 415, "UNSUPPORTED_MEDIA_TYPE"),
], ids=["multipart as text", "multipart as file", "the same boundary within", "no name", "empty name", "no disposition",
        "no headers", "two dispositions", "header of 600 kB", "no end", "empty boundary", "two boundaries",
        "boundary not of ASCII", "only an end", "nothing", "base64 part", "compressed part", "multipart/mixed"])
def test_odd_forms_without_a_certain_file(client, body, content_type, status, code):
    assert error_of(client.post("/predict", data=body, content_type=content_type))[:2] == (status, code)


@pytest.mark.parametrize(("sent", "shown"), [
    (b'filename="../../etc/passwd"', "passwd"), (b"filename*=UTF-8''%2Fetc%2Fa%C3%A4.jpg", "aä.jpg"),
    (b'filename="a.jpg"; filename="/b.jpg"', "b.jpg"), (b'filename="<script>.jpg"', "<script>.jpg")])
def test_names_of_files_are_base_names(client, sent, shown):
    body = parts((b'Content-Disposition: form-data; name="file"; ' + sent, CAT))
    assert client.post("/predict", data=body, content_type=OF_FORM).json["metadata"]["filename"] == shown


PLAIN = (b'--B\r\nContent-Disposition: form-data; name="file"; filename="a b-1.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
         b"\xff\xd8--\r\n--C--\r\n\r\n--B--\r\n")


BIG = bytes(5 * 2**20)


@pytest.mark.parametrize(("old", "new"), [
    (b"", b""), (b"\xff", b"\r\n"), (b"\xff\xd8--\r\n--C--\r\n", b""), (b"\xd8", b"\r\n--B\r\n"),
    (b"\xd8", b"\n--B \r\n"), (b"\xd8", b"\n--B--\r\n"), (b"\xd8", b"\r--B--"), (b"\xd8", b"x--B--"),
    (b"C--\r\n", b""), (b"--B--\r\n", b"--B--"), (b"--B--\r\n", b"--B--\r\nepilogue"), (b"--B--\r\n", b"--B--\n"),
    (b"--B--\r\n", b"--B\r\n"), (b"--B--\r\n", b""), (b"--B\r\n", b"--B \r\n"), (b"--B\r\n", b"preamble\r\n--B\r\n"),
    (b"--B\r\n", b"--B\n"), (b"--B\r\n", b"--C\r\n"), (b"a b-1", b"a%22b"), (b"a b-1", b"a\\\"b"), (b"a b-1", b"a;b"),
    (b"a b-1", b""), (b"a b-1", b" a "), (b"a b-1", b"../a"), (b"a b-1", "ä".encode()), (b'"file"', b"file"),
    (b'"file"', b'"files[]"'), (b"; filename", b"; FileName"), (b'; filename="a b-1.jpg"', b""),
    (b"jpeg\r\n", b"jpeg; charset=x\r\n"), (b"jpeg\r\n", b"jpeg\r\n more: y\r\n"),
    (b"Content-Type: image/jpeg\r\n", b""), (b"\r\n\r\n\xff", b"\r\nContent-Length: 3\r\n\r\n\xff"),
    (b"\r\n\r\n\xff\xd8--\r\n--C--\r\n\r\n--B--", b"\r\n\r\n--B--"), (b"\r\n\r\n\xff", b"\r\n\xff"),
    (b"\r\n\r\n", b"\n\n")])
def test_the_short_way_through_a_plain_form_ends_where_werkzeugs_does(old, new):
    for body in (PLAIN.replace(old, new, 1), PLAIN.replace(old, new)):
        for boundary in ("B", "B ", "C", "", None, "ä", "."):
            assert parsed(FormParser, body, boundary) == parsed(FormDataParser, body, boundary)


def parsed(parser, body, boundary, mimetype="multipart/form-data"):
    """What is found in a form by a FormDataParser; the error if it is too large."""
    stream = io.BytesIO(body)
    try:
        _, form, files = parser(MemoryRequest({})._get_file_stream, max_form_memory_size=500_000).parse(
            stream, mimetype, len(body), {"boundary": boundary} if boundary is not None else {})
    except RequestEntityTooLarge as e:
        return e.code
    return stream.read(), form.to_dict(flat=False), [(name, file.name, file.filename, file.content_type, file.read())
                                                     for name, file in files.items(multi=True)]


class Noting(io.BytesIO):
    """Notes how much is written at once."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def write(self, data):
        self.sizes.append(len(data))
        return super().write(data)

    def writelines(self, pieces):
        for piece in pieces:
            self.write(piece)


@pytest.mark.parametrize("body", [PLAIN.replace(b"\xff", BIG), PLAIN.replace(b"jpeg\r\n", b"jpeg; a=b\r\n").replace(
    b"\xff", BIG), PLAIN.replace(b"\xff", BIG + PLAIN)], ids=["plain", "another head", "several files"])
def test_large_forms_are_copied_in_pieces(body):
    """A copy or search of a whole file would let no other thread run meanwhile."""
    made = []

    def stream_factory(*_, **__):
        made.append(Noting())
        return made[-1]
    FormParser(stream_factory).parse(io.BytesIO(body), "multipart/form-data", len(body), {"boundary": "B"})
    assert sum(len(one.getvalue()) for one in made) >= len(BIG)
    assert max(size for one in made for size in one.sizes) <= uploads.STEP
    assert parsed(FormParser, body, "B") == parsed(FormDataParser, body, "B")


@pytest.mark.parametrize("at", range(7))
def test_a_boundary_between_two_pieces_is_found(at):
    start = PLAIN.index(b"\xff")
    second = b'\r\n--B\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n'
    body = PLAIN[:start] + bytes(uploads.STEP - at) + second + bytes(uploads.STEP) + PLAIN[start:]
    assert parsed(FormParser, body, "B") == parsed(FormDataParser, body, "B")


@pytest.mark.parametrize(("boundary", "mimetype"), [
    (None, "multipart/form-data"), ("ä", "multipart/form-data"), ("é-1", "multipart/form-data"),
    ("a" * 71, "multipart/form-data"), ("(.*)+?", "multipart/form-data"), ("b--", "multipart/form-data"),
    ("--", "multipart/form-data"), ("a\r\nb", "multipart/form-data"), ("B", "image/jpeg"),
    ("B", "application/x-www-form-urlencoded"), ("B", "text/plain"), ("B", "multipart/mixed")])
def test_odd_boundaries_and_types_end_where_werkzeugs_do(boundary, mimetype):
    for name in {boundary or "None", boundary or ""}:
        for encoding in ("utf-8", "latin-1"):
            body = PLAIN.replace(b"--B", f"--{name}".encode(encoding))
            assert parsed(FormParser, body, boundary, mimetype) == parsed(FormDataParser, body, boundary, mimetype)


def test_a_head_that_werkzeug_refuses_is_refused():
    body = PLAIN.replace(b"a b-1", bytes(b"a" * 600_000))
    assert parsed(FormParser, body, "B") == parsed(FormDataParser, body, "B") == 413


def test_mutated_forms_end_where_werkzeugs_do():
    order, pieces, outcomes = random.Random(0), (
        b"\r\n", b"\n", b"\r", b"--", b"--B", b"--B--", b"\r\n--B\r\n", b"\r\n--B--\r\n", b'"', b";", b" ", b"\t",
        b"\0", b"\\", b"\xc3\xa4", b"filename*=utf-8''x", b"Content-Type: text/plain\r\n", b"\r\n\r\n", b":",
        PLAIN), set()
    for _ in range(3000):
        body = bytearray(PLAIN)
        for _ in range(order.randint(1, 3)):
            start = order.choice([0, order.randrange(len(body) + 1), body.find(b"\r\n", order.randrange(len(body)))])
            body[start:start + order.choice([0, 0, 1, 2, 9])] = order.choice(pieces) if order.random() < 0.8 else b""
        body = bytes(body)
        assert parsed(FormParser, body, "B") == parsed(FormDataParser, body, "B"), body
        outcomes.add(len(parsed(FormParser, body, "B")[2]))
    assert outcomes >= {0, 1, 2}


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "deflate, gzip", "identity, gzip"])
def test_a_compressed_body_is_refused_as_such(client, encoding, path):
    for body in (gzip.compress(CAT), CAT):
        status, code, message = error_of(client.post(path, data=body, content_type="image/jpeg",
                                                     headers={"Content-Encoding": encoding}))
        assert (status, code) == (415, "UNSUPPORTED_MEDIA_TYPE")
        assert message == f"Content-Encoding {encoding} is not accepted here; send the body uncompressed."
    plain = client.post(path, data=CAT, content_type="image/jpeg", headers={"Content-Encoding": "identity"})
    assert plain.status_code == 200


def statuses_of(service, sent):
    """The statuses of all answers on a connection on which these bytes are sent, until it is closed."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(sent)
        if not sent.endswith(HEALTH):  # which is not half a request; one whose client is gone is not calculated
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
OF_CAT = b"Content-Length: %d\r\n" % len(CAT)
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"  # not answered behind a body of doubtful end
IN_CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(CAT), CAT)


@pytest.mark.parametrize(("sent", "statuses"), [
    (HEAD + OF_CAT + b"\r\n" + CAT + HEALTH, [200, 200]),
    (HEAD + CHUNKED + b"\r\n" + IN_CHUNKS + HEALTH, [200, 200]),
    (HEAD + CHUNKED + OF_CAT + b"\r\n" + IN_CHUNKS + HEALTH, [400]),
    (HEAD + OF_CAT + CHUNKED + b"\r\n" + IN_CHUNKS + HEALTH, [400]),
    (HEAD + CHUNKED + CHUNKED + b"\r\n" + IN_CHUNKS + HEALTH, [400]),
    (HEAD + OF_CAT + b"Content-Length: 5\r\n\r\n" + CAT + HEALTH, [400]),
    (HEAD + b"Content-Length: -5\r\n\r\n" + CAT + HEALTH, [400]),
    (HEAD + b"Content-Length: +5\r\n\r\n" + CAT + HEALTH, [400]),
    (HEAD + b"Content-Length: 0x10\r\n\r\n" + CAT + HEALTH, [400]),
    (HEAD + b"Content-Length: 5 5\r\n\r\n" + CAT + HEALTH, [400]),
    (HEAD + b"Content-Length : 5\r\n\r\n" + CAT + HEALTH, [400]),
    (HEAD + b"Content-Length: 5\r\n\r\n" + CAT + HEALTH, [400, 400]),
    (HEAD + b"Content-Length: 900000\r\n\r\n" + CAT, [400]),
    (HEAD + CHUNKED + b"\r\n" + b"fffffffffffffffff\r\n" + CAT, [400]),
    (HEAD + CHUNKED + b"\r\n" + b"-5\r\n" + CAT, [400]),
    (HEAD + CHUNKED + b"\r\n" + b"5\r\n" + CAT, [400]),
], ids=["length", "chunks", "chunks and length", "length and chunks", "chunks twice", "two lengths", "negative length",
        "signed length", "hexadecimal length", "length of two", "space before the colon", "length too small",
        "length too large", "chunk too large", "negative chunk", "chunk too small"])
def test_where_a_body_ends_is_never_guessed(service, sent, statuses):
    workers = service.workers()
    assert statuses_of(service, sent) == statuses
    assert service.workers() == workers
    assert "Traceback" not in service.log


# --- memory ---

def metric(service, name):
    """The sum of a metric over its labels."""
    text = requests.get(service.url + "/metrics", timeout=10).text
    return sum(float(value) for value in re.findall(rf"^model_server_{name}(?:{{.*}})? (\S+)$", text, re.M))


def wait_until(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def send_part_of_a_megabyte(service, pieces):
    """A connection on which so many pieces of an upload were sent that should have 1 MB, which is 15.3 of them."""
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=10)
    connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
                       b"Content-Length: 1000000\r\n\r\n" + bytes(pieces * UNIT))
    return connection


def answer_on(connection):
    """(status, headers, JSON) of the answer that comes on a connection."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, answer.headers, json.loads(answer.read())


def test_what_arrives_together_with_a_body_belongs_to_the_next_request(service):
    request = (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nX-Request-ID: %d\r\n"
               b"Connection: %s\r\nContent-Length: 4\r\n\r\nbody")
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(b"".join(request % (i, b"close" if i == 2 else b"keep-alive") for i in range(3)))
        answers = connection.makefile("rb").read()
    assert re.findall(rb"HTTP/1.1 (\d+)|X-Request-ID: (\d)", answers) == [
        pair for i in range(3) for pair in ((b"400", b""), (b"", b"%d" % i))]


def test_beyond_the_memory_for_bodies_the_largest_is_refused_and_a_small_one_answered(start_service):
    service = start_service(MAX_BODY_MEMORY=str(16 * UNIT)).wait_ready()
    with contextlib.ExitStack() as stack:
        def hog(pieces, then_there):
            connection = stack.enter_context(send_part_of_a_megabyte(service, pieces))
            wait_until(lambda: metric(service, "body_bytes") == then_there * UNIT)
            return connection
        small = hog(6, then_there=6)  # each byte that has arrived counts
        large = hog(8, then_there=14)
        larger = hog(9, then_there=15)  # beyond 16, `large` was the largest
        refusals = [answer_on(large)]

        picture = CAT + bytes(5 * UNIT)
        assert service.predict(picture).json()["predictions"][0]["class"] == "tiger cat"
        refusals.append(answer_on(larger))
        assert [(status, body["error"]) for status, _, body in refusals] == [(503, "OVERLOADED")] * 2
        assert [headers["Retry-After"] for _, headers, _ in refusals] == ["5", "5"]
        assert metric(service, "overloaded_total") == 2
        wait_until(lambda: metric(service, "body_bytes") == 6 * UNIT)
        small.sendall(bytes(1_000_000 - 6 * UNIT))  # for which there is room again
        assert answer_on(small)[2]["error"] == "INVALID_IMAGE"
        wait_until(lambda: metric(service, "body_bytes") == 0)

    with send_part_of_a_megabyte(service, 5):
        wait_until(lambda: metric(service, "body_bytes") == 5 * UNIT)
    wait_until(lambda: metric(service, "body_bytes") == 0)  # also where the client leaves
    assert service.predict(CAT).status_code == 200


def test_a_body_that_is_alone_may_be_larger_than_the_memory_for_bodies(app, settings, answer):
    tight = create_app(dataclasses.replace(settings, max_body_memory=1000), app.extensions["model"]).test_client()
    assert post(tight, CAT).json["predictions"] == answer
    assert re.search(r"^model_server_body_bytes 0\.0$", tight.get("/metrics").text, re.M)


@pytest.mark.parametrize("cache_url", [None, "memory://"])
def test_a_refused_file_leaves_the_memory_without_waiting_for_the_garbage_collector(app, settings, cache_url):
    client = create_app(dataclasses.replace(settings, cache_url=cache_url, max_body_memory=1000),
                        app.extensions["model"]).test_client()

    def requests_in_memory():
        return sum(type(one) is MemoryRequest for one in gc.get_objects())
    gc.collect()
    before = requests_in_memory()
    gc.disable()
    try:
        for path in ("/predict", "/predict/batch"):
            assert post(client, b"no picture", path=path).status_code in (400, 422)
            with client.application.extensions["bodies"].one():  # it is not alone then
                assert post(client, CAT, path=path).status_code == 503
        wait_until(lambda: requests_in_memory() <= before)  # an earlier test's may leave meanwhile
    finally:
        gc.enable()
