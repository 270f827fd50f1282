/* The form, made from what the service says of its model, and what the user does. */
import {closeCamera, setUpCamera} from "./camera.js";
import {showAnswer, showFrame, showProblem, showSent} from "./card.js";
import {curl, json} from "./curl.js";
import {$, element, isObject, pretty, say} from "./dom.js";
import {asOption} from "./looked.js";
import {ask, here, stream, whenKeyIsNeeded} from "./service.js";

const MOST_CARDS = 24;
const AT_ONCE = 2;  // requests that the page has under way at a time
const FILES = {picture: ["image/*", "pictures"], video: ["video/*", "videos"], audio: ["audio/*", "audio files"]};
const LABELS = new Map([["top_k", "Classes"], ["method", "Crop"], ["tta", "Average with mirror image"],
                        ["frames", "Frames of a video"], ["explain", "Show where it looked"]]);
const MEANINGS = new Map([["explain", "Lays colours over the picture: the brighter, the more that part adds to the score of "
  + "the first class, or of a trait. The list then chooses another one."]]);  // for those who see it
const TASKS = new Map([["big_five_regression", "Big Five traits"], ["classification", "Classification"]]);
const HIDDEN = ["embedding", "normalize", "explain_class"];  // numbers for programs; the last is what a click chooses
const SAMPLES = new Map([["classification", "cat.jpg"]]);  // of any other task: a face

const queue = [];
let service = {model: {name: "", task: "", takes: [], options: []}};
let optionFields = [];  // {name, read}: what is chosen for an option, undefined if nothing
let running = 0;
let isListed = false;

const complain = text => { $("#problem").textContent = text; };

/* ---- the service ---- */

function askForKey() {
  if ($("#api-key")) return;
  const input = element("input", {id: "api-key", type: "password", autocomplete: "off"});
  $("#options").prepend(element("label", {}, "API key", input));
  input.addEventListener("change", describe);
  input.focus();
}

async function describe() {
  const chosen = $("#which").value;  // "" unless there are several models
  try {
    const {body} = await ask(chosen ? `info?model=${encodeURIComponent(chosen)}` : "info");
    if ($("#which").value !== chosen) return;
    service = body;
    complain("");
  } catch (error) {
    return complain(error.message);
  }
  const {model} = service;
  if (!model.takes) {
    Object.assign(model, {takes: [], options: []});
    complain(`${model.name} is not loaded yet. Its first request loads it.`);
  }
  const size = model.total_parameters ? `${(model.total_parameters / 1e6).toFixed(1)} M parameters` : "";
  const task = model.task === model.name ? "" : TASKS.get(model.task) || model.task;
  $("#name").textContent = model.version ? `${model.name}@${model.version}` : model.name;
  document.title = `Try ${$("#name").textContent}`;
  $("#model").textContent = [task, size, model.engine, model.precision, model.device].filter(Boolean).join(" · ");
  $("#about").textContent = model.description || "";
  showInput(model);
  showOptions(model);
  if (!isListed) listModels().catch(() => {});  // without a list there is no choice
}

/* A choice of the model, where the service has several: cats, cats@1, cats@2, iris. */
async function listModels() {
  const {models} = (await ask("models")).body;
  isListed = true;
  if (models.length < 2) return;
  const names = new Set(models.flatMap(({name, version}) => version ? [name, `${name}@${version}`] : [name]));
  const byDefault = models.find(model => model.default)?.name;
  $("#which").replaceChildren(...[...names].map(
    name => element("option", {value: name, selected: name === byDefault}, name)));
  $("#models").hidden = false;
}

/* ---- the form ---- */

function showInput({takes, field, example}) {
  const files = takes.filter(kind => FILES[kind]);
  const isPicture = takes.includes("picture");
  $("#drop").hidden = !files.length;
  $("#choose").accept = files.map(kind => FILES[kind][0]).join(",");
  $("#drop strong").textContent = `Drop ${files.map(kind => FILES[kind][1]).join(" or ")} here`;
  $("#camera").hidden = !(isPicture && navigator.mediaDevices);
  $("#sample").hidden = !isPicture;

  const isJson = takes.includes("json");
  const text = $("#text");
  $("#write").hidden = $("#send").hidden = !(isJson || takes.includes("text"));
  text.required = !$("#write").hidden;
  $("#write label").textContent = isJson ? "JSON" : "Text";
  text.classList.toggle("mono", isJson);
  text.value = isJson ? pretty(field ? {[field]: example ?? null} : example ?? {}) : example ?? "";
  text.rows = Math.min(16, Math.max(2, text.value.split("\n").length));
  blame("");
}

