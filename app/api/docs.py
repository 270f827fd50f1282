"""GET /openapi.json and /docs: the service's OpenAPI 3.1 document, and Swagger UI to read and try it.
The factory imports it with its first request."""
from pathlib import Path

import flask_swagger_ui
from flask import current_app, jsonify, render_template, send_from_directory
from werkzeug.utils import import_string

from app.api.openapi import document

# The parts of what is imported with its first request, and whether the settings have it.
LAZY = (("app.insight.openapi:add", lambda settings: True),
        ("app.open_inference.openapi:add", lambda settings: settings.open_inference))
SWAGGER_UI = Path(flask_swagger_ui.__file__).parent / "dist"

# Swagger UI uses icons from data: URLs and inline styles; nothing is loaded from other hosts.
CONTENT_SECURITY_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
                           "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'")


def openapi():
    extensions = current_app.extensions
    lazy = [part for part, is_on in LAZY if is_on(extensions["settings"])]
    parts = [*map(import_string, lazy), *extensions.get("documented", ())]
    return jsonify(document(extensions["settings"], extensions["model"].tasks(None), parts))


def docs():
    return render_template("docs.html"), {"Content-Security-Policy": CONTENT_SECURITY_POLICY}


def docs_file(name):
    """Swagger UI's own files."""
    return send_from_directory(SWAGGER_UI, name)
