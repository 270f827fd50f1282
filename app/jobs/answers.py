"""What GET /jobs/ID and webhooks say of a job."""
import json

FINAL = ("succeeded", "failed", "cancelled")


def job_body(row, deliveries):
    """The job object, as JSON types. row: of schema.jobs, with or without the result; deliveries: the rows of its
    webhooks."""
    error = json.loads(row["error_json"]) if row["error_json"] else None
    body = {
        "status": "success", "id": row["id"], "state": row["state"], "url": f"/jobs/{row['id']}",
        "request_id": row["request_id"],
        "model": row["model"], **({"version": row["version"]} if row["version"] else {}), "queue": row["queue"],
        "created_at": row["created_at"], "started_at": row["started_at"], "ended_at": row["ended_at"],
        "expires_at": row["expires_at"], "attempts": row["attempt"], "cancel_requested": row["cancel_requested"],
        "progress": {"done": row["done"], "total": row["total"], "unit": row["unit"]},
        "callback": callback(row, deliveries) if row["callback_url"] else None, "error": error}
    if "result_json" in row:
        body["result"] = json.loads(row["result_json"]) if row["result_json"] else None
    return body


def callback(row, deliveries):
    last = deliveries[-1] if deliveries else None
    return {"url": row["callback_url"], "id": last and last["id"], "state": last and last["state"],
            "next_at": last and last["next_at"],
            "attempts": [with_reason(made) for made in json.loads(last["attempts_json"])] if last else []}


def with_reason(made):
    """An attempt, with what is not plain from its status."""
    is_redirect = made["status"] is not None and 300 <= made["status"] < 400
    return {**made, "error": "redirects are not followed"} if is_redirect else made
