"""V2's bodies: what is read, what is refused, and that nothing is allocated for what a request only declares."""
import itertools
import json
import tracemalloc

import numpy as np
import pytest

from app.api import long_texts
from app.errors import Deadline, DeadlineExceeded, ServiceError
from app.open_inference import request_body, response_body, tensors

SOON = Deadline(86_400)  # from the import: the tests may run much later


def body_of(*inputs, binary=b"", **members):
    """(body, header's text) of a request with these inputs as JSON, and binary data after it."""
    text = json.dumps({"inputs": inputs, **members}).encode()
    return text + binary, str(len(text)) if binary else None


def fp32(shape, data=None, name="tensor", size=None):
    return {"name": name, "datatype": "FP32", "shape": shape, **({} if data is None else {"data": data}),
            **({} if size is None else {"parameters": {"binary_data_size": size}})}


def read(*inputs, **more):
    return request_body.request(*body_of(*inputs, **more), SOON)


def refusal(call, *arguments, **more):
    with pytest.raises(ServiceError) as caught:
        call(*arguments, **more)
    assert caught.value.status == 400
    return caught.value.message


# --- what is read ---

@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [[1], [3], [2, 3], [2, 1, 3], [2, 2, 2, 2], [1, 1, 1]])
def test_numbers_flat_and_nested(shape, nested):
    array = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    tensor = read(fp32(shape, (array if nested else array.ravel()).tolist())).inputs[0]
    assert np.array_equal(tensor.array(SOON), array)


def test_numbers_of_many_pieces_are_those_that_json_reads(monkeypatch):
    monkeypatch.setattr(tensors, "PIECE", 13)
    monkeypatch.setattr(long_texts, "LOOK", 11)
    texts = ["1", "-2.5", "3e2", "4.25E-1", "0", "123456.75"]
    for number in range(1, 40):
        values = list(itertools.islice(itertools.cycle(texts), number))
        data = f'"data" :\n [{" ,".join(values)}]'
        text = f'{{"inputs": [{{"name": "a", "datatype": "FP32", "shape": [{number}], {data}}}]}}'
        tensor = request_body.request(text.encode(), None, SOON).inputs[0]
        assert np.array_equal(tensor.array(SOON), np.array(json.loads(f"[{','.join(values)}]"), np.float32))


def test_binary_numbers_and_texts_in_order():
    numbers = np.arange(6, dtype="<f4")
    texts = b"".join(len(one).to_bytes(4, "little") + one for one in (b"ab", b"", b"c"))
    request = read(fp32([2, 3], size=24), {"name": "t", "datatype": "BYTES", "shape": [3], "data": ["x", "y", "z"]},
                   {"name": "b", "datatype": "BYTES", "shape": [3, 1], "parameters": {"binary_data_size": len(texts)}},
                   binary=numbers.tobytes() + texts)
    assert np.array_equal(request.inputs[0].array(SOON), numbers.reshape(2, 3))
    assert request.inputs[1].elements() == ["x", "y", "z"]
    assert [bytes(one) for one in request.inputs[2].elements()] == [b"ab", b"", b"c"]


def test_uint8_numbers():
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [2, 2], "data": [[0, 255], [3.0, 4]]}
    array = read(tensor).inputs[0].array(SOON)
    assert array.dtype == np.uint8
    assert array.tolist() == [[0, 255], [3, 4]]


def test_data_within_texts_is_text():
    """Numbers are found by `"data": [`, which in a text has backslashes."""
    inner = json.dumps({"data": [1, 2, 3], "x": "\\"})
    request = read({"name": "t", "datatype": "BYTES", "shape": [2], "data": [inner, '\\"data": [1]']},
                   parameters={"data": '"data": [7, 8]'})
    assert request.inputs[0].elements() == [inner, '\\"data": [1]']
    assert request.parameters == {"data": '"data": [7, 8]'}


