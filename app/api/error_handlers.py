"""Renders every error as JSON, including those that Flask and Werkzeug raise."""


def register(app):
    app.register_error_handler(Exception, render)


def render(error):
    from app.api import error_answers  # with the first one
    return error_answers.render(error)
