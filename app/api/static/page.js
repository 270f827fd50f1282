"use strict";

const MOST_CARDS = 24;
const AT_ONCE = 2;  // requests that the page has under way at a time
const SAMPLES = {classification: "cat.jpg"};  // of any other task: a face

const $ = (selector, within = document) => within.querySelector(selector);
const here = new URL(".", location.href);
const queue = [];
let service = {model: {task: "classification", name: ""}, config: {}};
let running = 0;

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function drawing(viewBox, ...shapes) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  if (viewBox) svg.setAttribute("viewBox", viewBox);
  svg.setAttribute("aria-hidden", "true");
  for (const attributes of shapes) {
    const rect = document.createElementNS(svg.namespaceURI, "rect");
    for (const [name, value] of Object.entries(attributes)) rect.setAttribute(name, value);
    svg.append(rect);
  }
  return svg;
}

const say = text => { $("#status").textContent = text; };
const complain = text => { $("#problem").textContent = text; };

/* ---- the service ---- */

async function ask(path, request = {}) {
  const key = $("#api-key")?.value;
  const response = await fetch(new URL(path, here), {...request, headers: key ? {Authorization: `Bearer ${key}`} : {}});
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) askForKey();
  if (!response.ok) throw Object.assign(new Error(body.message || `The service answered ${response.status}.`), {body});
  return {body, response};
}

function askForKey() {
  if ($("#api-key")) return;
  const input = element("input", {id: "api-key", type: "password", autocomplete: "off"});
  $("#options").prepend(element("label", {}, "API key", input));
  input.addEventListener("change", describe);
  input.focus();
}

async function describe() {
  try {
    service = (await ask("info")).body;
    complain("");
  } catch (error) {
    return complain(error.message);
  }
  const {model, config} = service;
  const size = model.total_parameters ? `${(model.total_parameters / 1e6).toFixed(1)} M parameters` : "";
  $("#name").textContent = model.name;
  document.title = `Try ${model.name}`;
  $("#model").textContent = [model.task, size, model.engine, model.precision, model.device].filter(Boolean).join(" · ");
  const takesVideo = (config.allowed_extensions || []).includes("mp4");
  $("#choose").accept = takesVideo ? "image/*,video/*" : "image/*";
  $("#drop strong").textContent = takesVideo ? "Drop pictures or videos here" : "Drop pictures here";
  showOptions(model.task === "classification", takesVideo);
}

function showOptions(classifies, takesVideo) {
  const option = (name, text, input) => {
    input.name = name;
    return element("label", {}, text, input);
  };
  const number = (value, max) => element("input", {type: "number", min: 1, max, value, inputMode: "numeric"});
  const choice = (chosen, ...values) => element("select", {}, ...values.map(
    value => element("option", {value, selected: value === chosen}, value)));
  const fields = classifies
    ? [option("top_k", "Classes", number(service.config.top_k || 5, 10))]
    : [option("method", "Crop", choice(service.config.face_method, "face+middle", "face", "middle")),
       option("tta", "Average with mirror image", element("input", {type: "checkbox", checked: service.config.tta}))];
  if (takesVideo) fields.push(option("frames", "Frames of a video", number(service.config.video_frames || 1, 32)));
  const key = $("#api-key")?.closest("label");
  $("#options").replaceChildren(...[key, ...fields].filter(Boolean));
}

function chosenOptions(file) {
  const chosen = {};
  for (const input of document.querySelectorAll("#options [name]")) {
    if (input.name === "frames" && !file.type.startsWith("video/")) continue;
    if (input.value !== "") chosen[input.name] = input.type === "checkbox" ? String(input.checked) : input.value;
  }
  return chosen;
}

/* ---- from files to cards ---- */

function take(files) {
  complain("");
  $("#viewfinder").hidden || closeCamera();
  document.body.classList.add("has-results");
  for (const file of [...files].reverse()) {
    const card = $("#card").content.firstElementChild.cloneNode(true);
    card.classList.add("waiting");
    card.setAttribute("aria-busy", "true");
    $("h2", card).textContent = "Looking…";
    $("figcaption", card).textContent = file.name;
    showPicture(card, file);
    $("#results").prepend(card);
    queue.unshift({card, file, options: chosenOptions(file)});
  }
  while ($("#results").children.length > MOST_CARDS) {
    const oldest = $("#results").lastElementChild;
    URL.revokeObjectURL(oldest.dataset.url);
    oldest.remove();
  }
  say(files.length === 1 ? `Looking at ${files[0].name}` : `Looking at ${files.length} files`);
  work();
}