@pytest.mark.parametrize("look", [2, 7, 2**18])
def test_long_texts_are_those_that_json_reads(monkeypatch, look):
    monkeypatch.setattr(long_texts, "LOOK", look)
    long = "x" * request_body.LONG
    texts = [long, '"data": [1]' + long, '\\"' * 200, long + "\\", "ä€😀" * 100, "\\\\" * 200 + '"', "short",
             long + '",":[']
    for escaped in (True, False):
        tensor = {"name": "t", "datatype": "BYTES", "shape": [len(texts), 1], "data": [[one] for one in texts]}
        body = json.dumps({"inputs": [tensor], "parameters": {"a": long, long: "b"}}, ensure_ascii=escaped).encode()
        request = request_body.request(body, None, SOON)
        assert request.parameters == {"a": long, long: "b"}
        elements = request.inputs[0].elements()
        assert [one.value() if isinstance(one, tensors.Text) else one for one in elements] == texts
        assert sum(isinstance(one, tensors.Text) for one in elements) == len(texts) - 1


@pytest.mark.parametrize("content", [rb"\x", b"\xff", rb"\u12"])
def test_long_texts_that_cannot_be_decoded(content):
    body = b'{"inputs": [{"name": "t", "datatype": "BYTES", "shape": [1], "data": ["' + b"a" * 999 + content + b'"]}]}'
    assert "cannot be decoded" in refusal(request_body.request(body, None, SOON).inputs[0].elements()[0].value)


def test_members_of_a_request():
    request = read(fp32([1], [1]), id="seven", parameters={"binary_data_output": True, "top_k": 3}, outputs=[
        {"name": "a"}, {"name": "b", "parameters": {"binary_data": False, "classification": 4}}])
    assert request.id == "seven"
    assert request.outputs == [request_body.Output("a", True, 0), request_body.Output("b", False, 4)]
    assert request.parameters["top_k"] == 3
    assert read(fp32([1], [1])).outputs is None


# --- what is refused ---

@pytest.mark.parametrize(("shape", "data"), [
    ([2], [1]), ([2], [1, 2, 3]), ([2, 2], [[1, 2], [3]]), ([2, 2], [[1, 2, 3], [4]]), ([4], [[1, 2], [3, 4]]),
    ([2, 2], [[[1, 2], [3, 4]]]), ([0], []), ([2], []), ([2, 0], [[], []]), ([2**40], [1]), ([2**40, 2**40], [[1]]),
    ([], 1), ([1], 1), ([1], "1"), ([1], None), ([1], [None]), ([1], ["1"]), ([1], [True]), ([1], {}),
    ([1], [{}]), ([2], [1, "2"]), ([1], [1e39]), ([1], [-1e39]), ([1], [10**400])])
def test_wrong_numbers(shape, data):
    refusal(lambda: read(fp32(shape, data)).inputs[0].array(SOON))


@pytest.mark.parametrize("text", ["[1,,2]", "[1,2", "[1,2]]", "[1 2]", "[1,]", "[,1]", "[NaN,1]", "[1,Infinity]",
                                  "[01,2]", "[1.,2]", "[+1,2]", "[--1,2]", "[1e,2]", "[[1]2]", "[1[2]]", "[1],[2]",
                                  "[1e400,2]", "[.5,1]", "[1,2]3", "[1,2]]]", "[-,1]"])
@pytest.mark.parametrize("shape", ["[2]", "[1,2]", "[2,1]"])
def test_numbers_that_are_no_json(text, shape):
    body = f'{{"inputs": [{{"name": "a", "datatype": "FP32", "shape": {shape}, "data": {text}}}]}}'
    refusal(lambda: request_body.request(body.encode(), None, SOON).inputs[0].array(SOON))


@pytest.mark.parametrize("value", [-1, 256, 1.5, 1e300, 2**70])
def test_numbers_that_are_no_uint8(value):
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [2], "data": [1, value]}
    assert "pixels" in refusal(lambda: read(tensor).inputs[0].array(SOON))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_binary_numbers_that_are_not_finite(value):
    data = np.array([1, value], "<f4").tobytes()
    assert "not finite" in refusal(lambda: read(fp32([2], size=8), binary=data).inputs[0].array(SOON))


