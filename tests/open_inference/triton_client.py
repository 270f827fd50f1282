"""What Triton's own client asks and is answered, as one JSON object on standard output.

Run by test_clients_v2.py in the environment of the clients: triton_client.py URL MODEL PICTURE ARRAYS.npz
"""
import base64
import json
import sys
from pathlib import Path

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

URL, MODEL, PICTURE, ARRAYS = sys.argv[1:]
DATA = Path(PICTURE).read_bytes()
PIXELS, TENSOR = (np.load(ARRAYS)[name] for name in ("pixels", "tensor"))
client = InferenceServerClient(URL.removeprefix("http://"), concurrency=4)


def given(name, array, binary=True):
    tensor = InferInput(name, list(array.shape), {"u": "UINT8", "f": "FP32", "O": "BYTES"}[array.dtype.kind])
    return tensor.set_data_from_numpy(array, binary_data=binary)


def wanted(name, binary=True, classes=0):
    return InferRequestedOutput(name, binary_data=binary, class_count=classes)


def arrays(result):
    response, found = result.get_response(), {}
    for output in response["outputs"]:
        array = result.as_numpy(output["name"])
        found[output["name"]] = np.array([one.decode() if isinstance(one, bytes) else one for one in array.ravel()],
                                         object).reshape(array.shape).tolist() if array.dtype == object else \
            array.tolist()
    return {"id": response.get("id"), "model": response["model_name"], **found}


def ask(tensor, outputs=None, **more):
    return arrays(client.infer(MODEL, [tensor], outputs=outputs, **more))


def failure(call, *arguments, **more):
    try:
        return call(*arguments, **more)
    except InferenceServerException as e:
        return [e.status(), e.message()]


file, text = np.array([DATA], object), np.array([base64.b64encode(DATA)], object)
found = {
    "live": client.is_server_live(), "ready": client.is_server_ready(), "model_ready": client.is_model_ready(MODEL),
    "other_ready": client.is_model_ready("other"), "server": client.get_server_metadata(),
    "metadata": client.get_model_metadata(MODEL), "index": client.get_model_repository_index(),
    "defaults": ask(given("image", file), request_id="seven", parameters={"top_k": 2}),
    "text": ask(given("image", text, False), [wanted("probabilities", False)]),
    "mixed": ask(given("image", text, False), [wanted("probabilities"), wanted("labels", False), wanted("logits"),
                                               wanted("embedding", False), wanted("predictions")]),
    "classes": ask(given("image", file), [wanted("probabilities", classes=3), wanted("logits", False, 2)]),
    "pixels": ask(given("pixels", PIXELS), [wanted("probabilities"), wanted("embedding")]),
    "one_picture": ask(given("pixels", PIXELS[0]), [wanted("probabilities")]),
    "batch": ask(given("image", np.array([[DATA]] * 3, object)), [wanted("probabilities"), wanted("labels")]),
    "tensor": ask(given("tensor", TENSOR), [wanted("logits"), wanted("probabilities"), wanted("embedding")]),
    "tensor_as_json": ask(given("tensor", TENSOR, False), [wanted("logits", False)]),
    "unknown_output": failure(ask, given("image", file), [wanted("nothing")]),
    "no_picture": failure(ask, given("image", np.array([b"text"], object))),
    "wrong_shape": failure(ask, given("tensor", TENSOR[:, :, :9])),
    "wrong_option": failure(ask, given("image", file), parameters={"top_k": 99}),
    "unknown_model": failure(client.get_model_metadata, "other"),
    **{name: ask(given("image", file), [wanted("probabilities")], request_compression_algorithm=name,
                 response_compression_algorithm=name) for name in ("gzip", "deflate")},
    "load": failure(client.load_model, MODEL),
    "statistics": failure(client.get_inference_statistics, MODEL),
    "all_statistics": failure(client.get_inference_statistics), "config": failure(client.get_model_config, MODEL),
    "trace": failure(client.get_trace_settings, MODEL), "log": failure(client.get_log_settings),
    "shared_memory": failure(client.get_system_shared_memory_status),
    "cuda_memory": failure(client.get_cuda_shared_memory_status)}
later = [client.async_infer(MODEL, [given("image", file)], outputs=[wanted("probabilities")]) for _ in range(4)]
found["together"] = [arrays(one.get_result())["probabilities"] for one in later]
print(json.dumps(found))
