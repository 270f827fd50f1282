"""POST /predict: the answer's shape, and the status and code of every bad input."""
import base64
import io
import re

import pytest
from conftest import encoded, photo, post

from app import create_app

CAT = encoded(photo("chelsea"), "JPEG")


def error_of(response):
    """(status, code) of an error in the one shape, and nothing else."""
    body = response.json
    assert sorted(body) == ["error", "message", "request_id", "status"]
    assert body["status"] == "error"
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert "Traceback" not in body["message"]
    return response.status_code, body["error"]


def test_answer_has_the_contracts_shape(client):
    response = post(client, CAT, "cat.jpg", top_k=3)
    assert response.status_code == 200
    body = response.json
    assert body["status"] == "success"
    assert [sorted(p) for p in body["predictions"]] == [["class", "class_id", "confidence"]] * 3
    assert body["predictions"][0]["class"] == "tiger cat"
    assert body["predictions"][0]["class_id"] == 282
    metadata = body["metadata"]
    assert metadata["filename"] == "cat.jpg"
    assert metadata["model"] == "efficientnet_lite0"
    assert metadata["device"] == "cpu"
    assert metadata["image_size"] == [451, 300]
    assert list(metadata["timings_ms"]) == ["read", "queue", "decode", "preprocess", "inference"]
    assert 0 < metadata["inference_time"] < 10
    timing = dict(re.findall(r"(\w+);dur=([\d.]+)", response.headers["Server-Timing"]))
    assert {k: float(v) for k, v in timing.items()} == metadata["timings_ms"]


@pytest.mark.parametrize(("options", "count"), [({}, 5), ({"top_k": 1}, 1), ({"top_k": 10}, 10), ({"top_k": ""}, 5)])
def test_top_k(client, options, count):
    assert len(post(client, CAT, **options).json["predictions"]) == count


def test_top_k_in_the_query(client):
    assert len(post(client, CAT, path="/predict?top_k=2").json["predictions"]) == 2


@pytest.mark.parametrize("top_k", ["0", "11", "20", "-1", "abc", "1.5", "1e1", "٣", "9" * 5000])
def test_bad_top_k_is_named(client, top_k):
    response = post(client, CAT, top_k=top_k)
    assert error_of(response) == (400, "INVALID_PARAMETER")
    assert response.json["message"] == f"top_k must be an integer from 1 to 10, got {top_k[:40]}"


CAT_64 = base64.b64encode(CAT).decode()


@pytest.mark.parametrize(("name", "message"), [
    ("topk", "topk is not an option of any model; did you mean top_k?"),
    ("Top_K", "Top_K is not an option of any model; did you mean top_k?"),
    ("embeding", "embeding is not an option of any model; did you mean embedding?"),
    ("usetta", "usetta is not an option of any model; did you mean use_tta?"),  # ocean's
    ("sream", "sream is not an option of any model; did you mean stream?"),
    ("language", "language is not an option of any model; there are at, embedding, explain, explain_class, frames, "
                 "normalize, stream, top_k"),
    ("n\u00f6", "n\\xf6 is not an option of any model; there are at, embedding, explain, explain_class, frames, "
               "normalize, stream, top_k"),
])
def test_an_option_that_no_model_knows_is_refused_however_it_is_sent(client, name, message):
    for answer in (client.post("/predict", query_string={name: "2"}, data=CAT, content_type="image/jpeg"),
                   post(client, CAT, **{name: "2"}),
                   client.post("/predict", json={"image": CAT_64, name: 2}),
                   client.post("/predict/batch", json={"instances": [CAT_64], name: 2}),
                   client.post("/embed", query_string={name: ""}, data={"file": (io.BytesIO(CAT), "cat.jpg")}),
                   client.post("/predict", query_string={name: "2", "stream": "on"}, data=CAT,
                               content_type="image/jpeg"),
                   client.post("/predict", query_string={name: "2", "stream": "on"}, data=b"",
                               content_type="multipart/x-mixed-replace; boundary=b")):
        assert error_of(answer) == (400, "INVALID_PARAMETER")
        assert answer.json["message"] == message


def test_options_of_other_models_and_what_gateways_send_are_ignored(client):
    ignored = {"method": "face", "use_tta": "1", "stream": "", "signature_name": "serving_default", "filename": "a.jpg",
               "_": "17", "_csrf": "x", "api_key": "x", "submit": "Send", "callback_url": "https://example.org/"}
    for answer in (client.post("/predict", query_string={"top_k": 2, **ignored}, data=CAT, content_type="image/jpeg"),
                   post(client, CAT, top_k=2, **ignored),
                   client.post("/predict", json={"image": CAT_64, "video": None, "topk": None, "top_k": 2, **ignored})):
        assert len(answer.json["predictions"]) == 2


