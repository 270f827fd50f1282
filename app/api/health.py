"""GET /health and /ready for load balancers, GET /live for process supervisors."""
import time

from flask import Blueprint, current_app, jsonify

from app.config import VERSION
from app.server import board

bp = Blueprint("health", __name__)


@bp.get("/health")
@bp.get("/ready")
def health():
    loader = current_app.extensions["model"]
    model = loader.current
    reason = "draining" if board.is_draining() else loader.state
    body = {"status": "unhealthy" if reason else "healthy",
            "model": model.name if loader.ready else loader.settings.model_name,
            "device": loader.plan.device, "model_loaded": loader.ready,
            "uptime_seconds": round(time.monotonic() - loader.started, 1), "version": VERSION, "timestamp": time.time()}
    if reason:
        return jsonify({**body, "reason": reason}), 503
    return jsonify({**body, **model.instead})


@bp.get("/live")
def live():
    return jsonify({"status": "alive", "version": VERSION, "timestamp": time.time()})
