"""The settings of the optional parts: jobs, history, inputs by reference, tracing. Imported only if one is on."""
import dataclasses
import importlib.metadata
import importlib.util
import ipaddress
import os
import re
from pathlib import Path

from app import config
from app.config import SettingsError, integer, number, path, rare, setting, yes_or_no
from app.setting_formats import byte_size

DAY_S = 86_400
HOST = r"(\*\.)?[A-Za-z0-9.-]{1,253}|\[[0-9a-fA-F:.]{2,45}\]"
URL_PREFIX = rf"(https?://({HOST})(:\d{{1,5}})?|s3://[a-z0-9.-]{{3,63}})(/[^\s,?#]*)?"
SECRET = r"whsec_([A-Za-z0-9+/]{4}){5,}([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?|(?!whsec_)[!-~]{16,}"
REQUIREMENTS = "app/jobs/requirements.txt"
NO_TRACING = ("the OTEL_* variables switch tracing on, which needs further packages: pip install -r "
              "app/tracing/requirements.txt")


def url(pattern, takes):
    def parse(text):
        if not re.fullmatch(pattern, text):
            raise ValueError(takes)
        return text
    return parse


def database(text):
    """SQLAlchemy's URL of a database, also from one as hosting providers write it. The error names only the scheme,
    as the rest may hold a password."""
    scheme, found, rest = text.partition("://")
    if scheme in ("postgres", "postgresql", "postgresql+psycopg") and re.fullmatch(r"\S+", rest):
        return f"postgresql+psycopg://{rest}"
    if scheme == "sqlite" and re.fullmatch(r"//\S+", rest):
        return text
    got = f"{scheme}://…" if found and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]{0,30}", scheme) else "something else"
    raise SettingsError("DATABASE_URL must be postgresql://USER:PASSWORD@HOST/DATABASE or sqlite:////PATH, got " + got)


def storage(text):
    """A folder's absolute path, or an s3:// URL, as text without a slash at its end."""
    if not re.match("[^/]*:", text):
        return str(Path(text).expanduser().absolute())
    if text.startswith("file:///"):
        return text.removeprefix("file://").rstrip("/")
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s?#]*)?", text):
        raise ValueError("a folder, or s3://bucket/prefix")
    return text.rstrip("/")


def networks(text):
    try:
        return tuple(str(ipaddress.ip_network(part.strip())) for part in text.split(",") if part.strip())
    except ValueError as e:
        raise ValueError("comma-separated networks such as 10.0.0.0/8 or 127.0.0.1/32") from e


def trace_exporters(texts):
    """Names of the exporters that the OTEL_* variables ask for, as the SDK's packages register them; () if tracing is
    off. texts: {variable: text}. Raises SettingsError."""
    names = texts.get("OTEL_TRACES_EXPORTER", "otlp" if any(
        texts.get(f"OTEL_EXPORTER_OTLP_{name}") for name in ("ENDPOINT", "TRACES_ENDPOINT")) else "none").lower()
    names = tuple(name.strip() for name in names.split(",") if name.strip() not in ("", "none"))
    if not names or texts.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ()
    try:
        is_there = importlib.util.find_spec("opentelemetry.sdk.trace") is not None
    except ModuleNotFoundError:
        is_there = False
    if not is_there:
        raise SettingsError(NO_TRACING)
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if "otlp" in names and variable in texts:
            if texts[variable] != "http/protobuf":
                raise SettingsError(f"{variable} must be http/protobuf, got {texts[variable]!r}")
            break  # the first one counts
    names = tuple("otlp_proto_http" if name == "otlp" else name for name in names)
    for name in names:
        if not importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=name):
            if name == "otlp_proto_http":
                raise SettingsError(NO_TRACING)
            raise SettingsError("OTEL_TRACES_EXPORTER must be otlp, console, none or the name of an exporter that is "
                                f"installed, got {name!r}")
    return names