async function work() {
  while (running < AT_ONCE && queue.length) {
    running += 1;
    predict(queue.shift()).finally(() => { running -= 1; work(); });
  }
}

async function predict({card, file, options}) {
  const body = new FormData();
  body.append("file", file, file.name);
  for (const [name, value] of Object.entries(options)) body.append(name, value);
  $("code", card).textContent = curl(file.name, options);
  const started = performance.now();
  let answer;
  try {
    answer = await ask("predict", {method: "POST", body});
    showAnswer(card, answer, performance.now() - started);
  } catch (error) {
    const message = error.body ? error.message : "The service cannot be reached; is it still running?";
    $("h2", card).textContent = "No answer";
    $(".error", card).textContent = message;
    $(".error", card).hidden = false;
    $(".json", card).textContent = JSON.stringify(error.body || {}, null, 2);
    say(`${file.name}: ${message}`);
  }
  card.classList.remove("waiting");
  card.removeAttribute("aria-busy");
}

function curl(filename, options) {
  const parts = [`file=@${forCurl(filename)}`, ...Object.entries(options).map(([name, value]) => `${name}=${value}`)];
  return `curl ${parts.map(part => `-F ${forShell(part)}`).join(" ")} ${forShell(String(new URL("predict", here)))}`;
}

/* curl takes several files separated by commas, options of a file after a semicolon, and - for standard input. */
function forCurl(filename) {
  if (filename === "-") return "./-";
  return /[",;\\]|^\s|\s$/.test(filename) ? `"${filename.replace(/["\\]/g, "\\$&")}"` : filename;
}

/* Control characters would act on the terminal that the line is pasted into, and others change how it looks: they are
   written as octal bytes, which bash, zsh and ksh read. */
function forShell(text) {
  const unseen = /[\p{C}\p{Zl}\p{Zp}]/gu;
  if (/^[\w@%+=:,./-]+$/.test(text)) return text;
  if (text.search(unseen) < 0) return `'${text.replaceAll("'", "'\\''")}'`;
  const octal = character => Array.from(new TextEncoder().encode(character),
                                        byte => "\\" + byte.toString(8).padStart(3, "0")).join("");
  return `$'${text.replace(/['\\]/g, "\\$&").replace(unseen, octal)}'`;
}

/* ---- a card ---- */

function showPicture(card, file) {
  const url = card.dataset.url = URL.createObjectURL(file);
  const isVideo = file.type.startsWith("video/");
  const picture = isVideo ? element("video", {src: url, controls: true, muted: true, playsInline: true})
    : element("img", {src: url, alt: `The picture you sent: ${file.name}`});
  picture.addEventListener("error", () => picture.replaceWith(element("p", {className: "quiet"}, "No preview")));
  $(".picture", card).append(picture);
}

function showAnswer(card, {body, response}, milliseconds) {
  const {predictions, metadata} = body;
  const classes = Array.isArray(predictions);
  const rows = classes
    ? predictions.map(p => ({label: p.class, share: p.confidence, value: `${(100 * p.confidence).toFixed(1)} %`}))
    : Object.entries(predictions).map(([trait, score]) => ({label: trait, share: score, value: score.toFixed(2)
        + (metadata.spread?.[trait] ? ` ± ${metadata.spread[trait].toFixed(2)}` : "")}));
  $("h2", card).textContent = classes ? rows[0].label : "Apparent traits";
  $(".bars", card).classList.toggle("traits", !classes);
  $(".bars", card).replaceChildren(...rows.map(({label, share, value}) => {
    const width = `${100 * Math.min(1, Math.max(0, share))}%`;
    return element("li", {className: classes ? "" : "trait"}, drawing(null, {width, height: "100%"}),
      element("span", {}, label), element("span", {className: "value"}, value));
  }));
  const [width, height] = metadata.image_size;
  const face = metadata.face_detected === undefined || metadata.method === "middle" ? []
    : [metadata.face_detected ? "face found" : "no face found"];
  $("figcaption", card).textContent = [metadata.filename, `${width} × ${height}`, ...face].filter(Boolean).join(" · ");
  showBoxes(card, metadata);
  showTimings(card, metadata.timings_ms, milliseconds, response.headers.get("X-Cache"));
  $(".json", card).textContent = JSON.stringify(body, null, 2);
  say(`${metadata.filename}: ${rows.map(({label, value}) => `${label} ${value}`).join(", ")}`);
}

function showBoxes(card, {frames, image_size: [width, height]}) {
  const boxed = (frames || []).filter(frame => frame.face_box);
  const video = $(".picture video", card);
  const draw = frame => {
    $(".picture > svg", card)?.remove();
    if (!frame) return;
    const [x, y, w, h] = frame.face_box;
    const box = {x, y, width: w, height: h};
    $(".picture", card).append(drawing(`0 0 ${width} ${height}`, {...box, class: "under"}, {...box, class: "box"}));
  };
  if (!video) return draw(boxed[0]);
  const current = () => boxed.find(frame => Math.abs(frame.time_s - video.currentTime) < 0.06);
  for (const event of ["timeupdate", "seeked"]) video.addEventListener(event, () => draw(current()));
  if (boxed.length) video.currentTime = boxed[0].time_s;
  if (boxed.length < 2) return;
  $("figure", card).append(element("div", {className: "buttons"}, ...boxed.map(frame => {
    const button = element("button", {className: "button", type: "button"}, `${frame.time_s.toFixed(1)} s`);
    button.addEventListener("click", () => { video.pause(); video.currentTime = frame.time_s; });
    return button;
  })));
}

function showTimings(card, timings, milliseconds, cache) {
  const stages = Object.entries(timings);
  const total = stages.reduce((sum, [, ms]) => sum + ms, 0) || 1;
  let x = 0;
  const shapes = stages.map(([, ms], i) => {
    const width = 100 * ms / total;
    x += width;
    return {x: x - width, width, height: 1, class: `s${i % 6}`};
  });
  const strip = drawing("0 0 100 1", ...shapes);
  strip.setAttribute("preserveAspectRatio", "none");
  $(".strip", card).replaceChildren(strip);
  $(".timings p", card).replaceChildren(
    ...stages.map(([stage, ms], i) => element("span", {className: `stage s${i % 6}`}, element("b", {}, `${stage} ${ms.toFixed(1)} ms`))),
    element("br"), `${Math.round(milliseconds)} ms in all, as seen from here`,
    ...(cache ? [`; cache ${cache}`] : []));
  $(".timings", card).hidden = false;
}

/* ---- the camera ---- */

async function openCamera() {
  complain("");
  try {
    $("#live").srcObject = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
  } catch {
    return complain("The camera cannot be used: the browser needs your permission, and this page has to come over "
      + "HTTPS or from this computer.");
  }
  $("#viewfinder").hidden = false;
  $("#shoot").focus();
}

function closeCamera() {
  $("#live").srcObject?.getTracks().forEach(track => track.stop());
  $("#live").srcObject = null;
  $("#viewfinder").hidden = true;
}

function shoot() {
  const {videoWidth: width, videoHeight: height} = $("#live");
  if (!width) return complain("The camera has no picture yet; try again in a moment.");
  const canvas = element("canvas", {width, height});
  canvas.getContext("2d").drawImage($("#live"), 0, 0);
  canvas.toBlob(blob => {
    closeCamera();
    $("#camera").focus();
    take([new File([blob], "camera.jpg", {type: "image/jpeg"})]);
  }, "image/jpeg", 0.92);
}

/* ---- what the user does ---- */

$("#upload").addEventListener("submit", event => event.preventDefault());
$("#choose").addEventListener("change", event => {
  if (event.target.files.length) take(event.target.files);
  event.target.value = "";  // the same file may be chosen again
});
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, event => {
    event.preventDefault();
    $("#drop").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) take(event.dataTransfer.files);
  });
}
document.addEventListener("paste", event => {
  if (event.clipboardData.files.length) take(event.clipboardData.files);
});
$("#sample").addEventListener("click", async () => {
  const name = SAMPLES[service.model.task] || "astronaut.jpg";
  const response = await fetch(new URL(`static/${name}`, here));
  take([new File([await response.blob()], name, {type: "image/jpeg"})]);
});
$("#camera").addEventListener("click", openCamera);
$("#close-camera").addEventListener("click", () => { closeCamera(); $("#camera").focus(); });
$("#shoot").addEventListener("click", shoot);
$("#results").addEventListener("click", async event => {
  if (!event.target.matches(".copy")) return;
  const code = $("code", event.target.parentElement);
  try {
    await navigator.clipboard.writeText(code.textContent);
    event.target.textContent = "Copied";
    say("Copied");
  } catch {  // without HTTPS there is no clipboard: select it for the user
    getSelection().selectAllChildren(code);
    say("Selected; copy it with the keyboard");
  }
  setTimeout(() => { event.target.textContent = "Copy"; }, 2000);
});

$("#camera").hidden = !navigator.mediaDevices;
describe();