@pytest.mark.parametrize("value", [1_000_001, -1.1e6, 3e38, 10**20, 2**64, -2**70, 1e23])
def test_numbers_beyond_what_preprocessing_makes(value):
    """Of which a network would make others that are finite, but wrong."""
    assert "beyond ±1,000,000" in refusal(read(fp32([2], [1, value])).inputs[0].array, SOON)
    data = np.array([1, value], "<f4").tobytes()
    assert "beyond ±1,000,000" in refusal(read(fp32([2], size=8), binary=data).inputs[0].array, SOON)
    assert read(fp32([2], [1e6, -1_000_000])).inputs[0].array(SOON).tolist() == [1e6, -1e6]


@pytest.mark.parametrize("shape", [[1], [3], [2, 2], [2**40], [2**62, 2**62], [0]])
def test_binary_numbers_of_another_size(shape):
    assert "bytes" in refusal(lambda: read(fp32(shape, size=8), binary=bytes(8)).inputs[0].array(SOON))


@pytest.mark.parametrize(("shape", "data"), [
    ([1], b""), ([1], b"\x02\0\0\0a"), ([1], b"\x01\0\0\0ab"), ([2], b"\x01\0\0\0a"), ([1], b"\x01\0\0\0a\0\0\0\0"),
    ([1], b"\xff\xff\xff\xffabc"), ([1], b"\x01\0\0"), ([0], b"\0\0\0\0"), ([2**60], b"\0\0\0\0" * 3)])
def test_texts_that_are_cut_off(shape, data):
    tensor = {"name": "b", "datatype": "BYTES", "shape": shape, "parameters": {"binary_data_size": len(data)}}
    body, header = body_of(tensor)
    refusal(lambda: request_body.request(body + data, str(len(body)), SOON).inputs[0].elements())


@pytest.mark.parametrize(("shape", "data"), [([1], []), ([1], ["a", "b"]), ([1], [1]), ([1], "a"), ([1], [None]),
                                             ([2**60], ["a"]), ([1], {"a": "b"}), ([1], [["a"], ["b"]])])
def test_wrong_texts(shape, data):
    tensor = {"name": "b", "datatype": "BYTES", "shape": shape, "data": data}
    refusal(lambda: read(tensor).inputs[0].elements())


@pytest.mark.parametrize("shape", [None, 3, "3", [-1], [1.5], [True], ["1"], [[1]], [1] * 9, {}, [None], [2**63]])
def test_wrong_shapes(shape):
    assert "shape of tensor must be" in refusal(read, fp32(shape, [1]))


@pytest.mark.parametrize("datatype", [None, "", "fp32", "FLOAT", 1, []])
def test_wrong_datatypes(datatype):
    tensor = {"name": "a", "datatype": datatype, "shape": [1], "data": [1]}
    assert "datatype of a must be one of" in refusal(read, tensor)


@pytest.mark.parametrize("size", [-1, -2**70, 9, 2**62, 1.5, "8", True, [8], {}])
def test_wrong_binary_sizes(size):
    assert "binary_data_size of tensor" in refusal(read, fp32([2], size=size), binary=bytes(8))


def test_binary_data_and_the_header():
    tensor = fp32([2], size=8)
    assert "left of the body" in refusal(read, tensor, binary=bytes(9))
    assert "left of the body" in refusal(read, fp32([1], [1]), binary=bytes(1))
    assert "either data or" in refusal(read, fp32([1], [1], size=4), binary=bytes(4))
    assert "either data or" in refusal(read, fp32([1]))
    body, _ = body_of(tensor)
    assert request_body.HEADER_LENGTH in refusal(request_body.request, body, None, SOON)
    for text in ("-1", "", "x", "1.5", "9" * 30, str(len(body) + 9), "0x10", " 5", "٣"):
        assert request_body.HEADER_LENGTH in refusal(request_body.request, body, text, SOON)
    assert "JSON" in refusal(request_body.request, body, "5", SOON)
    assert "JSON" in refusal(request_body.request, body, "0", SOON)


