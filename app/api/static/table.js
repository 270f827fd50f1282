/* The results as a table (CSV) and as JSON. */
import {isNumbers, isObject} from "./dom.js";

const FIXED = ["file", "model", "status", "message", "options"];

const optionsOf = ({options}) => Object.fromEntries(
  Object.entries(options).map(([name, value]) => [name, value instanceof File ? value.name : value]));

/* jobs (see queue.js) that have ended, in the order in which they are shown. */
export function asJson(jobs) {
  const results = jobs.map(job => ({
    file: job.name, model: job.model.name, options: optionsOf(job),
    ...(job.input ? {input: job.input} : {}),
    ...(job.answer?.media ? {status: "success", answer: {type: job.answer.media.type, bytes: job.answer.media.size}}
      : job.answer ? job.answer.body : {status: "error", message: job.problem.message, ...job.problem.body})}));
  return JSON.stringify(results, null, 2);
}

/* A row for each job. For what is no list of classes and no scores, the column `answer` has the JSON. The mark at the
   beginning tells Excel that this is UTF-8. */
export function asCsv(jobs) {
  const rows = jobs.map(job => [job, valuesOf(job)]);
  const names = [...new Set(rows.flatMap(([, values]) => [...values.keys()]))];
  const lines = rows.map(([job, values]) => [
    job.name, job.model.name, job.answer ? "success" : "error", job.problem?.message ?? "",
    Object.entries(optionsOf(job)).map(([name, value]) => `${name}=${value}`).join(" "),
    ...names.map(name => values.get(name) ?? "")]);
  return `\ufeff${[[...FIXED, ...names], ...lines].map(line => `${line.map(cell).join(",")}\r\n`).join("")}`;
}

/* {column: value} of an answer. */
function valuesOf({answer}) {
  if (!answer) return new Map();
  if (answer.media) return new Map([["answer", answer.media.type]]);
  const {predictions} = answer.body;
  if (isObject(predictions) && "class" in predictions && isNumbers(predictions.probabilities)) {
    const ranked = Object.entries(predictions.probabilities).sort(([, a], [, b]) => b - a);
    return ranks(ranked);
  }
  if (Array.isArray(predictions) && predictions.length && predictions.every(one => isObject(one) && "class" in one))
    return ranks(predictions.map(one => [one.class, one.confidence]));
  if (isNumbers(predictions))  // a score may have the name of a column
    return new Map(Object.entries(predictions).map(
      ([name, value]) => [FIXED.includes(name) ? `${name} (score)` : name, value]));
  return new Map([["answer", typeof predictions === "string" ? predictions : JSON.stringify(predictions)]]);
}

const ranks = pairs => new Map(pairs.flatMap(
  ([label, score], i) => [[`class_${i + 1}`, label], [`confidence_${i + 1}`, score]]));

/* Spreadsheets calculate what begins with one of these signs: text gets an apostrophe before it. */
function cell(value) {
  if (typeof value === "number") return String(value);
  const text = String(value ?? "");
  const harmless = /^\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|^[\t\r\n]/.test(text) ? `'${text}` : text;
  return /[",;\s']/.test(harmless) ? `"${harmless.replaceAll('"', '""')}"` : harmless;
}
