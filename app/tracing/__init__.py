"""Tracing with OpenTelemetry (the OTEL_* variables). The core never imports it."""
from app.config import StartError


def start():
    """Export this process's spans from now on; it must not fork any more. Returns the modules that make them and that
    export them. Raises StartError."""
    try:
        from app.tracing import export, spans  # the SDK reads some variables when it is imported
        export.start()
    except (ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as e:
        message = (f"{type(e).__name__}: {e}".splitlines() or [""])[0]
        raise StartError(f"tracing cannot start with these OTEL_* variables: {message}") from e
    return spans, export
