"""How logging is set up: by the Gunicorn master, before it forks, and by `python -m app prepare`."""
import logging

from app.handing_down import log_descriptors
from app.server import logs


def logging_config(settings):
    """A logging.config dictionary for the service and Gunicorn. From now on, Python's warnings are logged too."""
    logging.captureWarnings(True)
    logs.descriptor = (log_descriptors() or [2])[0]
    if settings.log_format == "json":
        formatter = {"()": "app.server.log_config.json_formatter"}
    else:
        formatter = {"()": "app.server.text_logs.TextFormatter"}
    return {"version": 1, "disable_existing_loggers": False,
            "filters": {"request_id": {"()": "app.server.logs.RequestIdFilter"}},
            "formatters": {"line": formatter},
            "handlers": {"stderr": {"()": "app.server.logs.StderrHandler", "formatter": "line",
                                    "filters": ["request_id"]}},
            "root": {"level": settings.log_level, "handlers": ["stderr"]},
            "loggers": {"gunicorn.error": {"level": settings.log_level, "handlers": [], "propagate": True},
                        "gunicorn.access": {"level": "WARNING", "handlers": [], "propagate": True},
                        "PIL": {"level": "WARNING"}, "alembic": {"level": "WARNING"}}}


def json_formatter():
    from pythonjsonlogger.json import JsonFormatter
    return JsonFormatter("%(levelname)s %(name)s %(message)s", timestamp=True,
                         rename_fields={"levelname": "level", "name": "logger"})
