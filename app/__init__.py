"""One vision model behind HTTP: the application factory."""

NAME, VERSION = "image-classifier-service", "0.1.0"


def create_app(settings=None, model=None):
    """The Flask application. model: a loaded ModelLoader, else one is loaded here, once a worker."""
    # Imported here: the Gunicorn master, which imports this package too, then holds 10 MB less.
    from flask import Flask

    from app import access, batch, cache, errors, health, info, metrics, observability, openapi, predict
    from app.config import Settings
    from app.model_loader import ModelLoader
    from app.uploads import FORM_OVERHEAD, MemoryRequest

    settings = settings or Settings.load()
    app = Flask(__name__)
    app.request_class = MemoryRequest
    app.json.sort_keys = False
    app.config["MAX_CONTENT_LENGTH"] = FORM_OVERHEAD  # the endpoints that take files raise it
    app.extensions["settings"] = settings
    app.extensions["model"] = model or ModelLoader(settings).load()
    app.extensions["cache"] = cache.ResultCache(settings, app.extensions["model"]) if settings.cache_url else None
    observability.register(app)
    metrics.register(app, app.extensions["model"])
    errors.register(app)
    access.register(app, settings)
    for module in (predict, batch, health, info, metrics, openapi):
        app.register_blueprint(module.bp)
    return app
