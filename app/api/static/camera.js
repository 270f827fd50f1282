/* The camera: a single picture, or live: its pictures are answered as they come. */
import {showCertainty, showPredictions} from "./card.js";
import {$, boxes, element, isObject, pause, say} from "./dom.js";
import {asOption, controls, nameOf, overlay, pickRows} from "./looked.js";
import {stream} from "./service.js";

const LONGEST = 640;       // side of a live picture, in pixels
const MOST_WAITING = 4;    // pictures that go into one request
const SHORTEST_MS = 66, LONGEST_MS = 1000;  // between two pictures
const AGAIN_S = 2;         // after a failure that says nothing of when

let page = {};             // what set the camera up
let live = null;           // what goLive makes, while it is live

/* page: take(files), target() → {url, options, model}, complain(text). */
export function setUpCamera(hooks) {
  page = hooks;
  $("#camera").addEventListener("click", open);
  $("#close-camera").addEventListener("click", () => { closeCamera(); $("#camera").focus(); });
  $("#shoot").addEventListener("click", shoot);
  $("#go-live").addEventListener("click", () => live ? stop() : goLive());
  $("#live-answer .bars").addEventListener("pointerdown", () => { if (live) live.isHeld = true; });
  for (const name of ["pointerup", "pointercancel"]) {  // a click follows
    document.addEventListener(name, () => setTimeout(() => { if (live) live.isHeld = false; }, 50));
  }
}

/* Whether there is a camera that the page may ask for: browsers offer none over plain HTTP, but on this computer. */
export async function hasCamera() {
  if (!navigator.mediaDevices?.getUserMedia) return false;
  const devices = await navigator.mediaDevices.enumerateDevices().catch(() => []);
  return devices.some(({kind}) => kind === "videoinput");
}

async function open() {
  page.complain("");
  try {
    $("#live").srcObject = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
  } catch (error) {
    return page.complain({
      NotAllowedError: "The camera cannot be used without your permission. "
        + "Give it in the browser's settings of this page.",
      NotFoundError: "There is no camera."}[error.name] || "The camera cannot be used; perhaps another program does.");
  }
  for (const track of $("#live").srcObject.getTracks()) {
    track.addEventListener("ended", () => {
      closeCamera();
      page.complain("The camera is gone.");
    });
  }
  $("#viewfinder").hidden = false;
  $("#shoot").focus();
}

/* A camera that nobody watches must not run on; nor is anything sent then. */
document.addEventListener("visibilitychange", () => {
  if (!document.hidden || $("#viewfinder").hidden) return;
  closeCamera();
  page.complain("The camera was closed as the page was hidden.");
});

export function closeCamera() {
  stop();
  $("#live").srcObject?.getTracks().forEach(track => track.stop());
  $("#live").srcObject = null;
  $("#viewfinder").hidden = true;
}

/* A JPEG of what the camera sees, null before its first picture. */
function picture(longest, quality) {
  const {videoWidth, videoHeight} = $("#live");
  if (!videoWidth) return Promise.resolve(null);
  const scale = Math.min(1, longest / Math.max(videoWidth, videoHeight));
  const [width, height] = [videoWidth, videoHeight].map(side => Math.round(side * scale));
  const canvas = element("canvas", {width, height});
  canvas.getContext("2d").drawImage($("#live"), 0, 0, width, height);
  return new Promise(resolve => canvas.toBlob(resolve, "image/jpeg", quality));
}

async function shoot() {
  const blob = await picture(Infinity, 0.92);
  if (!blob) return page.complain("The camera has no picture yet; try again in a moment.");
  closeCamera();
  $("#camera").focus();
  page.take([new File([blob], "camera.jpg", {type: "image/jpeg"})]);
}

/* ---- live ---- */

async function goLive() {
  page.complain("");
  const mine = live = {waiting: [], period: 200, controller: new AbortController(), urls: [],
                       chosen: null, looked: null,  // {model, name, option}; {root, …} of `controls`
                       isHeld: false};  // whether a row is being pressed, which then stays where it is
  $("#go-live").textContent = "Stop";
  $("#viewfinder").classList.add("live");
  $("#live-answer").hidden = false;
  note("Waiting for the first answer…");
  say("Live");
  gather(mine);
  while (live === mine) await answerWaiting(mine);
}

function stop() {
  if (!live) return;
  live.controller.abort();
  live.urls.forEach(url => URL.revokeObjectURL(url));
  $("#go-live").textContent = "Go live";
  $("#viewfinder").classList.remove("live");
  $("#live-answer").hidden = true;
  live.looked?.root.remove();
  live = null;
  $("#live-answer .bars").replaceChildren();
  $("#live-answer h2").textContent = "";
  for (const drawn of document.querySelectorAll("#stage svg, #stage .overlay")) drawn.remove();
}

const note = text => { $("#live-note").textContent = text; };

