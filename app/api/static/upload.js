/* fetch that tells how much of the body is sent, which fetch itself cannot. */

const NO_BODY = [101, 204, 205, 304];

/* A Response, as soon as its headers are there. onSent(bytes, of how many). */
export function send(url, {method, headers, body, signal}, onSent) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    let events = null, read = 0;  // the controller of a stream of events, and how much of the text is in it

    const lost = () => {
      const error = new TypeError("The connection to the service was lost.");
      events ? events.error(error) : reject(error);
    };
    const answer = content => resolve(new Response(NO_BODY.includes(request.status) ? null : content, {
      status: request.status, headers: headersOf(request)}));
    const passOn = () => {
      if (!events || request.responseText.length === read) return;
      events.enqueue(new TextEncoder().encode(request.responseText.slice(read)));
      read = request.responseText.length;
    };
    request.upload.addEventListener("progress", ({loaded, total}) => onSent(loaded, total));
    request.addEventListener("readystatechange", () => {
      if (request.readyState !== XMLHttpRequest.HEADERS_RECEIVED) return;
      const isStream = (request.getResponseHeader("Content-Type") || "").startsWith("text/event-stream");
      if (!isStream) request.responseType = "blob";
      else answer(new ReadableStream({start: controller => { events = controller; }, cancel: () => request.abort()}));
    });
    request.addEventListener("progress", passOn);
    request.addEventListener("load", () => {
      if (!events) return answer(request.response);
      passOn();
      events.close();
    });
    for (const name of ["error", "timeout"]) request.addEventListener(name, lost);
    signal?.addEventListener("abort", () => {
      request.abort();
      events ? events.error(signal.reason) : reject(signal.reason);
    });

    request.open(method, url);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.send(body);
  });
}

function headersOf(request) {
  const lines = request.getAllResponseHeaders().trim().split("\r\n").filter(Boolean);
  return lines.map(line => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trim()]);
}
