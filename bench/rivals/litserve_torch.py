"""LitServe around torch: one worker per core.

    python -m bench.rivals.litserve_torch WORKERS PORT
"""
import sys

import litserve


class ClassifierAPI(litserve.LitAPI):
    def setup(self, device):
        from bench.rivals.resnet50 import ResNet50  # only in the workers: the HTTP process does not need it
        self.model = ResNet50()

    def decode_request(self, request):
        return self.model.preprocess(request["file"].file.read())

    def predict(self, batch):
        return self.model.predict(batch)

    def encode_response(self, predictions):
        return {"predictions": predictions}


if __name__ == "__main__":
    workers, port = map(int, sys.argv[1:])
    server = litserve.LitServer(ClassifierAPI(), accelerator="cpu", workers_per_device=workers)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")
