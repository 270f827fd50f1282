"""What KServe's own client asks and is answered, as one JSON object on standard output.

Run by test_clients_v2.py in the environment of the clients: kserve_client.py URL MODEL PICTURE ARRAYS.npz
"""
import asyncio
import base64
import json
import sys
from pathlib import Path

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

URL, MODEL, PICTURE, ARRAYS = sys.argv[1:]
DATA = Path(PICTURE).read_bytes()
PIXELS, TENSOR = (np.load(ARRAYS)[name] for name in ("pixels", "tensor"))


def given(name, array, binary):
    tensor = InferInput(name, list(array.shape), {"u": "UINT8", "f": "FP32", "O": "BYTES"}[array.dtype.kind])
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


async def ask(client, tensor, outputs=(), identifier=None, **parameters):
    response = await client.infer(URL, InferRequest(
        MODEL, [tensor], identifier, parameters=parameters,
        request_outputs=[RequestedOutput(name, about) for name, about in outputs]), model_name=MODEL)
    found = {}
    for output in response.outputs:
        array = output.as_numpy()
        found[output.name] = [one.decode() if isinstance(one, bytes) else one for one in array.ravel()] if \
            output.datatype == "BYTES" else array.tolist()
    return {"id": response.id, "model": response.model_name, **found}


async def main():
    probabilities = [("probabilities", {"binary_data": True})]
    file, text = np.array([DATA], object), np.array([base64.b64encode(DATA)], object)
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        found = {"live": await client.is_server_live(URL), "ready": await client.is_server_ready(URL),
                 "model_ready": await client.is_model_ready(URL, MODEL),
                 "other_ready": await client.is_model_ready(URL, "other"),
                 "defaults": await ask(client, given("image", text, False), identifier="seven", top_k=2),
                 "file": await ask(client, given("image", file, True), probabilities),
                 "mixed": await ask(client, given("image", text, False), [
                     ("probabilities", {"binary_data": True}), ("labels", None), ("logits", None)], top_k=3),
                 "classes": await ask(client, given("image", file, True), [("probabilities", {"classification": 3})]),
                 "pixels": await ask(client, given("pixels", PIXELS, True), binary_data_output=True),
                 "tensor": await ask(client, given("tensor", TENSOR, False), [("logits", None)])}
        found["together"] = [one["probabilities"] for one in await asyncio.gather(
            *(ask(client, given("image", file, True), probabilities) for _ in range(4)))]
        for name, tensor, outputs in (("unknown_output", given("image", file, True), [("nothing", None)]),
                                      ("no_picture", given("image", np.array([b"text"], object), True), []),
                                      ("wrong_shape", given("tensor", TENSOR[:, :, :9], True), [])):
            try:
                found[name] = await ask(client, tensor, outputs)
            except httpx.HTTPStatusError as e:
                found[name] = [e.response.status_code, str(e)]
    print(json.dumps(found))


asyncio.run(main())