@pytest.mark.parametrize("members", [
    {"inputs": None}, {"inputs": []}, {"inputs": {}}, {"inputs": [1]}, {"inputs": [{}]}, {"inputs": [{"name": 1}]},
    {"inputs": [fp32([1], [1]), fp32([1], [1])]}, {"id": 7}, {"id": "i" * 1001}, {"parameters": []}, {"parameters": 1},
    {"parameters": {"binary_data_output": "yes"}}, {"outputs": {}}, {"outputs": [1]}, {"outputs": [{}]},
    {"outputs": [{"name": "a"}, {"name": "a"}]}, {"outputs": [{"name": "a", "parameters": 1}]},
    {"outputs": [{"name": "a", "parameters": {"binary_data": 1}}]},
    {"outputs": [{"name": "a", "parameters": {"classification": -1}}]},
    {"outputs": [{"name": "a", "parameters": {"classification": True}}]},
    {"outputs": [{"name": "a", "parameters": {"shared_memory_region": "x"}}]},
    {"inputs": [{**fp32([1], [1]), "parameters": {"shared_memory_region": "x"}}]},
    {"inputs": [{**fp32([1], [1]), "parameters": [1]}]}])
def test_wrong_members(members):
    refusal(request_body.request, json.dumps({"inputs": [fp32([1], [1])], **members}).encode(), None, SOON)


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b'{"a": NaN}',
                                  b'{"inputs": ' + b"[" * 9000])
def test_bodies_that_are_no_json_object(body):
    refusal(request_body.request, body, None, SOON)


def test_more_parts_than_allowed():
    tensor = {"name": "b", "datatype": "BYTES", "shape": [20_000], "data": ["a"] * 20_000}
    assert "more than 10000" in refusal(read, tensor)
    assert "more than 10000" in refusal(request_body.request, b'""' * 20_100 + b"," + b" " * 2**21, None, SOON)


# --- time and memory ---

def peak_of(call, *arguments):
    """(what a call returns, the most bytes that were allocated meanwhile)."""
    tracemalloc.start()
    try:
        return call(*arguments), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BIG = b"1" * 2**23


@pytest.mark.parametrize(("body", "much"), [
    ('{"id": "@", "inputs": []}', "x"), ('{"id": "@"}', r"\""), ('{"@": 1}', "x"), ('{"inputs": [], "@": 1}', "x"),
    ('{"data"@: [1]}', " "), ('{"data": @[1]}', " "), ('{"data": @', "["), ('{"a": @}', "1"), ("{@}", " "),
    ('{"inputs": ["@', "x"), ('{"data": [@}', "1"), ('{"data": [[1@', " ")])
