"""The command line: python3 -m app COMMAND. Any Python starts it: where packages are missing, or if it is too old, it
goes on in .venv."""
import contextlib
import errno
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main():
    """Run the command of sys.argv. Returns the exit code."""
    for name in ("stdout", "stderr"):  # closed: what opens a file next must not become it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the end
    try:
        code = run()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if "SETTINGS_HANDED_DOWN" not in os.environ:  # else it is a part of another command, which says so
            print("interrupted", file=sys.stderr)
        end(130)
    except BrokenPipeError:  # such as: … | head
        end(1)
    except OSError as e:
        if e.errno not in FULL:
            raise
        with contextlib.suppress(OSError):
            print(f"error: {e.filename or 'the output'} cannot be written: {e.strerror}", file=sys.stderr)
        end(1)


def run():
    if sys.version_info < (3, 10):  # noqa: UP036 - it cannot even import what follows
        return go_on_in_venv(f"{sys.executable} is older than Python 3.11")
    try:
        if sys.argv[1:] == ["health"]:  # containers run it every few seconds: not even the parser is imported
            from app import healthcheck
            return healthcheck.main()
        from app import commands
        return commands.main()
    except ModuleNotFoundError as e:
        if not e.name or e.name.partition(".")[0] == "app":
            raise
        return go_on_in_venv(f"{e.name.partition('.')[0]} is not installed for {sys.executable}")


def end(code):
    """End the process without waiting for native threads, which would abort it while they calculate."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def go_on_in_venv(why):
    """Start again with the Python of .venv, which `make run` makes; without one, say why this Python does not do."""
    venv = os.path.join(ROOT, ".venv")
    python = os.path.join(venv, "bin", "python")
    if os.access(python, os.X_OK) and not os.path.samefile(venv, sys.prefix):
        os.execv(python, [python, *getattr(sys, "orig_argv", ["", "-m", "app", *sys.argv[1:]])[1:]])
    target, further = ("worker", " -r app/jobs/requirements.txt") if sys.argv[1:2] in (["worker"], ["migrate"]) else (
        "run", "")
    print(f"error: {why}: run make {target} first, or install what is missing with pip install -r requirements.txt"
          f"{further}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
