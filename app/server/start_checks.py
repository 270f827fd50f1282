"""What the Gunicorn master checks before it prepares a model, which may take minutes. Each problem is a StartError."""
import errno
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

from app import model_settings, own_class
from app.config import HANDED_DOWN, StartError

ROOT = Path(__file__).parent.parent.parent
CAPABILITIES = """import sys
sys.modules["openvino_telemetry"] = None
import openvino
print(*openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))"""


def check(cfg, settings, plan):
    """cfg: Gunicorn's configuration, with its command line. Raises StartError for what can only fail later."""
    check_addresses(cfg)
    if cfg.is_ssl or cfg.ca_certs:
        check_certificates(cfg)
    models = model_settings.each(settings).values()
    for name in [one.model_name for one in models if ":" in one.model_name]:
        own_class.check(name)
    if plan.engine == "openvino" and any(one.precision == "bf16" and ":" not in one.model_name for one in models):
        check_bf16()
    if settings.optional and settings.optional.uses_data_dir:
        check_folder("DATA_DIR", settings.optional.data_dir)


def check_addresses(cfg):
    """Bind each address as Gunicorn will, unless sockets are inherited: from systemd, or from a previous master."""
    from gunicorn import systemd  # here, as programs without Gunicorn import this module, too
    inherited = range(3, 3 + systemd.listen_fds(unset_environment=False))
    for descriptor in (*inherited, *(one for one in cfg.address if isinstance(one, int))):
        check_descriptor(descriptor)
    if inherited or "GUNICORN_PID" in os.environ:
        return
    for address in cfg.address:
        if isinstance(address, tuple):
            check_port(*address, cfg.reuse_port)
        elif isinstance(address, str | bytes):
            check_unix_socket(os.fsdecode(address))


def check_port(host, port, reuse_port):
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            s.bind((host, port))
    except socket.gaierror as e:
        raise StartError(f"HOST {host} is neither an address nor a name of this machine") from e
    except OverflowError as e:
        raise StartError(f"there is no port {port}: PORT must be an integer from 1 to 65535") from e
    except OSError as e:
        raise StartError({
            errno.EADDRINUSE: f"port {port} is taken on {host}: stop the program that listens there, or choose another "
                              "PORT",
            errno.EADDRNOTAVAIL: f"HOST {host} is not an address of this machine; 0.0.0.0 stands for all that it has",
            errno.EACCES: f"port {port} is not allowed for this user: choose a PORT from 1024 on",
        }.get(e.errno, f"{host}, port {port}, cannot be listened on: {e.strerror}")) from e


def check_unix_socket(path):
    if path.startswith("\0"):  # no file
        return
    if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
        raise StartError(f"unix:{path} cannot be listened on: there is a file that is no socket")
    folder = os.path.dirname(path) or "."
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StartError(f"unix:{path} cannot be listened on: {folder} is no folder that can be written")


def check_descriptor(number):
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            raise StartError(f"descriptor {number} cannot be listened on: it is no socket")
    except OSError as e:
        raise StartError(f"descriptor {number} cannot be listened on: it is closed; whoever starts the service must "
                         "leave it open") from e


def check_certificates(cfg):
    """Load the files as each worker will, which would fail again and again."""
    import ssl
    for option in ("certfile", "keyfile", "ca_certs"):
        path = getattr(cfg, option)
        if path and not os.access(path, os.R_OK):
            raise StartError(f"--{option.replace('_', '-')} {path} cannot be read")
    if cfg.is_ssl and not cfg.certfile:
        raise StartError("--keyfile needs --certfile")
    for option in ("certfile", "ca_certs"):
        path = getattr(cfg, option)
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path) if path else None
        except (OSError, ValueError) as e:  # SSLError is an OSError
            raise StartError(f"--{option.replace('_', '-')} {path} holds no certificate in PEM format") from e
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    key = f"--keyfile {cfg.keyfile}" if cfg.keyfile else f"--certfile {cfg.certfile}, without --keyfile,"
    try:
        if cfg.is_ssl:
            context.load_cert_chain(cfg.certfile, cfg.keyfile, refuse_password)
    except (OSError, ValueError) as e:
        why = f"does not fit --certfile {cfg.certfile}" if getattr(e, "reason", "") == "KEY_VALUES_MISMATCH" else \
            "holds no key in PEM format that can be read without a password"
        raise StartError(f"{key} {why}") from e
    try:
        context.set_ciphers(cfg.ciphers or "DEFAULT")
    except ssl.SSLError as e:
        raise StartError(f"--ciphers {cfg.ciphers} names none that are available") from e


def refuse_password():
    raise ValueError("a service cannot ask for one")


def check_bf16():
    """Asks OpenVINO, in a process of its own, as the master must not import it."""
    asked = subprocess.run([sys.executable, "-c", CAPABILITIES], capture_output=True, text=True)
    if asked.returncode == 0 and "BF16" not in asked.stdout.split():
        raise StartError("PRECISION is bf16, but this processor does not support bf16; use fp32 or auto")


def check_folder(variable, path):
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as e:
        raise StartError(f"{variable} {path} cannot be written: {e.strerror}") from e


def refuse_without_configuration():
    """End this process, and the Gunicorn that it belongs to, if that has not read gunicorn.conf.py: it would serve with
    one worker that answers one request at a time. Called where no master has published a model."""
    is_gunicorn = os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn") and "gunicorn.arbiter" in sys.modules
    if not is_gunicorn or HANDED_DOWN in os.environ:
        return
    print(f"error: Gunicorn has not read gunicorn.conf.py, without which this service cannot run: start it in {ROOT} "
          "(--chdir comes too late for that)", file=sys.stderr, flush=True)
    sys.exit(3)  # what Gunicorn takes for a worker that will never boot: it stops instead of starting another
