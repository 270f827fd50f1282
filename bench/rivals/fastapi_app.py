"""FastAPI and Uvicorn: one process per core, whose event loop is kept free by a thread for the model.

With OpenVINO, a single process with as many streams took a fifth more processor time for an answer, and plain `def`
endpoints, which run in up to 40 threads, a quarter more.

    uvicorn --workers 2 --host 127.0.0.1 --port 8000 bench.rivals.fastapi_app:app
"""
import asyncio
from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI, UploadFile
from PIL import Image

from bench.rivals import resnet50

app = FastAPI()
model = resnet50()
model_thread = ThreadPoolExecutor(1)


def classify(file):
    return model.predict(model.preprocess(Image.open(file)))


@app.post("/predict")
async def predict(file: UploadFile):
    return {"predictions": await asyncio.get_running_loop().run_in_executor(model_thread, classify, file.file)}
