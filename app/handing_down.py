"""The settings of one process for others: the master's for its workers and for `python -m app prepare`."""
from app.config import HANDED_DOWN, SETTINGS


def variables(settings):
    """The mapping from which Settings.parse makes the same in another process, which then reads no `.env`."""
    texts = {field.name.upper(): getattr(settings, field.name) for field in SETTINGS}
    if settings.optional:
        from app import optional_settings
        texts |= {field.name.upper(): getattr(settings.optional, field.name) for field in optional_settings.SETTINGS}
    return {name: "" if value is None else ",".join(value) if isinstance(value, tuple) else str(value)
            for name, value in texts.items()} | dict(settings.of_models) | {HANDED_DOWN: "1"}
