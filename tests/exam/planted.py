"""The service with a deliberate fault, for checks that need one."""
import time

from app import create_app

SLOW_LOAD_S = 3
LEAK_BYTES = 20_000


def create_slow():
    """The service with a model that loads slowly."""
    time.sleep(SLOW_LOAD_S)
    return create_app()


def create_leaking():
    """The service with a memory leak in every request."""
    app, kept = create_app(), []

    @app.after_request
    def leak(response):
        kept.append(b"x" * LEAK_BYTES)
        return response
    return app