@pytest.mark.parametrize("field", ["file", "image", "video", "data"])
def test_usual_field_names_are_taken(client, field):
    response = client.post("/predict", data={field: (io.BytesIO(CAT), "cat.jpg")})
    assert response.json["predictions"][0]["class"] == "tiger cat"


@pytest.mark.parametrize("filename", ["../../etc/passwd", "C:\\\\photos\\\\passwd", "/passwd"])
def test_filename_is_the_base_name(client, filename):
    assert post(client, CAT, filename).json["metadata"]["filename"] == "passwd"


def test_missing_file(client):
    for data in ({"top_k": "3"}, {"picture": "x"}):
        response = client.post("/predict", data=data, content_type="multipart/form-data")
        assert error_of(response) == (400, "MISSING_FILE")
        assert response.json["message"].startswith("No file provided")
    assert error_of(client.post("/predict")) == (400, "MISSING_FILE")


def test_empty_file(client):
    assert error_of(post(client, b"")) == (400, "EMPTY_FILE")


@pytest.mark.parametrize("data", [b"hello, I am a text\n" * 50, CAT[:len(CAT) // 2], CAT[:20], bytes(3000)])
def test_what_is_no_whole_picture(client, data):
    assert error_of(post(client, data, "photo.jpg")) == (400, "INVALID_IMAGE")


def test_too_many_pixels(app, settings):
    import dataclasses
    small = create_app(dataclasses.replace(settings, max_image_pixels=1000))
    assert error_of(post(small.test_client(), CAT)) == (413, "IMAGE_TOO_LARGE")


def test_file_over_the_limit(app, settings):
    import dataclasses
    small = create_app(dataclasses.replace(settings, max_file_size=len(CAT) - 1), app.extensions["model"]).test_client()
    assert error_of(post(small, CAT)) == (413, "FILE_TOO_LARGE")
    assert error_of(post(small, CAT + bytes(100_000))) == (413, "FILE_TOO_LARGE")  # refused by the body's length
    exact = create_app(dataclasses.replace(settings, max_file_size=len(CAT)), app.extensions["model"]).test_client()
    assert post(exact, CAT).status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/xml"])
def test_other_content_types(client, content_type):
    assert error_of(client.post("/predict", data=b"x=1", content_type=content_type)) == (415, "UNSUPPORTED_MEDIA_TYPE")


def test_multipart_without_boundary(client):
    assert error_of(client.post("/predict", data=CAT, content_type="multipart/form-data"))[0] == 400


def test_too_many_parts(client):
    body = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 10_000 + b"--x--\r\n"
    response = client.post("/predict", data=body, content_type="multipart/form-data; boundary=x")
    assert error_of(response) == (413, "FILE_TOO_LARGE")


def test_unknown_path_and_wrong_method(client):
    assert error_of(client.get("/nothing")) == (404, "NOT_FOUND")
    response = client.get("/predict")
    assert error_of(response) == (405, "METHOD_NOT_ALLOWED")
    assert response.headers["Allow"] == "OPTIONS, POST, PUT"
    assert response.json["message"] == "This path takes POST and PUT, not GET."
    assert "JOBS=on" in client.post("/jobs").json["message"]
    assert "HISTORY=on" in client.get("/history").json["message"]
    assert error_of(client.delete("/health")) == (405, "METHOD_NOT_ALLOWED")


@pytest.mark.parametrize("inbound", ["abc-123_x.Y", "x" * 128])
def test_request_id_is_kept(client, inbound):
    assert client.get("/live", headers={"X-Request-ID": inbound}).headers["X-Request-ID"] == inbound


@pytest.mark.parametrize("inbound", ["", "x" * 129, "a b", "é", "a/b"])
def test_other_request_ids_are_replaced(client, inbound):
    replaced = client.get("/live", headers={"X-Request-ID": inbound}).headers["X-Request-ID"]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", replaced)


def test_a_bug_is_a_500_without_details(settings, app, caplog):
    broken = create_app(settings, app.extensions["model"])

    @broken.get("/bug")
    def bug():
        raise RuntimeError("secret path /etc/secret")
    response = broken.test_client().get("/bug")
    assert error_of(response) == (500, "INTERNAL_ERROR")
    assert "secret" not in response.text
    assert "secret path" in caplog.text  # the stack trace is in the log
