"""FastAPI and Uvicorn around torch: one process per core, whose event loop is kept free by a thread for the model.

    uvicorn --workers 2 --host 127.0.0.1 --port 8000 bench.rivals.fastapi_torch:app
"""
import asyncio
from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI, UploadFile

from bench.rivals.resnet50 import ResNet50

app = FastAPI()
model = ResNet50()
model_thread = ThreadPoolExecutor(1)


def classify(data):
    return model.predict(model.preprocess(data))


@app.post("/predict")
async def predict(file: UploadFile):
    data = await file.read()
    return {"predictions": await asyncio.get_running_loop().run_in_executor(model_thread, classify, data)}
