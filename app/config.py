"""The service's settings: read once from the environment and `.env`, validated, then frozen."""
import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

NAME, VERSION = "image-classifier-service", "0.1.0"

YES_OR_NO = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
FACE_METHODS = ("face", "middle", "face+middle")
MOST_FRAMES = 32
HANDED_DOWN = "SETTINGS_HANDED_DOWN"  # set by handing_down.variables
SWITCHES = ("JOBS", "HISTORY", "INPUT_URLS",  # of the optional parts
            "OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

BUILT_IN = r"[a-z0-9_]{1,64}"
OWN_CLASS = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*"
ENTRY = rf"(?!\w*__){BUILT_IN}(@[a-z0-9_.]{{1,32}})?(={BUILT_IN}|={OWN_CLASS})?"


class StartError(Exception):
    """Why the service cannot start; the message is one line for whoever starts it."""


class SettingsError(StartError):
    """An invalid setting; the message names the variable."""


def integer(low, high):
    def parse(text):
        if not re.fullmatch(r"[+-]?\d{1,15}", text) or not low <= int(text) <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return int(text)
    return parse


def number(low, high, what="a number of seconds"):
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= float(text) <= high:
                return float(text)
        raise ValueError(f"{what} from {low} to {high}")
    return parse


def rare(name, *arguments):
    """A parser of setting_formats.py, which is imported with the first setting that needs it."""
    def parse(text):
        from app import setting_formats
        return getattr(setting_formats, name)(text, *arguments)
    return parse


def one_of(*choices, then=str.lower):
    def parse(text):
        if text.lower() not in choices:
            raise ValueError("one of " + ", ".join(choices), choices)
        return then(text)
    return parse


def matching(pattern, takes, then=str):
    def parse(text):
        if not re.fullmatch(pattern, text):
            raise ValueError(takes)
        return then(text)
    return parse


def path(text):
    return Path(text).expanduser().absolute()  # the same file for processes with another working directory


def yes_or_no(text):
    if text.lower() not in YES_OR_NO:
        raise ValueError("on or off")
    return YES_OR_NO[text.lower()]


def setting(parse, default, secret=False, each=False):
    """secret: the value is never shown, not even in an error message; each: with several models, each may have its own
    value, in the variable NAME__SETTING."""
    def read(variable, text):
        try:
            return parse(text)
        except ValueError as e:
            from app import setting_formats
            raise SettingsError(setting_formats.refusal(variable, e, text, secret)) from e
    return dataclasses.field(default=default, repr=not secret, metadata={"read": read, "each": each})


@dataclasses.dataclass(frozen=True)
class Settings:
    """One field per variable, named like it in small letters. None means: worked out from the machine, or unset."""
    model_name: str = setting(matching(f"{BUILT_IN}|{OWN_CLASS}", "a model's name in lower case, such as "
                                       "resnet50, or your class as package.module:Class"), "resnet50")
    model_path: Path | None = setting(path, None, each=True)
    labels_path: Path | None = setting(path, None, each=True)
    preprocessing: str | None = setting(rare("preprocessing"), None, each=True)
    model_fallback: str | None = setting(matching(BUILT_IN, "a model's name such as resnet50"), None, each=True)
    models: tuple | None = setting(rare("listed", ENTRY, "comma-separated models, each NAME[@VERSION][=MODEL_NAME]"),
                                   None)
    open_inference: bool = setting(yes_or_no, True)
    split_header: str | None = setting(matching("[A-Za-z0-9-]{1,64}", "a header's name such as X-User"), None)
    load_models: str = setting(one_of("boot", "first_use"), "boot")
    models_memory: int | None = setting(rare("byte_size"), None)
    model_dir: Path = setting(path, Path("models"))
    weights_mirror: str | None = setting(str, None)
    device: str = setting(matching(r"(?i:auto|cpu|cuda(:\d{1,2})?)", "auto, cpu, cuda or cuda:N", str.lower), "auto")
    engine: str = setting(one_of("auto", "openvino", "torch"), "auto")
    precision: str = setting(one_of("fp32", "bf16", "fp16", "int8", "auto"), "fp32", each=True)
    calibration_dir: Path | None = setting(path, None, each=True)
    accuracy_limit: float = setting(number(0, 1, "a number"), 0.01, each=True)
    host: str = setting(str, "0.0.0.0")
    port: int = setting(integer(1, 65535), 5000)
    workers: int | None = setting(integer(1, 256), None)
    cores: int | None = setting(integer(1, 1024), None)
    max_batch_size: int = setting(integer(1, 1024), 32)
    batch_timeout_ms: int = setting(integer(0, 1000), 2)
    max_queue: int | None = setting(integer(0, 1000), None)
    request_timeout: float = setting(number(0.1, 3600), 30.0)
    drain_seconds: float = setting(number(0, 600), 5.0)
    finish_seconds: float = setting(number(1, 3600), 4.0)
    max_file_size: int = setting(rare("byte_size"), 10 * 2**20)
    max_image_pixels: int = setting(integer(1, 1_000_000_000), 50_000_000)
    max_video_size: int = setting(rare("byte_size"), 50 * 2**20)
    max_video_seconds: float = setting(number(1, 86400), 300.0)
    max_batch_files: int = setting(integer(1, 1000), 32)
    max_body_memory: int = setting(rare("byte_size"), 512 * 2**20)
    cache_url: str | None = setting(rare("store_url", "redis", "rediss", "unix"), None, secret=True)
    cache_ttl: int = setting(integer(1, 2_592_000), 3600)
    top_k: int = setting(integer(1, 10), 5, each=True)
    face_method: str = setting(one_of(*FACE_METHODS), "face+middle", each=True)
    tta: bool = setting(yes_or_no, True, each=True)
    video_frames: int = setting(integer(1, MOST_FRAMES), 1, each=True)
    api_keys: tuple | None = setting(rare("keys"), None, secret=True)
    rate_limit: str | None = setting(rare("rate_limit"), None)
    rate_limit_storage: str = setting(rare("store_url", "redis", "rediss"), "memory://", secret=True)
    trusted_proxies: int = setting(integer(0, 10), 0)
    cors_origins: tuple | None = setting(rare("origins"), None)
    log_level: str = setting(one_of("debug", "info", "warning", "error", "critical", then=str.upper), "INFO")
    log_format: str = setting(one_of("json", "text"), "json")
    of_models: tuple = ()  # of the models in `models`: (NAME__VARIABLE, text) of those that are set
    optional: Any = None   # an OptionalSettings, if any optional part is on

    def __post_init__(self):
        object.__setattr__(self, "model_dir", self.model_dir.absolute())

    @classmethod
    def load(cls, env_file=".env", defaults=None):
        """Settings from the environment, then from env_file, then from `defaults` ({variable: text}; by default what
        SERVICE_DEFAULTS lists), then their own defaults. Raises SettingsError."""
        if defaults is None:
            listed = re.split(r"\s+(?=[A-Z0-9_]+=)", os.environ.get("SERVICE_DEFAULTS", ""))
            defaults = dict(pair.partition("=")[::2] for pair in listed)
        if HANDED_DOWN not in os.environ and os.path.exists(env_file):
            from app import setting_names
            defaults = defaults | setting_names.of_file(env_file, os.environ)
        return cls.parse({**defaults, **os.environ})

    @classmethod
    def parse(cls, variables):
        """Settings from a mapping of variables to strings; an empty string counts as unset. Raises SettingsError."""
        texts = {variable: text.strip() for variable, text in variables.items() if text and text.strip()}
        settings = cls(**read(SETTINGS, texts))
        if settings.models:
            from app import model_settings
            try:
                settings = model_settings.checked(settings, texts)
            except ValueError as e:
                raise SettingsError(str(e)) from e
        if any(variable in texts for variable in SWITCHES):
            from app.optional_settings import OptionalSettings
            settings = dataclasses.replace(settings, optional=OptionalSettings.parse(texts))
        return settings


SETTINGS = [field for field in dataclasses.fields(Settings) if field.metadata]


def read(fields, texts):
    """{field: its value} of those that {variable: text} sets. Raises SettingsError."""
    return {field.name: field.metadata["read"](field.name.upper(), texts[field.name.upper()])
            for field in fields if field.name.upper() in texts}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the service uses the machine; server/machine.py derives it from the Settings.

    devices: torch devices that the workers are spread over ("cpu", "cuda:0", …); streams: concurrent inferences per
    worker; slots: requests that a worker decodes or infers at once; queue: requests that may wait for a slot.
    """
    engine: str
    devices: tuple
    workers: int
    streams: int
    slots: int
    queue: int

    device = property(lambda self: self.devices[0])
