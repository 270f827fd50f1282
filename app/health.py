"""GET /health and /ready for load balancers, GET /live for whoever restarts processes."""
import time

from flask import Blueprint, current_app, jsonify

from app import VERSION, state

bp = Blueprint("health", __name__)


@bp.get("/health")
@bp.get("/ready")
def health():
    model = current_app.extensions["model"]
    reason = "draining" if state.draining() else model.state
    body = {"status": "unhealthy" if reason else "healthy",
            "model": model.name if model.ready else current_app.extensions["settings"].model_name,
            "device": model.device, "model_loaded": model.ready,
            "uptime_seconds": round(time.monotonic() - model.started, 1), "version": VERSION, "timestamp": time.time()}
    if reason:
        return jsonify({**body, "reason": reason}), 503
    if model.fallback_reason:
        body["fallback_for"] = current_app.extensions["settings"].model_name
    return jsonify(body)


@bp.get("/live")
def live():
    return jsonify({"status": "alive", "version": VERSION, "timestamp": time.time()})
