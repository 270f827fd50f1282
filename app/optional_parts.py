"""Registers the optional parts that the settings ask for: jobs, history, inputs by reference, tracing."""


def register(app, settings):
    optional = settings.optional
    if optional.jobs or optional.history:
        from app.data.database import Database
        app.extensions["database"] = Database(optional.database)
    if optional.input_urls:
        from app.outbound import references
        references.register(app, settings)
    if optional.jobs:
        from app.jobs import api as jobs
        jobs.register(app, settings)
    if optional.history:
        from app.history import api as history
        history.register(app, settings)
    if optional.tracing:
        from app import tracing
        tracing.start()
        from app.tracing import requests
        requests.register(app)