/* Pictures for the next request, about as fast as they are answered; the oldest go if there are too many. */
async function gather(mine) {
  while (live === mine) {
    const blob = document.hidden ? null : await picture(LONGEST, 0.8);
    if (blob) mine.waiting = [...mine.waiting, blob].slice(-MOST_WAITING);
    await pause(mine.period / 1000);
  }
}

/* Sends what waits in one request, and shows the answers as they come. There is never a second request. */
async function answerWaiting(mine) {
  const pictures = mine.waiting.splice(0);
  if (!pictures.length) return pause(0.02);
  const {url, options, model} = page.target();
  if (mine.chosen?.model !== model) mine.chosen = null;
  if (mine.chosen?.option !== undefined && options.explain) options.explain_class = mine.chosen.option;
  const body = new FormData();
  pictures.forEach((blob, i) => body.append("files", blob, `camera-${i}.jpg`));
  for (const [name, value] of Object.entries(options)) body.append(name, value);
  const started = performance.now();
  let newest = -1;
  try {
    for await (const {event, data} of stream(`${url}?stream=true`, {method: "POST", body,
                                                                    signal: mine.controller.signal})) {
      if (live !== mine) return;
      if (event === "end" || data.index < newest) continue;  // they may overtake each other
      newest = data.index;
      show(mine, event, data, model);
    }
    const each = (performance.now() - started) / pictures.length;
    mine.period = Math.min(LONGEST_MS, Math.max(SHORTEST_MS, 0.7 * mine.period + 0.3 * each));
    if (newest >= 0 && !$("#live-answer").classList.contains("failed"))
      note(`${(1000 / Math.max(each, mine.period)).toFixed(1)} pictures per second, ${Math.round(each)} ms each`);
  } catch (error) {
    if (live === mine) await recover(error);
  }
}

/* Goes on after what passes, when the service says so; ends what does not. */
async function recover(error) {
  const passes = !error.status || error.status === 429 || error.status >= 500;
  if (!passes) {
    stop();
    return page.complain(error.message);
  }
  const seconds = error.wait || AGAIN_S;
  const words = error.body ? error.message : "The service cannot be reached.";
  note(`${words} Trying again in ${seconds} s.`);
  say($("#live-note").textContent);
  await pause(seconds);
  if (live) live.waiting = [];  // what is old by now
}

function show(mine, event, data, model) {
  if (mine.isHeld) return;
  const {predictions, metadata} = data;
  const isError = event === "error";
  $("#live-answer").classList.toggle("failed", isError);
  for (const drawn of document.querySelectorAll("#stage svg, #stage .overlay")) drawn.remove();
  if (isError) return note(data.message);
  const focused = document.activeElement.closest("#live-answer .pick");
  if (!metadata.explanations && $("#live-answer .pick")) $("#live-answer .bars").replaceChildren();
  showPredictions($("#live-answer"), predictions, metadata.spread);
  showCertainty($("#live-answer"), metadata.uncertainty);
  mine.urls.splice(0).forEach(url => URL.revokeObjectURL(url));
  showLooked(mine, data, model);
  if (focused && !focused.isConnected) {  // its row has given way to another one
    const buttons = [...document.querySelectorAll("#live-answer .pick")];
    (buttons.find(button => button.textContent === focused.textContent) || buttons[0])?.focus();
  }
  const box = metadata.frames?.[0]?.face_box;
  if (box) $("#stage").append(boxes(metadata.image_size, box));
}

/* The map of what the user has chosen, else of the first class or trait. */
function showLooked(mine, {predictions, metadata: {explanations}}, model) {
  if (!explanations) {
    mine.looked?.root.remove();
    mine.looked = null;
    return;
  }
  const isOfTraits = "trait" in explanations[0];
  if (!mine.looked) {
    const follow = element("button", {type: "button", className: "button small"}, "Follow the first class");
    follow.addEventListener("click", () => { mine.chosen = null; say("Following the first class"); });
    mine.looked = {...controls(isOfTraits, follow), follow};
    mine.looked.slider.addEventListener("input", () => fade(mine));
    $("#live-answer .bars").after(mine.looked.root);
  }
  const entry = explanations.find(one => nameOf(one) === mine.chosen?.name) || explanations[0];
  const name = nameOf(entry);
  mine.looked.follow.hidden = isOfTraits || !mine.chosen;
  mine.looked.show(name, entry, explanations);
  pickRows($("#live-answer"), name, (chosen, row) => {
    const option = isObject(mine.predictions) ? undefined : asOption(mine.model, mine.predictions[row]);
    mine.chosen = {model: mine.model, name: chosen, option};
    say(`Where it looks for ${chosen}`);
  });
  Object.assign(mine, {predictions, model});
  $("#stage").append(overlay(entry.overlay, `Where the model looked for ${name}`, mine.urls));
  fade(mine);
}

function fade(mine) {
  const shown = $("#stage .overlay");
  if (shown) shown.style.opacity = mine.looked.slider.value / 100;
}
