"""The OpenAPI document's schemas: what is in answers."""
from app.api.openapi_answers import ref
from app.config import FACE_METHODS
from app.tasks.from_pictures import FromPictures

MEDIA = {"type": "object", "required": ["media_type", "b64"], "properties": {
    "media_type": {"type": "string"}, "b64": {"type": "string", "contentEncoding": "base64"}}}


def schemas(settings, tasks):
    def record(required, further=None, **description):
        return {"type": "object", "properties": {**required, **(further or {})}, "required": list(required),
                **description}

    text, number, milliseconds = {"type": "string"}, {"type": "number"}, {"type": "number", "minimum": 0}
    wording = {"description": "What to change, as a sentence.", "type": "string", "minLength": 1}
    some = {"type": "integer", "minimum": 0}
    answers = [schema for task in tasks for schema in (
        task.answer_kind().schema(), *([MEDIA] if task.media_types else []))]
    answers = [schema for i, schema in enumerate(answers) if schema not in answers[:i]]
    if not all(task.is_file for task in tasks):
        answers = [{"anyOf": [*answers, {"type": "array", "description": "Of a request with instances."}]}]
    predictions = answers[0] if len(answers) == 1 else {"anyOf": answers}
    traits = {"type": "object", "additionalProperties": number}
    of_pictures = ["media_type", "image_size"] if all(isinstance(task, FromPictures) for task in tasks) else []
    explanations = {"type": "array", "items": ref("Explanation"), "minItems": 1, "description":
                    "With explain=true: where the model looked, for one class or for each trait. Of a video, each "
                    "frame that counts has its own."}
    shot = record({"index": {**some, "description": "Number of the frame in display order, from 0."},
                   "time_s": milliseconds},
                  {"predictions": {**predictions, "description": "For this frame; missing if it does not count."},
                   "face_detected": {"type": "boolean"}, "explanations": explanations,
                   "face_box": {"type": ["array", "null"], "items": some, "minItems": 4, "maxItems": 4,
                                "description": "[x, y, width, height] of the crop, in pixels; null for no crop."}})
    metadata = record({
        "model": text, "device": text,
        "inference_time": {**milliseconds, "description": "Seconds in the model; 0 for an answer from the cache."},
        "timings_ms": {"type": "object", "additionalProperties": milliseconds,
                       "description": "Milliseconds in each stage."}},
        {"version": {**text, "description": "If the model has several."},
         "media_type": {"enum": ["image", "video"]},
         "image_size": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2,
                        "description": "[width, height] of the picture when upright."},
         "filename": {"type": ["string", "null"], "description": "The base name; null if none was sent."},
         "frames": {"type": "array", "items": shot, "minItems": 1,
                    "description": "The frames analysed: for videos with any model, for pictures with ocean."},
         "backbone": text, "method": {"enum": list(FACE_METHODS)}, "tta": {"type": "boolean"},
         "face_detected": {"type": "boolean", "description": "Whether every frame that counts was cropped to a face."},
         "spread": {**traits, "description": "Standard deviation over frames and mirror images."},
         "uncertainty": {**record({"entropy": {**milliseconds, "description": "In nats: 0 for certainty."},
                                   "margin": {**milliseconds, "maximum": 1}}), "description":
                         "How sure a classifier is: the entropy of all its probabilities, and by how much the best "
                         "one exceeds the next."},
         "explanations": explanations,
         "embedding": {"type": "array", "items": number, "minItems": 1, "description":
                       "With embedding=true: the vector before the network's last layer, averaged over frames and "
                       "mirror images."}})
    metadata["required"] += of_pictures
    prediction = {"predictions": predictions, "metadata": ref("Metadata")}
    success_word, error_word = {"const": "success"}, {"const": "error"}
    position = {"index": some, "filename": {"type": ["string", "null"]}}
    results = {"count": {**some, "minimum": 1}, "failed": some,
               "results": {"type": "array", "items": ref("BatchResult"), "minItems": 1,
                           "maxItems": settings.max_batch_files}}
    return {
        "Base64": {"type": "string", "minLength": 4, "contentEncoding": "base64", "format": "base64-picture",
                   "description": "A picture or video in base64, or as a base64 data: URL."},
        "URL": {"type": "string", "format": "uri",
                "description": "Where to fetch the input: a URL that INPUT_URLS allows."},
        "Instance": {"anyOf": [record({"b64": ref("Base64")}, additionalProperties=False), ref("Base64")]},
        "Error": record({"status": error_word, "error": {"type": "string", "pattern": "^[A-Z_]+$"}, "message": wording,
                         "request_id": text}),
        "Answer": record({"status": success_word, **prediction}, example={
            "status": "success",
            "predictions": [{"class": "golden retriever", "confidence": 0.8532, "class_id": 207}],
            "metadata": {"filename": "dog.jpg", "media_type": "image", "model": "resnet50", "device": "cpu",
                         "image_size": [1024, 768], "inference_time": 0.037,
                         "timings_ms": {"read": 1.2, "queue": 0.4, "decode": 4.8,
                                        "preprocess": 3.1, "inference": 36.9}}}),
        "Metadata": metadata,
        "Explanation": record(
            {"map": {"type": "array", "minItems": 1, "items": {"type": "array", "items": milliseconds, "minItems": 1},
                     "description": "Rows of cells: how much each adds to the class's logit, or the trait's score, "
                                    "and 0 where it takes away. The class activation map, as Grad-CAM scales it."},
             "overlay": {**text, "contentEncoding": "base64", "contentMediaType": "image/png", "description":
                         "A picture to lay over the upright input: the stronger, the less transparent."}},
            {"class": text, "class_id": some, "trait": text}),
        "BatchResult": {"oneOf": [record({**position, "status": success_word, **prediction}),
                                  record({**position, "status": error_word, "error": text, "message": wording})]},
        "BatchAnswer": record({"status": success_word, **results}),
        "BatchError": record({"status": error_word, "error": {"const": "ALL_FAILED"}, "message": wording,
                              "request_id": text, **results}),
        "Health": record({"status": {"enum": ["healthy", "unhealthy"]}, "model": text, "device": text,
                          "model_loaded": {"type": "boolean"}, "uptime_seconds": milliseconds, "version": text,
                          "timestamp": {**number, "description": "Unix seconds."}},
                         {"reason": {"enum": ["loading", "draining", "self_test_failed"]},
                          "fallback_for": {**text, "description": "The configured model, if MODEL_FALLBACK is served "
                                                                  "in its place."}}),
        "Live": record({"status": {"const": "alive"}, "version": text, "timestamp": number}),
        "Index": record({"name": text, "version": text, "status": {"const": "running"},
                         "endpoints": {"type": "object", "additionalProperties": text}}),
        "Models": record({"status": success_word, "models": {"type": "array", "minItems": 1,
                                                             "items": ref("ModelState")}}),
        "ModelState": record({"name": text, "default": {"type": "boolean"}, "loaded": {"type": "boolean"}}, {
            "version": text, "memory_bytes": some,
            "share": {**number, "description": "Percentage of the requests for this name without a version."},
            "shadow": {"type": "boolean", "description": "Whether it answers too, unseen."}}),
        "Info": record({
            "status": success_word,
            "model": record({"name": text, "task": text, "device": text, "engine": text,
                             "takes": {"type": "array", "items": text}, "options": {"type": "array", "items": {
                                 "type": "object"}}},
                            {"precision": text, "input_size": {"type": "array", "items": some},
                             "preprocessing": record({"resize": some, "crop": some, "interpolation": text,
                                                      "mean": {"type": "array", "items": number},
                                                      "std": {"type": "array", "items": number}}),
                             "weights": record({"source": text, "sha256": text}),
                             "calibration": {"type": ["object", "null"]},
                             "features": record({"kind": {"enum": ["maps", "vector", None]}, "size": some,
                                                 "reason": {"type": ["string", "null"]}})}),
            "config": {"type": "object"},
            "versions": {"type": "object", "additionalProperties": text}}),
    }
