/* Requests to the service, and its streams of server-sent events. */
import {send} from "./upload.js";

export const here = new URL(".", location.href);
const KEY = "api-key";  // in the browser's storage for this tab, which ends with it

let askForKey = () => {};
let unsaved = "";  // the key where the browser refuses storage

/* call(wasGiven): when the service wants a key, or another one. */
export function whenKeyIsNeeded(call) {
  askForKey = call;
}

export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return unsaved;
  }
}

export function setKey(value) {
  try {
    value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY);
  } catch {
    unsaved = value;
  }
}

export const authorization = () => key() ? {Authorization: `Bearer ${key()}`} : {};

function failure(body, words, response) {
  const wait = response?.headers.has("Retry-After") ? Number(response.headers.get("Retry-After")) || 1 : null;
  return Object.assign(new Error(body.message || words), {body, status: response?.status, wait});
}

/* A Response that is a success. The error of any other has its `body`, `status`, and the seconds to `wait`, or null.
   One without a `status`: there was no response. */
async function opened(path, request, onSent) {
  const url = new URL(path, here);
  const used = key();
  const sent = {...request, headers: {...request.headers, ...authorization()}};
  const response = await (onSent ? send(url, sent, onSent) : fetch(url, sent));
  if (response.status === 401 && used === key()) askForKey(used !== "");
  if (response.ok) return response;
  throw failure(await response.json().catch(() => ({})), `The service answered ${response.status}.`, response);
}

/* The answer as {response, body}, or {response, media} if it is a file.
   onSent(bytes, of how many): as the request's body goes out. */
export async function ask(path, request = {}, onSent = null) {
  const response = await opened(path, request, onSent);
  const isJson = (response.headers.get("Content-Type") || "").startsWith("application/json");
  return isJson ? {response, body: await response.json()} : {response, media: await response.blob()};
}

/* Whether there was no answer of the service: none at all, or one that a proxy made in its place. */
export const isAway = ({status, body}) => !body?.error && (!status || [502, 503, 504].includes(status));

/* Yields {event, data, response} of an answer to stream=true: frames, errors of single pictures, and the end. */
export async function* stream(path, request, onSent = null) {
  const response = await opened(path, request, onSent);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", isWhole = false;
  try {
    for (;;) {
      const {done, value} = await reader.read();
      if (done && isWhole) return;
      if (done) throw failure({}, "The connection ended before the answer was complete.");
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        if (part.startsWith(":")) continue;  // a comment, so that the connection does not seem idle
        const [, event, json] = part.match(/^event: (.*)\ndata: (.*)$/);
        const data = JSON.parse(json);
        if (event === "error" && !("index" in data)) throw failure(data);
        isWhole = event === "end";
        yield {event, data, response};
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