function showOptions({takes, options, features}) {
  const isOfVideo = name => takes.includes("video") && (name === "frames" || name === "at");
  const isHidden = name => features && (HIDDEN.includes(name) || name === "explain" && features.kind !== "maps");
  const shown = options.filter(({name}) => !isHidden(name)
    && !(isOfVideo(name) && name === "at"));  // it would override `frames`
  optionFields = shown.map(option => ({...optionField(option), name: option.name, videoOnly: isOfVideo(option.name)}));
  const key = $("#api-key")?.closest("label");
  $("#options").replaceChildren(...[key, ...optionFields.map(({label}) => label)].filter(Boolean));
  const explained = shown.filter(({meaning}) => meaning);
  $("#meanings").hidden = !explained.length;
  $("#meanings dl").replaceChildren(...explained.flatMap(
    ({name, meaning}) => [element("dt", {}, labelOf(name)), element("dd", {}, meaningOf(name, meaning))]));
}

function labelOf(name) {
  const words = name.replaceAll("_", " ");
  return LABELS.get(name) || words[0].toUpperCase() + words.slice(1);
}

const meaningOf = (name, meaning) => service.model.features && MEANINGS.get(name) || meaning || "";

/* {label, read} of an option. */
function optionField({name, schema, default: value, meaning, is_file: isFile}) {
  const isGiven = value !== null && value !== undefined;
  const isYesOrNo = schema.enum?.[0] === true && schema.enum[1] === false;
  const isNumber = schema.type === "integer" || schema.type === "number";
  let input = element("input", {type: "text", value: isGiven ? value : ""});
  let read = () => input.value || undefined;
  if (isFile) {
    input = element("input", {type: "file"});
    read = () => input.files[0];
  } else if (isYesOrNo && isGiven) {
    input = element("input", {type: "checkbox", checked: value});
    read = () => input.checked;
  } else if (schema.enum) {
    const values = isYesOrNo ? [true, false] : schema.enum;
    input = element("select", {}, ...(isGiven ? [] : [element("option", {value: ""}, "–")]), ...values.map(
      one => element("option", {value: one, selected: one === value}, isYesOrNo ? (one ? "yes" : "no") : String(one))));
    read = () => input.value === "" ? undefined : values.find(one => String(one) === input.value);
  } else if (isNumber) {
    const {minimum: min = "", maximum: max = "", type} = schema;
    Object.assign(input, {type: "number", min, max, step: type === "integer" ? 1 : "any",
                          inputMode: type === "integer" ? "numeric" : "decimal"});
    read = () => input.value === "" ? undefined : Number(input.value);
  } else if (schema.maxLength !== undefined) {
    input.maxLength = schema.maxLength;
  }
  input.name = name;
  input.title = meaningOf(name, meaning);
  return {label: element("label", {title: input.title}, labelOf(name), input), read};
}

function chosenOptions(isVideo = false) {
  const used = optionFields.filter(({videoOnly}) => isVideo || !videoOnly);
  return Object.fromEntries(used.map(({name, read}) => [name, read()]).filter(
    ([name, value]) => value !== undefined && (value || name !== "explain")));
}

/* Says what is wrong with the text. */
function blame(problem) {
  $("#text-problem").textContent = problem;
  $("#text").setAttribute("aria-invalid", String(problem !== ""));
}

/* ---- from inputs to cards ---- */

export function take(files) {
  if ($("#drop").hidden) return;  // dropped or pasted where no file is wanted
  $("#viewfinder").hidden || closeCamera();
  enqueue([...files].map(file => ({name: file.name, file, options: chosenOptions(file.type.startsWith("video/"))})));
}

function takeText() {
  const text = $("#text").value;
  const {takes, field} = service.model;
  if (!takes.includes("json")) return enqueue([{name: "Text", text, input: {[field]: text}, options: chosenOptions()}]);
  let input;
  try {
    input = JSON.parse(text);
  } catch (error) {
    blame(`This is not JSON: ${error.message}`);
    return $("#text").focus();
  }
  if (!isObject(input)) {
    blame(`Write an object${field ? `, {"${field}": …}` : ": { … }"}`);
    return $("#text").focus();
  }
  enqueue([{name: "JSON", text: pretty(input), input, options: chosenOptions()}]);
}

