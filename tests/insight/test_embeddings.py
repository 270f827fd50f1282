"""Embeddings are torch's vectors before the head, by command and by HTTP."""
import base64
import dataclasses
import errno
import io
import json
import os
import stat
import sys

import numpy as np
import pytest
from conftest import encoded, photo
from PIL import Image
from urllib3 import encode_multipart_formdata

from app import cli, create_app
from app.insight import embeddings

CAT, COFFEE = encoded(photo("chelsea"), "JPEG"), encoded(photo("coffee"))


@pytest.fixture(scope="module")
def by_torch():
    """by_torch(file's bytes): the vector before EfficientNet-Lite0's last layer, by torch."""
    import torch

    from app.engine.preprocess import Preprocessing
    from app.prepare import networks
    network = networks.load_classifier("efficientnet_lite0", networks.lite0_weights_path(), False, None)
    module, seen = network.module.eval(), []
    module._fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def vector(data):
        with Image.open(io.BytesIO(data)) as image, torch.inference_mode():
            module(torch.from_numpy(Preprocessing(*vars(network.preprocessing).values())(image.convert("RGB")))[None])
        return seen.pop()[0].numpy()
    return vector


@pytest.fixture
def run(command, app, settings):
    return lambda *arguments, **variables: command(arguments, {
        "MODEL_NAME": "efficientnet_lite0", "MODEL_DIR": settings.model_dir, **variables})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    (folder / "cat.jpg").write_bytes(CAT)
    (folder / "coffee.png").write_bytes(COFFEE)
    (folder / "turned.png").write_bytes(encoded(photo("chelsea").rotate(8)))
    return folder


def post(client, *files, path="/embed", **options):
    body, content_type = encode_multipart_formdata([*[("files", file) for file in files], *options.items()])
    return client.post(path, data=body, content_type=content_type)


# --- HTTP ---

def test_the_vectors_are_those_of_torch(client, by_torch):
    response = post(client, ("cat.jpg", CAT), ("coffee.png", COFFEE))
    assert response.status_code == 200
    body = response.json
    results = body.pop("results")
    assert body == {"status": "success", "model": "efficientnet_lite0", "size": 1280, "normalized": False, "count": 2,
                    "failed": 0}
    assert [(r["index"], r["filename"], r["status"]) for r in results] == [
        (0, "cat.jpg", "success"), (1, "coffee.png", "success")]
    for result, data in zip(results, (CAT, COFFEE), strict=True):
        assert result["embedding"] == pytest.approx(by_torch(data).tolist(), abs=1e-4)


def test_normalized(client, by_torch):
    found = np.array(post(client, ("cat.jpg", CAT), normalize="true").json["results"][0]["embedding"])
    expected = by_torch(CAT)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
    assert found == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)


def test_every_form_of_an_upload(client):
    b64 = base64.b64encode(CAT).decode()
    expected = post(client, ("cat.jpg", CAT)).json["results"][0]["embedding"]
    for response in (client.put("/embed?normalize=false", data=CAT, content_type="image/jpeg"),
                     client.post("/embed", data=CAT, content_type="application/octet-stream"),
                     client.post("/embed", json={"image": b64}),
                     client.post("/embed", json={"instances": [{"b64": b64}]}),
                     client.post("/models/efficientnet_lite0/embed", json={"image": b64})):
        assert response.status_code == 200
        assert response.json["results"][0]["embedding"] == expected


def test_a_bad_file_does_not_affect_the_others(client):
    body = post(client, ("a.txt", b"no picture"), ("cat.jpg", CAT)).json
    assert (body["count"], body["failed"]) == (2, 1)
    bad, good = body["results"]
    assert sorted(bad) == ["error", "filename", "index", "message", "status"]
    assert (bad["error"], len(good["embedding"])) == ("INVALID_IMAGE", 1280)
    response = post(client, ("a.txt", b"no picture"))
    assert (response.status_code, response.json["error"]) == (422, "ALL_FAILED")
    assert response.json["results"][0]["error"] == "INVALID_IMAGE"


