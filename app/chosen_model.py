"""Which model a command uses: its Settings, as for `make run`, and what --model changes of them."""
import dataclasses
import sys

from app import model_settings
from app.config import SETTINGS, Settings, SettingsError

FALLBACK = {"MODEL_FALLBACK": "efficientnet_lite0"}  # as for `make run`


def load():
    """The Settings of a command that needs a model. Raises SettingsError."""
    return Settings.load(defaults=FALLBACK)


def choose(settings, name=None):
    """(key, Settings) of one model: the first of MODELS, or MODEL_NAME; with a name, that one of MODELS, else an
    architecture. Raises SettingsError."""
    of_models = model_settings.each(settings)
    if name is None:
        return next(iter(of_models.items()))
    for key, one in of_models.items():
        if name in (key, key.partition("@")[0]):
            return key, one
    read = next(field for field in SETTINGS if field.name == "model_name").metadata["read"]
    try:
        model_name = read("--model", name)
    except SettingsError as e:
        raise SettingsError(f"{e}{suggestion(name, of_models)}") from e
    return model_name, dataclasses.replace(settings, model_name=model_name, models=None, of_models=(), **dict.fromkeys(
        model_settings.NEVER_COMMON))


def suggestion(name, of_models):
    from app.suggestions import did_you_mean
    return did_you_mean(name, of_models)


def say_unused(settings, key, one):
    """Say on standard error which settings of MODEL_NAME a model chosen with --model does without."""
    if settings.models is None and one.model_name != settings.model_name:
        unused = [name.upper() for name in model_settings.NEVER_COMMON if getattr(settings, name) is not None]
        if unused:
            print(f"note: {' and '.join(unused)} {'belongs' if len(unused) == 1 else 'belong'} to MODEL_NAME "
                  f"{settings.model_name}, and {key} does without", file=sys.stderr)


def say_fallback(source, settings):
    """Say on standard error that a model stands in for another one. source: with its fallback_reason."""
    print(f"note: MODEL_FALLBACK {settings.model_fallback} stands in for {settings.model_name}: "
          f"{source.fallback_reason}", file=sys.stderr)
