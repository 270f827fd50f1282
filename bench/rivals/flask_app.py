"""Flask and Gunicorn: one sync worker per core.

    gunicorn --workers 2 --bind 127.0.0.1:8000 bench.rivals.flask_app:app
"""
from flask import Flask, request
from PIL import Image

from bench.rivals import resnet50

app = Flask(__name__)
model = resnet50()


@app.post("/predict")
def predict():
    batch = model.preprocess(Image.open(request.files["file"].stream))
    return {"predictions": model.predict(batch)}