@pytest.mark.parametrize(("request_", "status", "code"), [
    ({"path": "/embed", "data": b""}, 400, "MISSING_FILE"),
    ({"path": "/embed?normalize=perhaps", "data": CAT, "content_type": "image/jpeg"}, 400, "INVALID_PARAMETER"),
    ({"path": "/models/nobody/embed", "data": CAT, "content_type": "image/jpeg"}, 404, "NOT_FOUND"),
    ({"path": "/embed", "data": b"text", "content_type": "text/plain"}, 415, "UNSUPPORTED_MEDIA_TYPE")])
def test_errors(client, request_, status, code):
    response = client.post(request_.pop("path"), **request_)
    assert (response.status_code, response.json["error"]) == (status, code)
    assert set(response.json) == {"status", "error", "message", "request_id"}


def test_at_most_a_batch(client):
    response = post(client, *[("a.jpg", b"x")] * 33)
    assert (response.status_code, response.json["error"]) == (400, "TOO_MANY_FILES")


def test_it_is_listed_and_documented(client):
    assert "/embed" in client.get("/").json["endpoints"]
    paths = client.get("/openapi.json").json["paths"]
    assert '"top_k"' not in json.dumps(paths["/embed"])
    assert '"normalize"' in json.dumps(paths["/embed"])
    assert set(paths["/embed"]) == set(paths["/models/{name}/embed"]) == {"post", "put"}


def test_every_file_counts_against_the_rate_limit(app, settings):
    limited = create_app(dataclasses.replace(settings, rate_limit="3/hour"), app.extensions["model"]).test_client()
    assert post(limited, ("a.jpg", CAT), ("b.jpg", CAT)).status_code == 200
    assert post(limited, ("a.jpg", CAT), ("b.jpg", CAT)).status_code == 429


def test_cached_embeddings_are_not_predictions(app, settings):
    cached = create_app(dataclasses.replace(settings, cache_url="memory://"), app.extensions["model"]).test_client()
    first = post(cached, ("a.jpg", CAT)).json["results"][0]["embedding"]
    predicted = cached.post("/predict?embedding=true&explain=false", data=CAT, content_type="image/jpeg").json
    assert predicted["predictions"][0]["class"] == "tiger cat"
    assert predicted["metadata"]["embedding"] == pytest.approx(first, abs=1e-6)
    assert first == [float(f"{number:.7g}") for number in first]
    assert post(cached, ("a.jpg", CAT)).json["results"][0]["embedding"] == first


# --- the command line ---

@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_embed_writes_a_file_that_similar_reads(run, folder, tmp_path, by_torch, suffix):
    out = tmp_path / f"found.{suffix}"
    code, said, err = run("embed", folder, folder / "cat.jpg", "--out", out)  # which is in the folder already
    assert (code, err, said) == (0, "", f"3 embeddings of 1280 numbers: {out}\n")
    found = embeddings.read(out)
    assert found.paths == [str(folder / name) for name in ("cat.jpg", "coffee.png", "turned.png")]
    assert (found.vectors.dtype, found.model, found.normalized) == (np.float32, "efficientnet_lite0", False)
    assert found.vectors[0] == pytest.approx(by_torch(CAT), abs=1e-4)
    code, said, _ = run("similar", folder / "turned.png", out, "--json", "--top", "2")
    first, second = map(json.loads, said.splitlines())
    assert (code, first["file"], second["file"]) == (0, str(folder / "turned.png"), str(folder / "cat.jpg"))
    assert first["similarity"] == pytest.approx(1, abs=1e-5)


