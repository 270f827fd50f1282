"""`python3 -m app smoke URL`: checks a running service after a deployment. Needs Python's standard library alone."""
import base64
import http.client
import io
import json
import math
import os
import re
import socket
import ssl
import struct
import sys
import time
import urllib.parse
import wave

CATS = range(281, 286)  # the classes of ImageNet that are domestic cats
SAME_WITHIN = 1e-3      # between two answers, which other workers or batches may have calculated
SAMPLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "api", "static")


class Failed(Exception):
    """What a check has found wrong; the message is one line."""


class Useless(Failed):
    """There is no service at this URL, or no way in: further checks would say the same."""


class Skipped(Exception):
    """Why a check does not apply."""


class Answer:
    """A response: status, headers, body as bytes, and as JSON if it is."""

    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()
        try:
            self.json = json.loads(self.body)
        except ValueError:
            self.json = None
        self.is_ours = isinstance(self.json, dict) and "X-Request-ID" in self.headers

    def __str__(self):
        said = self.json.get("message") or self.json.get("reason") or "" if isinstance(self.json, dict) else ""
        return f"{self.status} {said or self.headers.get_content_type()}"[:300]


class Service:
    """A service at a URL, asked directly: HTTP_PROXY and the like are ignored."""

    def __init__(self, url, key, timeout_s):
        """Raises Useless."""
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        try:
            self.host, self.port = parts.hostname, parts.port
        except ValueError as e:
            raise Useless(f"{url} is no URL: {e}") from e
        if parts.scheme not in ("http", "https") or not self.host:
            raise Useless(f"{url} is no URL such as http://127.0.0.1:5000")
        if re.search(r"[^!-~]", parts.path):
            raise Useless(f"{url} is no URL: write its path with %20 and the like")
        if re.search(r"[^!-~]", key or ""):
            raise Useless("this key cannot be sent: a key has only letters, digits and signs of ASCII")
        self.connection_class = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.path, self.timeout_s = parts.path.rstrip("/"), timeout_s
        self.headers = {"User-Agent": "smoke", **({"X-API-Key": key} if key else {})}

    def ask(self, path, body=None, content_type=None, accept="application/json", expect=200):
        """The Answer to a GET, or, with a body, a POST. Raises Failed, Useless."""
        connection = self.connection_class(self.host, self.port, timeout=self.timeout_s)
        headers = {**self.headers, "Accept": accept, **({"Content-Type": content_type} if content_type else {})}
        try:
            connection.request("GET" if body is None else "POST", self.path + path, body, headers)
            answer = Answer(connection.getresponse())
        except (OSError, http.client.HTTPException) as e:
            raise Useless(f"{connection.host}:{connection.port}: {why(e)}") from e
        except UnicodeError as e:  # of the host's name
            raise Useless(f"{self.host} is no host: {e}") from e
        finally:
            connection.close()
        if answer.status in (301, 302, 307, 308):
            raise Useless(f"it redirects to {answer.headers.get('Location')}: use that URL")
        if answer.status == 401 and answer.is_ours:
            raise Useless("401: this key is not valid" if "X-API-Key" in self.headers else
                          "401: the service needs a key: --key KEY, or make smoke KEY=…")
        if expect and answer.status != expect:
            raise Failed(f"{path.partition('?')[0]} answers {answer}")
        if expect and "X-Request-ID" not in answer.headers:
            raise Failed(f"{path.partition('?')[0]} answers without X-Request-ID")
        return answer