@dataclasses.dataclass(frozen=True)
class OptionalSettings:
    """One field per variable, as in Settings."""
    jobs: bool = setting(yes_or_no, False)
    data_dir: Path = setting(path, Path("data"))
    jobs_broker: str | None = setting(url(r"rediss?://\S+", "the URL of a Redis server such as "
                                                            "redis://127.0.0.1:6379/0"), None, secret=True)
    database_url: str | None = setting(database, None, secret=True)
    storage_url: str | None = setting(storage, None)
    job_timeout: float = setting(number(1, DAY_S), 600.0)
    jobs_ttl: int = setting(integer(1, 366 * DAY_S), DAY_S)
    max_jobs: int = setting(integer(1, 1_000_000), 1000)
    max_jobs_storage: int = setting(byte_size, 10 * 2**30)
    max_job_files: int = setting(integer(1, 10_000), 256)
    max_job_size: int = setting(byte_size, 256 * 2**20)
    short_workers: int = setting(integer(0, 256), 1)
    long_workers: int = setting(integer(0, 256), 1)
    worker_port: int | None = setting(integer(1, 65535), None)
    callback_secret: str | None = setting(url(SECRET, "whsec_ and base64, or at least 16 other visible ASCII "
                                                      "characters"), None, secret=True)
    callback_urls: tuple | None = setting(rare("listed", URL_PREFIX, "comma-separated URL prefixes such as "
                                                             "https://example.org/hooks/"), None)
    input_urls: tuple | None = setting(rare("listed", URL_PREFIX, "comma-separated URL prefixes such as "
                                                          "https://images.example.org/ or s3://bucket/prefix/"), None)
    private_networks: tuple = setting(networks, ())
    history: bool = setting(yes_or_no, False)
    history_days: int = setting(integer(1, 36_600), 30)
    admin_keys: tuple | None = setting(rare("keys"), None, secret=True)
    tracing: bool = False  # by the OTEL_* variables, which the SDK reads itself

    @classmethod
    def parse(cls, texts):
        """From a mapping of variables to texts; None if all parts are off. Raises SettingsError.

        The AWS_* and OTEL_* variables, which libraries look for in the environment, are put there.
        """
        if texts.get("WORKER_PORT", "").startswith("tcp://"):  # Kubernetes' variable for a Service called worker
            texts = {name: text for name, text in texts.items() if name != "WORKER_PORT"}
        optional = cls(**config.read(SETTINGS, texts), tracing=bool(trace_exporters(texts)))
        has_packages = optional.jobs or optional.history or optional.input_urls
        if not (has_packages or optional.tracing):
            return None
        if has_packages and (optional.jobs and importlib.util.find_spec("celery") is None
                             or importlib.util.find_spec("aiohttp") is None):
            raise SettingsError("JOBS, HISTORY and INPUT_URLS need further packages: pip install -r " + REQUIREMENTS)
        if optional.admin_keys and "API_KEYS" not in texts:
            raise SettingsError("ADMIN_KEYS needs API_KEYS: without them, everyone sees all jobs and records anyway")
        for variable in (variable for variable in texts if variable.startswith(("AWS_", "OTEL_"))):  # of .env
            os.environ.setdefault(variable, texts[variable])
        return dataclasses.replace(optional, data_dir=optional.data_dir.absolute())

    @property
    def database(self):
        """DATABASE_URL, or that of the embedded database."""
        return self.database_url or f"sqlite:///{self.data_dir / 'service.db'}"

    @property
    def uses_data_dir(self):
        """Whether anything is kept in DATA_DIR."""
        return bool((self.jobs or self.history) and not self.database_url
                    or self.jobs and not (self.jobs_broker and self.storage_url))

    @property
    def database_variable(self):
        """The variable that says where the database is."""
        return "DATABASE_URL" if self.database_url else "DATA_DIR"

    @property
    def storage(self):
        """STORAGE_URL, or the embedded folder."""
        return self.storage_url or str(self.data_dir / "storage")


SETTINGS = [field for field in dataclasses.fields(OptionalSettings) if field.metadata]