def test_files_have_what_other_programs_read(run, folder, tmp_path):
    import pyarrow.parquet
    assert run("embed", folder, "--out", tmp_path / "a.npz", "--normalize")[0] == 0
    assert run("embed", folder, "--out", tmp_path / "a.parquet", "--normalize")[0] == 0
    with np.load(tmp_path / "a.npz") as file:
        assert sorted(file) == ["embeddings", "model", "normalized", "paths", "precision", "preprocessing",
                                "weights_sha256"]
        rows, preprocessing = file["embeddings"], json.loads(str(file["preprocessing"]))
        assert (str(file["precision"]), preprocessing["crop"]) == ("fp32", 224)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), rows)
    assert table.schema.metadata[b"normalized"] == b"true"
    assert table.schema.metadata[b"precision"] == b"fp32"
    assert json.loads(table.schema.metadata[b"preprocessing"]) == preprocessing


def test_similar_compares_what_can_be_compared(run, folder, tmp_path):
    out, cat = tmp_path / "a.npz", folder / "cat.jpg"
    assert run("embed", folder, "--out", out)[0] == 0
    found = embeddings.read(out)
    first = run("similar", cat, out)
    assert (first[0], first[2]) == (0, "")
    embeddings.write_npz(out, dataclasses.replace(found, precision=None, preprocessing=None))  # of an earlier version
    assert run("similar", cat, out) == first
    for write in (embeddings.write_npz, embeddings.write_parquet):
        out = out.with_suffix(".parquet" if write is embeddings.write_parquet else ".npz")
        write(out, dataclasses.replace(found, precision="int8"))
        code, said, err = run("similar", cat, out)
        assert (code, said) == first[:2]
        assert err.startswith("note: these embeddings were made with int8, the picture's with fp32")
        write(out, dataclasses.replace(found, preprocessing='{"crop": 99}'))
        code, said, err = run("similar", cat, out)
        assert (code, said) == (1, "")
        assert 'with other preprocessing, {"crop": 99}: make them again with embed' in err


@pytest.mark.parametrize(("error", "code", "message"), [
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "error: {} cannot be written: No space left on device")])
def test_an_embed_that_cannot_go_on_leaves_nothing(run, folder, tmp_path, monkeypatch, capsys, error, code, message):
    out, seen, answers = tmp_path / "a.npz", [], cli.answers

    def interrupted(*arguments, **more):
        for number, one in enumerate(answers(*arguments, **more)):
            if number == 2:
                seen.extend(path.name for path in tmp_path.iterdir())
                raise error
            yield one
    monkeypatch.setattr(cli, "answers", interrupted)
    monkeypatch.setattr("app.__main__.end", sys.exit)  # not without unwinding, as it ends the process at once
    out.write_bytes(b"what was there before")
    with pytest.raises(SystemExit) as ended:
        run("embed", folder, "--out", out)
    assert ended.value.code == code
    assert capsys.readouterr().err == message.format(out) + "\n"
    assert seen == ["a.npz"]  # so that nothing is left, however the process ends
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert out.read_bytes() == b"what was there before"


def test_similar_to_a_folder(run, folder, by_torch):
    code, out, _ = run("similar", folder / "cat.jpg", folder)
    rows = [line.split() for line in out.splitlines()]
    assert (code, [path for _, path in rows]) == (0, [str(folder / "turned.png"), str(folder / "coffee.png")])
    cat, coffee = by_torch(CAT), by_torch(COFFEE)
    assert float(rows[1][0]) == pytest.approx(cat @ coffee / np.linalg.norm(cat) / np.linalg.norm(coffee), abs=1e-3)


def test_failures_are_listed_and_counted(run, folder, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    code, out, err = run("embed", tmp_path / "bad.jpg", folder / "cat.jpg", "--out", tmp_path / "a.npz")
    assert (code, out.startswith("1 embedding of")) == (1, True)
    assert "bad.jpg: INVALID_IMAGE: " in err
    assert "1 of 2 files failed" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "bad.jpg"]


