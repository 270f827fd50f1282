"""Flask and Gunicorn around torch: one sync worker per core.

    gunicorn --workers 2 --bind 127.0.0.1:8000 bench.rivals.flask_torch:app
"""
from flask import Flask, request

from bench.rivals.resnet50 import ResNet50

app = Flask(__name__)
model = ResNet50()


@app.post("/predict")
def predict():
    batch = model.preprocess(request.files["file"].read())
    return {"predictions": model.predict(batch)}
