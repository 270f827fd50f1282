/* What /info and /health say, to be read: the panels Model and Health. */
import {$, block, element, isObject, plural, pretty, say, sizeInWords} from "./dom.js";
import {ask} from "./service.js";

export const TASKS = new Map([["big_five_regression", "Big Five traits"], ["classification", "Classification"]]);
const STATES = new Map([["loading", "The model is still loading."],
                        ["draining", "It is about to stop or to be replaced."],
                        ["self_test_failed", "The model failed its own test."]]);

const number = value => value.toLocaleString("en");
const list = values => values?.join(", ");

/* [[title, [[term, value], …]], …]; a value may be an element, and one that is undefined or null is left out. */
function aboutModel({model, config, versions}) {
  const {labels, weights, fallback} = model;
  return [
    ["", [
      ["Name", model.version ? `${model.name}@${model.version}` : model.name],
      ["In place of", model.fallback_for && `${model.fallback_for}: ${fallback.reason}`],
      ["What it is", model.description],
      ["Task", TASKS.get(model.task) ?? model.task],
      ["Takes", list(model.takes)],
      ["Runs on", [model.engine, model.precision, model.device].filter(Boolean).join(", ")],
      ["Input", model.input_size && `${model.input_size.join(" × ")} pixels`],
      ["Parameters", model.total_parameters && number(model.total_parameters)],
      ["Backbone", model.backbone],
      ["Traits", list(model.traits)],
      ["Classes", labels && element("details", {}, element("summary", {}, plural(labels.length, "class", "classes")),
                                    block(labels.join("\n"), "The classes"))],
      ["Weights", weights?.source],
      ["SHA-256", weights?.sha256],
    ]],
    ["Limits", [
      ["File", sizeInWords(config.max_file_size)],
      ["Picture", `${number(config.max_image_pixels / 1e6)} megapixels`],
      ["Video", model.takes?.includes("video")
        ? `${sizeInWords(config.max_video_size)}, ${number(config.max_video_seconds)} s` : null],
      ["Time for an answer", `${number(config.request_timeout)} s`],
    ]],
    ["Versions", Object.entries(versions)],
  ];
}

function aboutHealth(health) {
  return [["", [
    ["State", health.status === "healthy" ? "Ready" : `Not ready. ${STATES.get(health.reason) ?? health.reason ?? ""}`],
    ["Model", health.model],
    ["In place of", health.fallback_for],
    ["Device", health.device],
    ["Running for", duration(health.uptime_seconds)],
    ["Version", health.version],
    ["As of", new Date(1000 * health.timestamp).toLocaleTimeString()],
  ]]];
}

function duration(seconds) {
  const units = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]];
  const first = units.findIndex(([, length]) => seconds >= length);
  if (first < 0) return "less than a second";
  return units.slice(first, first + 2).map(([name, length], i) => plural(
    Math.floor((i ? seconds % units[first][1] : seconds) / length), name)).join(", ");
}

const chosen = () => $("#which").value;  // "" unless there are several models

const PANELS = {
  model: {title: "Model", facts: aboutModel,
          path: () => chosen() ? `info?model=${encodeURIComponent(chosen())}` : "info"},
  health: {title: "Health", path: () => "health", facts: aboutHealth},
};

let open = null;  // which of them

async function show(name) {
  open = name;
  const {title, path, facts} = PANELS[name];
  $("#panel-title").textContent = title;
  $("#panel").open || $("#panel").showModal();
  $("#panel").setAttribute("aria-busy", "true");
  let content;
  try {
    const {body} = await ask(path()).catch(error => {
      if (name === "health" && error.body?.status) return error;  // 503 with the reason
      throw error;
    });
    content = facts(body).flatMap(section);
    $("#panel-json").textContent = pretty(body);
  } catch (error) {
    if (error.status === 401) return $("#panel").close();  // the page asks for a key
    const words = error.status ? error.message : "The service cannot be reached; is it still running?";
    content = [element("p", {className: "error"}, words)];
    say(words);
  }
  if (open !== name) return;
  $("#panel-facts").replaceChildren(...content);
  $("#panel-raw").hidden = Boolean($("#panel-facts .error"));
  $("#panel").removeAttribute("aria-busy");
}

function section([title, rows]) {
  const shown = rows.filter(([, value]) => value !== undefined && value !== null && value !== "");
  return [...(title ? [element("h3", {}, title)] : []), element("dl", {}, ...shown.flatMap(
    ([term, value]) => [element("dt", {}, term), element("dd", {}, isObject(value) && !(value instanceof Node)
      ? pretty(value) : value)]))];
}

export function setUpPanels() {
  $("#show-model").addEventListener("click", () => show("model"));
  $("#show-health").addEventListener("click", () => show("health"));
  $("#panel-again").addEventListener("click", () => show(open));
  $("#panel-close").addEventListener("click", () => $("#panel").close());
  $("#panel").addEventListener("click", event => {  // beside it
    if (event.target === $("#panel")) $("#panel").close();
  });
}