def test_a_suffix_in_upper_case(run, folder, tmp_path):
    before = os.umask(0o027)
    try:
        code, _, err = run("embed", folder / "cat.jpg", "--out", tmp_path / "X.NPZ")
    finally:
        os.umask(before)
    assert (code, err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["X.NPZ"]
    assert embeddings.read(tmp_path / "X.NPZ").vectors.shape == (1, 1280)
    assert stat.S_IMODE((tmp_path / "X.NPZ").stat().st_mode) == 0o640


def test_files_that_embed_has_not_written(run, tmp_path, folder, app):
    import pyarrow
    from pyarrow import parquet
    found = embeddings.Embeddings(["a"], np.ones((1, 3), np.float32), "efficientnet_lite0", "0" * 64, False)
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    embeddings.write_npz(good, found)
    data = good.read_bytes()

    def refused(path, text="is neither a folder nor a file that embed has written (the picture comes first)"):
        with pytest.raises(cli.CommandError) as e:
            embeddings.read(path)
        assert str(e.value) == f"{path} {text}"
    for damaged in (data[:-40], data[:len(data) // 2], data[:4], b"PK\3\4" + bytes(100)):
        bad.write_bytes(damaged)
        refused(bad)
    packed = io.BytesIO()
    np.savez_compressed(packed, paths=np.array(["a"] * 99), embeddings=np.ones((99, 99), np.float32))
    data = bytearray(packed.getvalue())
    at = data.index(b"embeddings.npy") + 60
    data[at:at + 40] = b"\xff" * 40
    bad.write_bytes(data)
    refused(bad)
    with open(bad, "wb") as file:
        np.save(file, np.ones(3))
    refused(bad)
    embeddings.write_npz(bad, dataclasses.replace(found, vectors=np.full((1, 3), np.nan, np.float32)))
    refused(bad)
    other = tmp_path / "other.parquet"
    for column in ([1.0], [[1.0]], ["x"]):
        table = pyarrow.table({"path": ["a"], "embedding": column})
        for about in (None, {"model": "m", "weights_sha256": "0", "normalized": "true"}):
            parquet.write_table(table.replace_schema_metadata(about), other)
            refused(other)
    weights = app.extensions["model"].current.task.manifest.weights["sha256"]
    embeddings.write_npz(good, dataclasses.replace(found, weights_sha256=weights))
    code, out, err = run("similar", folder / "cat.jpg", good)
    assert (code, out) == (1, "")
    assert err == (f"error: {good} has embeddings of 3 numbers, but those of efficientnet_lite0 have 1280: make them "
                   "again with embed\n")


def test_what_cannot_be_done_is_refused_in_one_line(run, folder, tmp_path, monkeypatch):
    (tmp_path / "x.npz").write_bytes(b"nonsense")
    (tmp_path / "folder.npz").mkdir()
    np.savez(tmp_path / "other.npz", paths=np.array(["a"]), embeddings=np.ones((1, 1280), np.float32), model="resnet50",
             weights_sha256="0" * 64, normalized=False)
    for arguments, message in [
            (["embed", folder, "--out", tmp_path / "a.csv"], "--out must end in .npz or .parquet, got a.csv"),
            (["embed", folder, "--out", tmp_path / "no/a.npz"], "cannot be written: No such file or directory"),
            (["embed", folder, "--out", tmp_path / "folder.npz"], "cannot be written: Is a directory"),
            (["similar", folder / "cat.jpg", tmp_path / "x.npz"], "neither a folder nor a file that embed has written"),
            (["similar", folder / "cat.jpg", tmp_path / "gone.npz"], "does not exist"),
            (["similar", folder / "cat.jpg", tmp_path / "other.npz"], "has embeddings of resnet50 with weights 000000"),
            (["similar", folder / "cat.jpg", folder, "--top", "0"], "--top must be at least 1, got 0"),
            (["similar", folder, folder / "cat.jpg"], "is a folder: the picture comes first"),
            (["similar", tmp_path / "other.npz", folder / "cat.jpg"], "(the picture comes first)")]:
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert err.startswith("error: ")
        assert message in err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = run("embed", folder, "--out", tmp_path / "a.parquet")
    assert (code, "pip install -r app/insight/requirements.txt" in err) == (1, True)
