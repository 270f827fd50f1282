"""LitServe: one worker per core (workers_per_device), no batches, which gain nothing on a CPU.

One HTTP process instead of one for each worker, or fast_queue, made no difference.

    python -m bench.rivals.litserve_app WORKERS PORT
"""
import sys

import litserve
from PIL import Image


class ClassifierAPI(litserve.LitAPI):
    def setup(self, device):
        from bench.rivals import resnet50  # only in the workers: the HTTP processes do not need it
        self.model = resnet50()

    def decode_request(self, request):
        return self.model.preprocess(Image.open(request["file"].file))

    def predict(self, batch):
        return self.model.predict(batch)

    def encode_response(self, predictions):
        return {"predictions": predictions}


if __name__ == "__main__":
    workers, port = map(int, sys.argv[1:])
    server = litserve.LitServer(ClassifierAPI(), accelerator="cpu", workers_per_device=workers)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")