def test_little_besides_data_is_read_and_copied(body, much):
    body = body.replace("@", much * (2**23 // len(much))).encode()
    message, peak = peak_of(refusal, request_body.request, body, None, SOON)
    assert "more than 1048576 bytes besides numbers" in message
    assert peak < 2**21


@pytest.mark.parametrize("data", [b"[1]", b"[]", b"[[1],[2]]"])
def test_many_members_data(data):
    body = b'{"inputs": [' + b'"data": %b,' % data * 200_000 + b"]}"
    assert "more than 16 lists" in refusal(request_body.request, body, None, SOON)


def test_lists_of_numbers_are_counted():
    inputs = [fp32([1], [1], name=str(i)) for i in range(17)]
    assert len(read(*inputs[:16]).inputs) == 16
    assert "more than 16 lists" in refusal(read, *inputs)


@pytest.mark.parametrize("number", [b"1" * 2**17, b"0." + b"1" * 2**17, b"1e-" + b"1" * 2**17, b" " * 2**17 + b"1"])
@pytest.mark.parametrize("shape", [b"[3]", b"[1,3]"])
def test_long_numbers_and_gaps(number, shape):
    list_of = b"[%b]" if shape == b"[3]" else b"[[%b]]"
    body = b'{"inputs": [{"name": "a", "datatype": "FP32", "shape": %b, "data": ' % shape
    tensor = request_body.request(body + list_of % (b"1, 2, " + number) + b"}]}", None, SOON).inputs[0]
    message, peak = peak_of(refusal, tensor.array, SOON)
    assert "more than 65536 bytes" in message
    assert peak < 2**20


def test_a_text_over_the_limit_is_refused_uncopied():
    body = b'{"inputs": [{"name": "t", "datatype": "BYTES", "shape": [1], "data": ["' + BIG + b'"]}]}'
    with pytest.raises(ServiceError) as caught:
        peak_of(request_body.request, body, None, SOON, request_body.MOST_PARTS, 2**22)
    assert (caught.value.status, caught.value.code) == (413, "FILE_TOO_LARGE")
    request, peak = peak_of(request_body.request, body, None, SOON, request_body.MOST_PARTS, 2**23 + 2)
    assert peak < 2**20
    assert request.inputs[0].elements()[0].value() == BIG.decode()


def test_reading_ends_with_the_deadline():
    with pytest.raises(DeadlineExceeded):
        request_body.request(b'{"inputs": []}', None, Deadline(-1))

def test_nothing_is_allocated_for_declared_sizes():
    tracemalloc.start()
    try:
        for shape in ([2**40], [2**20, 2**20], [2**31 - 1]):
            for request in (read(fp32(shape, [1.0])), read(fp32(shape, [[1.0]])),
                            read(fp32(shape, size=8), binary=bytes(8))):
                refusal(request.inputs[0].array, SOON)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_numbers_let_other_threads_go_on(monkeypatch):
    """Half a million numbers are parsed in pieces, as json.loads lets no other thread run meanwhile."""
    sizes, loads = [], json.loads

    def noted(text, **options):
        sizes.append(len(text))
        return loads(text, **options)
    tensor = read(fp32([500_000], [0.123456789] * 500_000)).inputs[0]
    monkeypatch.setattr(tensors.json, "loads", noted)
    tensor.array(SOON)
    assert len(sizes) > 50
    assert max(sizes) <= tensors.PIECE + 100


def test_numbers_end_with_the_deadline():
    with pytest.raises(DeadlineExceeded):
        read(fp32([3], [1, 2, 3])).inputs[0].array(Deadline(-1))


# --- responses ---

def test_response_as_json_and_binary():
    values, texts = np.array([[0.5, -1], [2, 3]], np.float32), np.array([["a", "ä"], ["", "b"]], object)
    texts.flat = [one.encode() for one in texts.flat]
    made = response_body.response({"model_name": "m"}, [
        (request_body.Output("values", False), values), (request_body.Output("texts", True), texts),
        (request_body.Output("same", False), texts), (request_body.Output("bin", True), values)])
    members, rest = json.loads(made.body[:made.header_length]), made.body[made.header_length:]
    assert [one["name"] for one in members["outputs"]] == ["values", "texts", "same", "bin"]
    assert members["outputs"][0] == {"name": "values", "datatype": "FP32", "shape": [2, 2], "data": [0.5, -1, 2, 3]}
    assert members["outputs"][2]["data"] == ["a", "ä", "", "b"]
    expected = b"\x01\0\0\0a" + b"\x02\0\0\0" + "ä".encode() + b"\0\0\0\0" + b"\x01\0\0\0b"
    assert members["outputs"][1]["parameters"] == {"binary_data_size": len(expected)}
    assert rest == expected + values.astype("<f4").tobytes()


def test_response_without_binary_data_has_no_header():
    output = request_body.Output("values", False)
    made = response_body.response({"model_name": "m"}, [(output, np.zeros((1, 1), np.float32))])
    assert made.header_length is None
    assert json.loads(made.body)["outputs"][0]["data"] == [0]
