"""Models behind HTTP: the application factory. It imports what it needs when it runs, as the Gunicorn master and the
command line import this package too."""

EACH, V2_VIEWS = ("", "/models/<name>"), "app.open_inference.views"  # EACH: the default model, or one in the path
LAZY = [("docs", "app.api.docs", [("/openapi.json", "openapi"), ("/docs", "docs"), ("/docs/<name>", "docs_file")]),
        ("batch", "app.api.batch", [(path + "/predict/batch", "predict_batch", "POST") for path in EACH]),
        ("embed", "app.insight.api", [(path + "/embed", "embed", "POST", "PUT") for path in EACH])]
V2 = [("v2_health", V2_VIEWS, [("/v2/health/live", "live"), ("/v2/health/ready", "ready")]),
      ("v2_about", V2_VIEWS, [("/v2", "server"), ("/v2/repository/index", "index", "GET", "POST")]), ("v2", V2_VIEWS, [
          (f"/v2/models/<name>{version}{rest}", "model_" + view, *methods) for version in ("", "/versions/<version>")
          for rest, view, *methods in (("", "metadata"), ("/ready", "ready"), ("/infer", "infer", "POST"))])]


def create_app(settings=None, loader=None):
    """The Flask application. loader: a ModelLoader that has its model; by default one is created, once per worker."""
    from flask import Flask

    from app.api import health, info, lazy_views, metrics, predict, requests, uploads
    from app.config import Settings
    from app.engine.bundle import Prepared

    settings = settings or Settings.load()
    app = Flask(__name__, template_folder="api/templates", static_folder="api/static")
    app.request_class = uploads.MemoryRequest
    app.json.sort_keys = False
    app.config["MAX_CONTENT_LENGTH"] = uploads.FORM_OVERHEAD  # endpoints that accept files raise it
    app.extensions["settings"] = settings
    app.extensions["model"] = loader or load_model(settings)
    app.extensions["replace"] = lambda models: app.extensions["model"].load([Prepared.of(one) for one in models])
    app.extensions["bodies"] = uploads.Bodies(settings.max_body_memory)
    app.extensions["cache"] = None
    app.extensions["count_batch"] = lambda files: None  # access.py limits them
    app.extensions["at_exit"] = lambda: None  # for the worker to call before its process ends; raises nothing
    app.extensions["fetch"] = app.extensions["record"] = None  # optional parts
    app.extensions["endpoints"] = {"/v2": "Open Inference V2: /v2/models/NAME/infer"} if settings.open_inference else {}
    requests.register(app)
    app.register_error_handler(Exception, error_answer)
    if settings.cache_url:
        from app.api.cache import ResultCache
        app.extensions["cache"] = ResultCache(settings, app.extensions["model"].slots)
    if settings.api_keys or settings.rate_limit or settings.cors_origins or settings.trusted_proxies:
        from app.api import access
        access.register(app, settings)
    if settings.optional:
        from app import optional_parts
        optional_parts.register(app, settings)
    for module in (predict, health, info, metrics):
        app.register_blueprint(module.bp)
    for lazy in LAZY + V2 * settings.open_inference:
        app.register_blueprint(lazy_views.blueprint(*lazy))
    return app


def error_answer(error):
    from app.api import error_answers  # with the first error
    return error_answers.render(error)


def load_model(settings):
    """A ModelLoader with the model that the master has published, else that of the settings. Raises StartError."""
    from app.config import Plan
    if settings.models:
        from app.model_repository import ModelRepository as ModelLoader
    else:
        from app.model_loader import ModelLoader
    from app.server import board
    if board.own:
        plan = Plan(**board.own.read()["plan"] | {"devices": (settings.device,)})
        return load_published(ModelLoader(settings, plan), board.own.read())
    from app.prepare import prepared
    from app.server import machine, start_checks
    start_checks.refuse_without_configuration()
    plan = machine.plan(settings)
    return ModelLoader(settings, plan).load(prepared(settings, plan.engine))


def load_published(loader, on_board):
    """Load what the master has published, or, if that has become unusable, what it had published before."""
    import logging

    from app.config import StartError
    from app.engine.bundle import Prepared
    published, previous = on_board["published"], on_board["previous"]
    try:
        loader.load([Prepared.of(one) for one in published["models"]])
    except StartError as e:
        if not previous:
            raise
        logging.getLogger(__name__).error("the published model cannot be loaded: %s", e)
        published = previous
        loader.load([Prepared.of(one) for one in published["models"]])
    loader.generation = published["generation"]
    return loader
