"""GET /openapi.json and /docs: the service's OpenAPI 3.1 document, and Swagger UI to read and try it.
The factory imports it with its first request."""
from pathlib import Path

import flask_swagger_ui
from flask import current_app, jsonify, render_template, send_from_directory

from app.api.openapi import document

SWAGGER_UI = Path(flask_swagger_ui.__file__).parent / "dist"

# Swagger UI uses icons from data: URLs and inline styles; nothing is loaded from other hosts.
CONTENT_SECURITY_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
                           "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'")


def openapi():
    extensions = current_app.extensions
    parts = [*extensions.get("documented", ())]
    if extensions["settings"].open_inference:
        from app.open_inference import openapi as of_v2
        parts.append(of_v2.add)
    return jsonify(document(extensions["settings"], extensions["model"].tasks(None), parts))


def docs():
    return render_template("docs.html"), {"Content-Security-Policy": CONTENT_SECURITY_POLICY}


def docs_file(name):
    """Swagger UI's own files."""
    return send_from_directory(SWAGGER_UI, name)