def why(e):
    """An exception of a connection, in words."""
    if isinstance(e, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {e.verify_message}"
    if isinstance(e, ssl.SSLError):
        return f"TLS fails ({e.reason or e}): is it http?"
    if isinstance(e, TimeoutError):
        return "no answer in time"
    if isinstance(e, socket.gaierror):
        return "there is no such host"
    if isinstance(e, http.client.HTTPException):
        return f"it speaks no HTTP ({type(e).__name__}): is this https?"
    return (getattr(e, "strerror", None) or str(e) or type(e).__name__).lower()


# --- the checks; each returns what it has seen, in words ---

def health(service, seen):
    answer = service.ask("/health", expect=None)
    if not answer.is_ours or "model_loaded" not in answer.json:
        raise Useless(f"/health answers {answer}: this is not the URL of the service")
    if answer.status != 200:
        raise Failed(f"unhealthy: {answer}")
    stand_in = answer.json.get("fallback_for")
    return (f"{answer.json['model']} on {answer.json['device']}, version {answer.json['version']}"
            + (f"; stands in for {stand_in}" if stand_in else ""))


def info(service, seen):
    model = seen["model"] = service.ask("/info" + ("?" + urllib.parse.urlencode({"model": seen["name"]})
                                                   if seen["name"] else "")).json["model"]
    return ", ".join(str(model[name]) for name in ("name", "engine", "precision") if model.get(name))


def prediction(service, seen):
    seen["sample"] = sample_of(seen["model"])
    seen["answer"] = predict(service, seen)
    return judge(seen["model"], seen["answer"])


def again(service, seen):
    if "answer" not in seen:
        raise Skipped("there was no first answer")
    if same(predict(service, seen)["predictions"], seen["answer"]["predictions"]):
        return "the same answer"
    if seen["model"]["engine"] == "own":
        return "another answer, as models of one's own may give"
    raise Failed("another answer to the same input")


def refusal(service, seen):
    if "model" not in seen:
        raise Skipped("what the model takes is unknown")
    is_file = "json" not in seen["model"]["takes"] and "text" not in seen["model"]["takes"]
    answer = service.ask(path_of(seen), b"{" if not is_file else b"this is no file of a kind that the model takes",
                         "application/json" if not is_file else sample_of(seen["model"])[1], expect=400)
    body = answer.json if isinstance(answer.json, dict) else {}
    if body.get("status") != "error" or not body.get("message") or \
            body.get("request_id") != answer.headers["X-Request-ID"]:
        raise Failed(f"the error lacks a message or its request's ID: {answer.body[:200]!r}")
    return f"a broken input gets 400 {body['error']}"


def metrics(service, seen):
    answer = service.ask("/metrics", accept="text/plain", expect=None)
    if answer.status in (403, 404) and not answer.is_ours:
        raise Skipped(f"{answer.status} from a proxy in between")
    if answer.status != 200 or b"model_server_requests_total{" not in answer.body:
        raise Failed(f"/metrics answers {answer}")
    return f"{sum(not line.startswith(b'#') for line in answer.body.splitlines())} series"


def docs(service, seen):
    document = service.ask("/openapi.json").json
    page = service.ask("/docs", accept="text/html")
    if "/predict" not in document.get("paths", {}) or b"swagger" not in page.body.lower():
        raise Failed("/openapi.json or /docs lacks its content")
    return f"OpenAPI {document['openapi']}, {len(document['paths'])} paths"


def open_inference(service, seen):
    if "/v2" not in service.ask("/").json.get("endpoints", {}):
        raise Skipped("OPEN_INFERENCE is off")
    if "answer" not in seen:
        raise Skipped("there was no answer to compare with")
    version = f"/versions/{seen['model']['version']}" if seen["model"].get("version") else ""
    path = f"/v2/models/{urllib.parse.quote(seen['model']['name'])}{version}"
    first = next((one["name"] for one in service.ask(path).json["inputs"] if one["datatype"] == "BYTES"), None)
    if first is None:
        raise Skipped("the model takes no bytes")
    data, content_type = seen["sample"]
    text = data.decode() if content_type == "application/json" else base64.b64encode(data).decode()
    if content_type == "application/json" and seen["model"].get("field"):
        value = json.loads(data)[seen["model"]["field"]]
        text = value if isinstance(value, str) else json.dumps(value)
    body = {"inputs": [{"name": first, "shape": [1], "datatype": "BYTES", "data": [text]}],
            "outputs": [{"name": "predictions"}]}
    output, = service.ask(path + "/infer", json.dumps(body).encode(), "application/json").json["outputs"]
    if seen["model"]["engine"] != "own" and not same(json.loads(output["data"][0]), seen["answer"]["predictions"]):
        raise Failed("another answer than /predict's")
    return "the answer of /predict"


OF_SERVICE = {"health": health, "metrics": metrics, "docs": docs}
OF_MODEL = {"info": info, "predict": prediction, "again": again, "error": refusal, "v2": open_inference}
CHECKS = ("health", "info", "predict", "again", "error", "metrics", "docs", "v2")


# --- the sample, and what is known of its answer ---

def sample_of(model):
    """(body, its Content-Type) for a model of GET /info. Raises Skipped."""
    takes = model["takes"]
    if "picture" in takes:
        name = "astronaut.jpg" if "traits" in model else "cat.jpg"  # a face, a cat
        with open(os.path.join(SAMPLES, name), "rb") as file:
            return file.read(), "image/jpeg"
    if "audio" in takes:
        return tone(), "audio/wav"
    example = model.get("example")
    if example is None:
        raise Skipped(f"the model takes {' or '.join(takes)} and names no example")
    return json.dumps({model["field"]: example} if model.get("field") else example).encode(), "application/json"


def tone():
    """A second of 440 Hz as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", None))
        out.writeframes(b"".join(struct.pack("<h", round(9000 * math.sin(2 * math.pi * 440 * i / 16000)))
                                 for i in range(16000)))
    return file.getvalue()


def predict(service, seen):
    return service.ask(path_of(seen), *seen["sample"]).json


def path_of(seen):
    return f"/models/{urllib.parse.quote(seen['name'], safe='@')}/predict" if seen["name"] else "/predict"


def judge(model, answer):
    """What the answer says, in words. Raises Failed if it cannot be right."""
    found = answer["predictions"]
    if "num_classes" not in model:
        return "a model of one's own has answered"
    if isinstance(found, dict):
        if set(found) != set(model["traits"]) or not all(0 <= score <= 1 for score in found.values()):
            raise Failed(f"scores out of 0 to 1: {json.dumps(found)}")
        if answer["metadata"]["face_detected"] is False and answer["metadata"]["method"] != "middle":
            raise Failed("no face was found in the picture of one")
        return ", ".join(f"{trait} {score:.2f}" for trait, score in found.items())
    shares = [one["confidence"] for one in found]
    if shares != sorted(shares, reverse=True) or not 0 <= shares[-1] <= shares[0] <= 1 or sum(shares) > 1.001:
        raise Failed(f"confidences that cannot be: {shares}")
    best = f"{found[0]['class']} {shares[0]:.3f}"
    if model["weights"]["source"].startswith("MODEL_PATH"):
        return best
    if model["num_classes"] == 1000 and found[0]["class_id"] not in CATS:
        raise Failed(f"the picture of a cat is called {best}")
    return f"{best}, as expected"


def same(one, other):
    """Whether two answers agree, their numbers within SAME_WITHIN."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) or isinstance(other, float):
        return isinstance(one, int | float) and isinstance(other, int | float) and abs(one - other) <= SAME_WITHIN
    return one == other


def others(service):
    """[{"name": NAME or NAME@VERSION}] of further models: all but a default one without versions."""
    listed = [(one["name"] + (f"@{one['version']}" if one.get("version") else ""), one.get("default"))
              for one in service.ask("/models", expect=None).json.get("models", ())]
    return [{"name": name} for name, is_default in listed if not is_default or "@" in name] if len(listed) > 1 else []


def main(url, key=None, timeout_s=30):
    """Run all checks and print a line for each. Returns the exit code."""
    started, results, seen, checks = time.monotonic(), [], {"name": None}, [(name, None) for name in CHECKS]
    try:
        service = Service(url, key, timeout_s)
    except Useless as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    for name, about in checks:
        began, is_useless = time.monotonic(), False
        try:
            result, said = "ok", (OF_SERVICE | OF_MODEL)[name](service, about or seen)
            if name == "info" and not about:
                checks += [(check, other) for other in others(service) for check in OF_MODEL]
        except Skipped as e:
            result, said = "skipped", e
        except Failed as e:
            result, said, is_useless = "FAILED", e, isinstance(e, Useless)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:  # of another content than expected
            result, said = "FAILED", f"the answer is not as expected: {type(e).__name__} {e}"
        of_model = f"{about['name']}: " if about else ""
        print(f"{result:7}  {name:7}  {1000 * (time.monotonic() - began):5.0f} ms  {of_model}{said}", flush=True)
        results.append(result)
        if is_useless:
            break
    more = [(results.count("skipped"), "skipped"), (len(checks) - len(results), "not tried")]
    print(", ".join([f"{results.count('ok')} ok", f"{results.count('FAILED')} FAILED",
                     *(f"{number} {what}" for number, what in more if number),
                     f"{1000 * (time.monotonic() - started):.0f} ms in all"]))
    return 1 if "FAILED" in results else 0