function predictUrl() {
  const chosen = $("#which").value;
  return String(new URL(chosen ? `models/${encodeURIComponent(chosen)}/predict` : "predict", here));
}

/* jobs: {name, options} with either file, or input (the members of a JSON body) and its text. */
function enqueue(jobs) {
  complain("");
  document.body.classList.add("has-results");
  const url = predictUrl();
  for (const described of [...jobs].reverse()) {
    const job = {...described, url, model: service.model};
    const card = $("#card").content.firstElementChild.cloneNode(true);
    card.classList.add("waiting");
    card.setAttribute("aria-busy", "true");
    $("h2", card).textContent = "Working…";
    $("figcaption", card).textContent = job.name;
    card.urls = [];
    showSent(card, job);
    $("#results").prepend(card);
    queue.unshift({...job, card});
  }
  while ($("#results").children.length > MOST_CARDS) {
    const oldest = $("#results").lastElementChild;
    oldest.urls.forEach(url => URL.revokeObjectURL(url));
    oldest.remove();
  }
  say(jobs.length === 1 ? `Working on ${jobs[0].name}` : `Working on ${jobs.length} files`);
  if (matchMedia("(max-width: 44rem)").matches) $("#results").firstElementChild?.scrollIntoView();
  work();
}

async function work() {
  while (running < AT_ONCE && queue.length) {
    running += 1;
    predict(queue.shift()).finally(() => { running -= 1; work(); });
  }
}

async function predict(job) {
  const {card, name} = job;
  $("code", card).textContent = curl(job, job.model.media_types?.[0]);
  const started = performance.now();
  let answer, problem;
  try {
    answer = await (isOfFrames(job) ? askForFrames(job) : ask(job.url, {method: "POST", ...await packed(job)}));
  } catch (error) {
    problem = error;
  }
  card.classList.remove("waiting");
  card.removeAttribute("aria-busy");
  if (answer) showAnswer(job, answer, performance.now() - started, explain);
  else showProblem(card, name, problem);
}

const isOfFrames = ({file, model}) => Boolean(file?.type.startsWith("video/") && model.preprocessing);

/* A video's answer, whose frames are shown as they come. */
async function askForFrames(job) {
  const request = {method: "POST", ...await packed(job)};
  let frames = 0, answer;
  for await (const {event, data, response} of stream(`${job.url}?stream=true`, request)) {
    if (event === "end") answer = {response, body: data};
    else showFrame(job.card, data, frames += 1, job.options.frames);
  }
  return answer;
}

/* The explanations of each frame for the class of this entry in the answer's predictions. */
async function explain(job, prediction) {
  const options = {...job.options, explain_class: asOption(job.model, prediction)};
  const {metadata} = (await ask(job.url, {method: "POST", ...await packed({...job, options})})).body;
  return metadata.explanations ? [metadata.explanations]
    : metadata.frames.filter(frame => frame.explanations).map(frame => frame.explanations);
}

/* The body of a request, with its headers: a file goes as a form, anything else as JSON. */
async function packed({file, input, options}) {
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

/* ---- what the user does ---- */

$("#input").addEventListener("submit", event => {
  event.preventDefault();
  if (!$("#write").hidden) takeText();
});
$("#text").addEventListener("input", () => blame(""));
$("#text").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("#input").requestSubmit();
});
$("#which").addEventListener("change", describe);
$("#choose").addEventListener("change", event => {
  if (event.target.files.length) take(event.target.files);
  event.target.value = "";  // the same file may be chosen again
});
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, event => {
    if (!event.dataTransfer.types.includes("Files")) return;  // text, which goes where it is dropped
    event.preventDefault();
    $("#drop").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop") take(event.dataTransfer.files);
  });
}
document.addEventListener("paste", event => {
  if (event.clipboardData.files.length) take(event.clipboardData.files);
});
$("#sample").addEventListener("click", async () => {
  const name = SAMPLES.get(service.model.task) || "astronaut.jpg";
  const response = await fetch(new URL(`static/${name}`, here));
  take([new File([await response.blob()], name, {type: "image/jpeg"})]);
});
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

whenKeyIsNeeded(askForKey);
setUpCamera({take, complain, target: () => ({url: predictUrl(), options: chosenOptions(), model: service.model})});
describe();
