/* Sends jobs, a few at a time, until each has an answer or cannot have one.

   A job: {name, options, url, model} with either file, or input (the members of a JSON body) and its text; with its
   card and, at the end, answer ({response, body or media}) and milliseconds, or problem (an Error). */
import {untilKeyIsAccepted} from "./key.js";
import {json} from "./curl.js";
import {pause} from "./dom.js";
import {isThere, rest, untilBack, untilFree} from "./pauses.js";
import {ask, isAway, stream} from "./service.js";

const AT_ONCE = 2;    // requests that the page has under way at a time
const MOST_TRIES = 4; // of a job that fails while the service answers others
const AGAIN_S = 2;    // after a refusal that says nothing of when
const PASSING = ["OVERLOADED", "RATE_LIMITED", "SHUTTING_DOWN"];  // however often: they say nothing of the file

const waiting = [];
let running = 0;
let tell = {};  // what the page does when a job goes on: sending(job, bytes, all), frame(job, data, number), ended(job)

export function setUpQueue(hooks) {
  tell = hooks;
}

/* Jobs are sent in this order, after those that wait already. */
export function send(jobs) {
  for (const job of jobs) Object.assign(job, {state: "waiting", tries: 0, answer: undefined, problem: undefined,
                                              controller: new AbortController()});
  waiting.push(...jobs);
  work();
}

export function cancel(job) {
  const place = waiting.indexOf(job);
  if (place >= 0) waiting.splice(place, 1);
  job.controller.abort();
}

function work() {
  while (running < AT_ONCE && waiting.length) {
    running += 1;
    see(waiting.shift()).finally(() => { running -= 1; work(); });
  }
}

/* Sends a job until that makes no sense any more. */
async function see(job) {
  const {signal} = job.controller;
  for (;;) {
    await untilFree();
    if (signal.aborted) return;
    const started = performance.now();
    try {
      job.state = "sending";
      tell.sending(job, 0, 0);
      job.answer = await request(job);
      job.milliseconds = performance.now() - started;
    } catch (error) {
      if (signal.aborted) return;
      if (await isWorthAnother(job, error)) continue;
      job.problem = error;
    }
    if (signal.aborted) return;
    job.state = job.answer ? "answered" : "failed";
    return tell.ended(job);
  }
}

/* Whether to send the job again; returns after the pause that this needs. */
async function isWorthAnother(job, error) {
  const {status, body, wait} = error;
  const code = body?.error;
  if (status === 401) {
    tell.held(job, "Waiting for the API key…");
    await untilKeyIsAccepted();
    return true;
  }
  if (isAway(error)) {
    if (job.file && !await isReadable(job.file)) {
      error.message = `${job.name} cannot be read any more. Choose it again.`;
      error.body = {};
      return false;
    }
    if (!await isThere()) {
      tell.held(job, "Waiting for the service…");
      await untilBack();
      return true;
    }
    job.tries += 1;
    await pause(job.tries / 2);
    return job.tries < MOST_TRIES;
  }
  if (wait === null && !PASSING.includes(code)) return false;
  if (!PASSING.includes(code)) job.tries += 1;
  if (job.tries >= MOST_TRIES) return false;
  tell.held(job, "Waiting: the service is busy…");
  await rest(error.message, wait ?? AGAIN_S);
  return true;
}

/* Whether the file is still as it was when it was chosen. */
const isReadable = file => file.slice(0, 1).arrayBuffer().then(() => true, () => false);

export const isOfFrames = ({file, model}) => Boolean(file?.type.startsWith("video/") && model.preprocessing);

async function request(job) {
  const sent = {method: "POST", signal: job.controller.signal, ...await packed(job)};
  const onSent = (bytes, all) => tell.sending(job, bytes, all);
  if (!isOfFrames(job)) return ask(job.url, sent, onSent);
  let frames = 0, answer;
  for await (const {event, data, response} of stream(`${job.url}?stream=true`, sent, onSent)) {
    if (event === "end") answer = {response, body: data};
    else tell.frame(job, data, frames += 1);
  }
  return answer;
}

/* The body of a request, with its headers: a file goes as a form, anything else as JSON. */
export async function packed({file, input, options}) {
  if (file) {
    const body = new FormData();
    body.append("file", file, file.name);
    for (const [name, value] of Object.entries(options)) body.append(name, value);
    return {body};
  }
  const values = await Promise.all(Object.values(options).map(value => value instanceof File ? base64(value) : value));
  const chosen = Object.fromEntries(Object.keys(options).map((name, i) => [name, values[i]]));
  return {headers: {"Content-Type": "application/json"}, body: json(input, chosen)};
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.replace(/^[^,]*,/, ""));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
