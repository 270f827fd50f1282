/* The fields for a model's options, made from what the service declares. */
import {$, element} from "./dom.js";

const LABELS = new Map([["top_k", "Classes"], ["method", "Crop"], ["tta", "Average with mirror image"],
                        ["frames", "Frames of a video"], ["explain", "Show where it looked"]]);
const MEANINGS = new Map([["explain", "Lays colours over the picture: the brighter, the more that part adds to the score "
  + "of the first class, or of a trait. The list then chooses another one."]]);  // for those who see it
const HIDDEN = ["embedding", "normalize", "explain_class"];  // numbers for programs; the last is what a click chooses

let fields = [];  // {name, label, read}: what is chosen for an option, undefined if nothing
let hasPictures = false;

export function showOptions({takes, options, features}) {
  hasPictures = Boolean(features);
  const isOfVideo = name => takes.includes("video") && (name === "frames" || name === "at");
  const isHidden = name => features && (HIDDEN.includes(name) || name === "explain" && features.kind !== "maps");
  const shown = options.filter(({name}) => !isHidden(name)
    && !(isOfVideo(name) && name === "at"));  // it would override `frames`
  fields = shown.map(option => ({...fieldOf(option), name: option.name, videoOnly: isOfVideo(option.name)}));
  $("#options").replaceChildren(...fields.map(({label}) => label));
  const explained = shown.filter(({meaning}) => meaning);
  $("#meanings").hidden = !explained.length;
  $("#meanings dl").replaceChildren(...explained.flatMap(
    ({name, meaning}) => [element("dt", {}, labelOf(name)), element("dd", {}, meaningOf(name, meaning))]));
}

export function chosenOptions(isVideo = false) {
  const used = fields.filter(({videoOnly}) => isVideo || !videoOnly);
  return Object.fromEntries(used.map(({name, read}) => [name, read()]).filter(
    ([name, value]) => value !== undefined && (value || name !== "explain")));
}

export function areEqual(some, others) {
  const names = new Set([...Object.keys(some), ...Object.keys(others)]);
  return [...names].every(name => some[name] === others[name]);
}

function labelOf(name) {
  const words = name.replaceAll("_", " ");
  return LABELS.get(name) || words[0].toUpperCase() + words.slice(1);
}

const meaningOf = (name, meaning) => hasPictures && MEANINGS.get(name) || meaning || "";

/* {label, read} of an option. */
function fieldOf({name, schema, default: value, meaning, is_file: isFile}) {
  const isGiven = value !== null && value !== undefined;
  const isYesOrNo = schema.type === "boolean" || schema.enum?.[0] === true && schema.enum[1] === false;
  const isNumber = schema.type === "integer" || schema.type === "number";
  let input = element("input", {type: "text", value: isGiven ? value : ""});
  let read = () => input.value || undefined;
  if (isFile) {
    input = element("input", {type: "file"});
    read = () => input.files[0];
  } else if (isYesOrNo && isGiven) {
    input = element("input", {type: "checkbox", checked: value});
    read = () => input.checked;
  } else if (schema.enum || isYesOrNo) {
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
