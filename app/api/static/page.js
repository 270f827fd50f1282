/* The page: what the service says of its model, the input that this needs, and what the user does with it. */
import {closeCamera, hasCamera, setUpCamera} from "./camera.js";
import {$, element, isObject, plural, pretty} from "./dom.js";
import {dropped, linkIn, linked} from "./files.js";
import {setUpKey, showKeyIsUsed, whenKeyIsAccepted} from "./key.js";
import {refusal} from "./limits.js";
import {chosenOptions, showOptions} from "./options.js";
import {TASKS, setUpPanels} from "./panels.js";
import {rest, untilBack, untilFree, whenBack} from "./pauses.js";
import {add, count, setUpResults, showSnippetsAgain} from "./results.js";
import {ask, here, isAway} from "./service.js";

const FILES = {picture: ["image", "photo", "pictures"], video: ["video", "video", "videos"],
               audio: ["audio", "recording", "audio files"]};
const SAMPLES = new Map([["classification", "cat.jpg"]]);  // of any other task: a face
const OF_PEOPLE = ["big_five_regression"];  // tasks whose description is a warning
const isTouched = matchMedia("(pointer: coarse)");

let service = {model: {name: "", task: "", takes: [], options: []}};
let isListed = false;
let isFromHere = false;  // whether what is dragged is a part of this page
let tellDescribed;
const described = new Promise(resolve => { tellDescribed = resolve; });

const complain = text => { $("#problem").textContent = text; };

/* ---- the service ---- */

async function describe() {
  const chosen = $("#which").value;  // "" unless there are several models
  let body;
  try {
    ({body} = await ask(chosen ? `info?model=${encodeURIComponent(chosen)}` : "info"));
  } catch (error) {
    if (isAway(error)) return untilBack();  // and then again, see below
    if (error.wait) return rest(error.message, error.wait).then(describe);
    return error.status === 401 ? undefined : complain(error.message);
  }
  if ($("#which").value !== chosen) return;
  const isSame = JSON.stringify(body.model) === JSON.stringify(service.model);
  service = body;
  complain("");
  showKeyIsUsed();
  if (!isSame) showModel(body.model);
  tellDescribed();
  if (!isListed) listModels().catch(() => {});  // without a list there is no choice
}

