"""The command line: python3 -m app COMMAND. Any Python starts it: where packages are missing, it goes on in .venv."""
import contextlib
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main():
    try:
        if sys.argv[1:] == ["health"]:  # containers run it every few seconds: not even the parser is imported
            from app import healthcheck
            return healthcheck.main()
        from app import commands
        return commands.main()
    except ModuleNotFoundError as e:
        if not e.name or e.name.partition(".")[0] == "app":
            raise
        return go_on_in_venv(e.name.partition(".")[0])
    except KeyboardInterrupt:
        if "SETTINGS_HANDED_DOWN" not in os.environ:  # else it is a part of another command, which says so
            print("interrupted", file=sys.stderr)
        end(130)
    except BrokenPipeError:  # such as: … | head
        end(1)


def end(code):
    """End the process without waiting for native threads, which would abort it while they calculate."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def go_on_in_venv(package):
    """Start again with the Python of .venv, which `make run` makes; or say that the package is missing."""
    venv = os.path.join(ROOT, ".venv")
    python = os.path.join(venv, "bin", "python")
    if os.access(python, os.X_OK) and not os.path.samefile(venv, sys.prefix):
        os.execv(python, [python, *sys.orig_argv[1:]])
    target, further = ("worker", " -r app/jobs/requirements.txt") if sys.argv[1:2] in (["worker"], ["migrate"]) else (
        "run", "")
    print(f"error: {package} is not installed for {sys.executable}: run make {target} first, or install what is "
          f"missing with pip install -r requirements.txt{further}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
