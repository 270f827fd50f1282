/* Requests to the service, and its streams of server-sent events. */
import {$} from "./dom.js";

export const here = new URL(".", location.href);
let askForKey = () => {};

/* call(): when the service wants a key, which is then read from #api-key. */
export function whenKeyIsNeeded(call) {
  askForKey = call;
}

function failure(body, words, response) {
  const wait = Number(response?.headers.get("Retry-After")) || null;
  return Object.assign(new Error(body.message || words), {body, status: response?.status, wait});
}

/* A Response that is a success. The error of any other has its `body`, `status`, and the seconds to `wait`, or null. */
async function opened(path, request) {
  const key = $("#api-key")?.value;
  const headers = {...request.headers, ...(key ? {Authorization: `Bearer ${key}`} : {})};
  const response = await fetch(new URL(path, here), {...request, headers});
  if (response.status === 401) askForKey();
  if (response.ok) return response;
  throw failure(await response.json().catch(() => ({})), `The service answered ${response.status}.`, response);
}

/* The answer as {response, body}, or {response, media} if it is a file. */
export async function ask(path, request = {}) {
  const response = await opened(path, request);
  const isJson = (response.headers.get("Content-Type") || "").startsWith("application/json");
  return isJson ? {response, body: await response.json()} : {response, media: await response.blob()};
}

/* Yields {event, data, response} of an answer to stream=true: frames, errors of single pictures, and the end. */
export async function* stream(path, request) {
  const response = await opened(path, request);
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