function showModel(model) {
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
  $("#about").classList.toggle("notice", OF_PEOPLE.includes(model.task));
  $("#fallback").hidden = !model.fallback_for;
  $("#fallback").textContent = `${model.fallback_for} could not be loaded. ${model.name} answers in its place.`;
  showInput();
  showOptions(model);
  count();
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

function showInput() {
  const {takes, field, example} = service.model;
  const isPicture = takes.includes("picture");
  $("#drop").hidden = !takes.some(kind => FILES[kind]);
  showWords();
  $("#sample").hidden = !isPicture;
  showCamera();

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

/* Nothing is dropped with a finger. */
function showWords() {
  const kinds = service.model.takes.map(kind => FILES[kind]).filter(Boolean);
  const one = kinds.map(([, word]) => word).join(" or "), many = kinds.map(([, , words]) => words).join(" or ");
  $("#choose").accept = kinds.map(([type]) => `${type}/*`).join(",");
  $("#drop strong").textContent = isTouched.matches ? `Choose ${many}` : `Drop ${many} here`;
  $("#hint").textContent = isTouched.matches ? "one or several" : "or paste one";
  $("#choose-label").textContent = isTouched.matches ? `Take or choose a ${one}` : "Choose files";
}

async function showCamera() {
  $("#camera").hidden = !(service.model.takes.includes("picture") && await hasCamera());
}

/* Says what is wrong with the text. */
function blame(problem) {
  $("#text-problem").textContent = problem;
  $("#text").setAttribute("aria-invalid", String(problem !== ""));
}

/* ---- from inputs to jobs, see queue.js ---- */

function predictUrl() {
  const chosen = $("#which").value;
  return String(new URL(chosen ? `models/${encodeURIComponent(chosen)}/predict` : "predict", here));
}

const jobOf = sent => ({...sent, url: predictUrl(), model: service.model});

async function take(list) {
  const files = [...list];
  if ($("#drop").hidden || !files.length) return;  // dropped or pasted where no file is wanted
  $("#viewfinder").hidden || closeCamera();
  complain(service.config ? "" : `${plural(files.length, "file")} will be sent as soon as the service answers.`);
  await described;
  add(files.map(file => {
    const words = refusal(file, service.config);
    return jobOf({name: file.name, file, options: chosenOptions(file.type.startsWith("video/")),
                  problem: words ? new Error(words) : undefined});
  }));
}

async function takeLink(link) {
  complain("");
  try {
    take([await linked(link)]);
  } catch (error) {
    complain(error.message);
  }
}

/* Whether the model takes files of this type; browsers do not know those of some pictures, such as HEIC. */
function isTaken({name, type}) {
  const {model: {takes}, config} = service;
  return type ? takes.some(kind => FILES[kind] && type.startsWith(`${FILES[kind][0]}/`))
    : takes.includes("picture") && config.allowed_extensions.includes(name.split(".").pop().toLowerCase());
}

async function takeDropped(data) {
  const link = linkIn(data);
  const {files, skipped} = await dropped(data, isTaken);
  if (files.length) take(files);
  else if (link && !skipped) return takeLink(link);
  else if (!skipped) complain("There is no file in what you dropped.");
  if (skipped) complain(`${plural(skipped, "other file")} of the folder ${skipped === 1 ? "was" : "were"} left out.`);
}

function takeText() {
  const text = $("#text").value;
  const {takes, field} = service.model;
  const options = chosenOptions();
  if (!takes.includes("json")) return add([jobOf({name: "Text", text, input: {[field]: text}, options})]);
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
  add([jobOf({name: "JSON", text: pretty(input), input, options})]);
}

async function takeSample() {
  await described;
  const name = SAMPLES.get(service.model.task) || "astronaut.jpg";
  $("#sample").disabled = true;  // while the service is away
  for (;;) {
    await untilFree();
    const response = await fetch(new URL(`static/${name}`, here)).catch(() => null);
    const blob = response?.ok && await response.blob().catch(() => null);
    if (!blob && (!response || isAway(response))) {
      await untilBack();
      continue;
    }
    $("#sample").disabled = false;
    if (!blob) return complain(`The service answered ${response.status}.`);
    return take([new File([blob], name, {type: "image/jpeg"})]);
  }
}

/* ---- what the user does ---- */

const isWritable = ({target}) => Boolean(target.closest?.("input:not([type=file], [type=checkbox]), textarea"));

$("#input").addEventListener("submit", event => {
  event.preventDefault();
  if (!$("#write").hidden) takeText();
});
$("#text").addEventListener("input", () => blame(""));
$("#text").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("#input").requestSubmit();
});
for (const name of ["input", "change"]) $("#options").addEventListener(name, count);
$("#which").addEventListener("change", () => describe().then(count));
$("#choose").addEventListener("change", event => {
  take(event.target.files);
  event.target.value = "";  // the same file may be chosen again
});
document.addEventListener("dragstart", () => { isFromHere = true; });
document.addEventListener("dragend", () => { isFromHere = false; });
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, event => {
    const {types} = event.dataTransfer;
    const isFile = types.includes("Files") || types.includes("text/uri-list");
    if (isFromHere || !isFile || $("#drop").hidden) return;  // text, which goes where it is dropped
    event.preventDefault();
    $("#drop").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop") takeDropped(event.dataTransfer);
  });
}
document.addEventListener("paste", event => {
  if ($("#drop").hidden) return;
  const {files} = event.clipboardData;
  const link = linkIn(event.clipboardData);
  if (files.length) take(files);
  else if (isWritable(event)) return;
  else if (link) takeLink(link);
  else complain("There is no picture or file in the clipboard.");
});
$("#sample").addEventListener("click", takeSample);
isTouched.addEventListener("change", showWords);
navigator.mediaDevices?.addEventListener("devicechange", showCamera);

setUpKey();
whenBack(describe);
whenKeyIsAccepted(() => { showSnippetsAgain(); describe(); });
setUpPanels();
setUpResults(predictUrl);
setUpCamera({take, complain, target: () => ({url: predictUrl(), options: chosenOptions(), model: service.model})});
describe();
