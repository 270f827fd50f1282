"""One vision model behind HTTP: the application factory."""
from flask import Flask

from app import access, errors, health, info, metrics, observability, predict
from app.config import Settings
from app.model_loader import ModelLoader
from app.uploads import FORM_OVERHEAD, MemoryRequest


class Service(Flask):
    request_class = MemoryRequest


def create_app(settings=None, model=None):
    """The Flask application. model: a loaded ModelLoader, else one is loaded here, once a worker."""
    settings = settings or Settings.load()
    app = Service(__name__, static_folder=None)
    app.json.sort_keys = False
    app.config["MAX_CONTENT_LENGTH"] = settings.max_file_size + FORM_OVERHEAD
    app.extensions["settings"] = settings
    app.extensions["model"] = model or ModelLoader(settings).load()
    observability.register(app)
    metrics.register(app, app.extensions["model"])
    errors.register(app)
    access.register(app, settings)
    for module in (predict, health, info, metrics):
        app.register_blueprint(module.bp)
    return app
