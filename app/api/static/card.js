/* A card of the results: what was sent, and the answer. */
import {fileName} from "./curl.js";
import {$, block, drawing, element, isNumbers, isObject, pretty, sizeInWords} from "./dom.js";
import {showPicture} from "./frames.js";
import {showSnippets} from "./snippets.js";

const MOST_BARS = 30;
const MANY_CLASSES = 9.5;  // of which no number is given
const LARGE = 2 ** 20;     // bytes: the sending of more is shown

/* A picture or a player of a Blob; its URL is revoked with the card. */
function media(card, blob, words) {
  const url = URL.createObjectURL(blob);
  const kind = blob.type.split("/")[0];
  card.urls.push(url);
  const shown = kind === "video" || kind === "audio"
    ? element(kind, {src: url, controls: true, playsInline: true, ariaLabel: words})
    : element("img", {src: url, alt: words, decoding: "async"});  // so that a large one does not hold up the page
  shown.addEventListener("error", () => shown.replaceWith(element("p", {className: "none quiet"}, "No preview")));
  return shown;
}

/* A card for a job (see queue.js), which waits for its answer. */
export function cardFor(job) {
  const {name, file, text, model} = job;
  const card = $("#card").content.firstElementChild.cloneNode(true);
  card.urls = [];
  card.ariaLabel = name;
  card.setAttribute("aria-busy", "true");
  $("h2", card).textContent = "Waiting…";
  $("figcaption", card).textContent = name;
  $(".remove", card).ariaLabel = `Remove ${name}`;
  $(".again", card).ariaLabel = `Try ${name} again`;
  showSnippets(card, job);
  if (file) {
    const kind = {video: "video", audio: "recording"}[file.type.split("/")[0]] || "picture";
    const shown = media(card, file, `The ${kind} you sent: ${name}`);
    shown.muted = kind === "video";
    $(".picture", card).append(shown);
  } else {
    const isJson = model.takes.includes("json");
    $(".picture", card).append(block(text, "What you sent", isJson ? "sent mono" : "sent"));
  }
  return card;
}

export function forget(card) {
  card.urls.forEach(url => URL.revokeObjectURL(url));
}

/* How much of a file is sent, where that takes a while. */
export function showSending({card}, bytes, all) {
  const isLong = all > LARGE && bytes < all;
  $("h2", card).textContent = isLong ? `Sending ${sizeInWords(bytes)} of ${sizeInWords(all)}…` : "Working…";
  $("progress", card).hidden = !isLong;
  $("progress", card).value = all ? bytes / all : 0;
}

export function showHeld({card}, words) {
  $("h2", card).textContent = words;
  $("progress", card).hidden = true;
}

/* A frame of a video, while the others are under way: its number, and of how many. */
export function showFrame({card, options}, frame, number) {
  if (frame.predictions) showPredictions(card, frame.predictions);
  $("h2", card).textContent = `Frame ${number}${options.frames ? ` of ${options.frames}` : ""}…`;
  const video = $(".picture video", card);
  if (video) video.currentTime = frame.time_s;
}

/* Shows a job's end and returns it in words. explain(job, prediction): the explanations for another class. */
export function showEnd(job, explain) {
  job.card.classList.remove("waiting");
  job.card.removeAttribute("aria-busy");
  job.card.style.minHeight = "";
  $("progress", job.card).hidden = true;
  return job.answer ? showAnswer(job, explain) : showProblem(job);
}

function showAnswer(job, explain) {
  const {card, name, answer: {response, body, media: file}} = job;
  const metadata = body?.metadata || {};
  const words = file ? showMedia(card, file) : showPredictions(card, body.predictions, metadata.spread);
  const [width, height] = metadata.image_size || [];
  const face = metadata.face_detected === undefined || metadata.method === "middle" ? ""
    : metadata.face_detected ? "face found" : "no face found";
  $("figcaption", card).textContent = [metadata.filename || name, width && `${width} × ${height}`, face]
    .filter(Boolean).join(" · ");
  if (file) showSnippets(card, job, file.type);
  showCertainty(card, metadata.uncertainty);
  if (metadata.image_size) showPicture(job, body, explain);
  showTimings(card, metadata.timings_ms || serverTiming(response), job.milliseconds, response.headers.get("X-Cache"));
  $(".json", card).textContent = body ? pretty(body) : "";
  $(".json", card).closest("details").hidden = !body;
  return `${metadata.filename || name}: ${words}`;
}

function showProblem({card, name, problem}) {
  const words = problem.message;
  $("h2", card).textContent = "No answer";
  $(".error", card).textContent = words;
  $(".failed", card).hidden = false;
  $(".bars", card).replaceChildren();  // of a video's first frames
  $(".json", card).textContent = pretty(problem.body || {});
  $(".json", card).closest("details").hidden = !problem.body?.error;
  return `${name}: ${words}`;
}

/* Each of these shows the answer and returns it in words. */

function showMedia(card, file) {
  const kind = {audio: "Audio", image: "Picture", video: "Video"}[file.type.split("/")[0]];
  const words = `${file.type || "a file"}, ${sizeInWords(file.size)}`;
  const link = element("a", {download: fileName(file.type || "file/bin"), className: "button"}, "Download");
  $("h2", card).textContent = kind || "File";
  $(".shown", card).replaceChildren(...(kind ? [media(card, file, "The answer")] : []),
    element("p", {className: "buttons"}, link, element("span", {className: "quiet"}, words)));
  if (!kind) card.urls.push(URL.createObjectURL(file));
  link.href = card.urls.at(-1);
  $(".shown", card).hidden = false;
  return words;
}

export function showPredictions(card, predictions, spread) {
  const scores = asScores(predictions, spread);
  $("h2", card).textContent = scores?.title ?? "Answer";
  if (scores) return showBars(card, scores);
  $(".shown", card).replaceChildren(isObject(predictions) && Object.keys(predictions).length
    ? element("dl", {}, ...Object.entries(predictions).flatMap(
      ([name, value]) => [element("dt", {}, name), element("dd", {}, asText(value))]))
    : asText(predictions));
  $(".shown", card).hidden = false;
  return typeof predictions === "string" ? predictions : JSON.stringify(predictions);
}

function asText(value) {
  return typeof value === "object" && value !== null ? block(pretty(value), "JSON") : element("p", {}, String(value));
}

/* {title, rows: [{label, share, value}], isRanked} of predictions that are scores; null for any others. */
function asScores(predictions, spread) {
  const percent = (label, share) => ({label: String(label), share, value: `${(100 * share).toFixed(1)} %`});
  if (Array.isArray(predictions) && predictions.length && predictions.every(
    one => isObject(one) && "class" in one && typeof one.confidence === "number")) {
    const rows = predictions.map(one => percent(one.class, one.confidence));
    return {title: rows[0].label, rows, isRanked: true};
  }
  if (isObject(predictions) && "class" in predictions && isNumbers(predictions.probabilities)) {
    const ranked = Object.entries(predictions.probabilities).sort(([, a], [, b]) => b - a);
    const rows = ranked.map(([label, share]) => percent(label, share));
    return {title: String(predictions.class), rows, isRanked: true};
  }
  if (!isNumbers(predictions)) return null;
  const values = Object.values(predictions);
  const [low, high] = [values.reduce((a, b) => Math.min(a, b), 0), values.reduce((a, b) => Math.max(a, b), 1)];
  const rows = Object.entries(predictions).map(([label, score]) => ({
    label, start: (Math.min(0, score) - low) / (high - low), share: Math.abs(score) / (high - low),
    value: rounded(score).replace("-", "−")
      + (typeof spread?.[label] === "number" ? ` ± ${spread[label].toFixed(2)}` : "")}));
  const zero = low < 0 ? -low / (high - low) : null;
  const scale = low < 0 || high > 1
    ? `The bars go from ${rounded(low).replace("-", "−")} to ${rounded(high)}${low < 0 ? "; the line is 0" : ""}.` : "";
  return {title: "Scores", rows, isRanked: false, zero, scale};
}

function rounded(score) {
  if (Number.isInteger(score)) return String(score);
  return Math.abs(score) < 0.005 || Math.abs(score) >= 1e6 ? String(Number(score.toPrecision(3))) : score.toFixed(2);
}

/* Rows that stay keep their elements, and with them the focus: the camera's change many times a second. */
function showBars(card, {title, rows, isRanked, zero = null, scale = ""}) {
  const list = $(".bars", card);
  const old = [...list.children];
  rows.slice(0, MOST_BARS).forEach(({label, start = 0, share, value}, i) => {
    const width = `${100 * Math.min(1, Math.max(0, share))}%`;
    const bar = drawing(null, {x: `${100 * start}%`, width, height: "100%"},
      ...(zero === null ? [] : [{x: `${100 * zero}%`, width: 2, height: "100%", class: "zero"}]));
    const name = old[i] && $("span", old[i]);
    if (name?.textContent === label) {
      $("svg", old[i]).replaceWith(bar);
      $(".value", old[i]).textContent = value;
      old[i].className = isRanked ? "" : "trait";
      return;
    }
    const row = element("li", {className: isRanked ? "" : "trait"}, bar,
      element("span", {}, label), element("span", {className: "value"}, value));
    old[i] ? old[i].replaceWith(row) : list.append(row);
  });
  const more = rows.length - Math.min(rows.length, MOST_BARS);
  for (const row of old.slice(Math.min(rows.length, MOST_BARS))) row.remove();
  if (more) list.append(element("li", {className: "quiet"}, `and ${more} more`));
  list.classList.toggle("traits", !isRanked);
  $(".scale", card).textContent = scale;
  $(".scale", card).hidden = !scale;
  return rows.slice(0, MOST_BARS).map(({label, value}) => `${label} ${value}`).join(", ");
}

/* What entropy (in nats) and margin mean: how far the first class is ahead, and how many are in question. A number of
   classes is only given where the model is not sure. */
export function showCertainty(card, uncertainty) {
  const shown = $(".sure", card);
  shown.hidden = !uncertainty;
  if (!uncertainty) return;
  const {entropy, margin} = uncertainty;
  const classes = Math.exp(entropy);
  const isSure = margin >= 0.8 || margin >= 0.4 && classes < 2.5;
  const word = isSure ? (margin >= 0.8 && classes < 1.5 ? "very sure" : "fairly sure")
    : margin >= 0.15 ? "not very sure" : "unsure";
  const ahead = Math.round(100 * margin);
  shown.title = `margin ${margin.toFixed(3)}, entropy ${entropy.toFixed(2)} nats`;
  shown.replaceChildren("How sure: ", element("b", {}, word), ". ", ahead
    ? `The first class is ${ahead} percentage point${ahead === 1 ? "" : "s"} ahead of the second`
    : "The first two classes are level",
    isSure ? "." : classes < MANY_CLASSES ? `; the model wavers between about ${Math.round(classes)} classes.`
      : "; its probability is spread over many classes.");
}

/* {stage: milliseconds} of the header Server-Timing: read;dur=0.4, inference;dur=8 */
function serverTiming(response) {
  const entries = (response.headers.get("Server-Timing") || "").matchAll(/([\w-]+);dur=([\d.]+)/g);
  return Object.fromEntries([...entries].map(([, stage, ms]) => [stage, Number(ms)]));
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
  $(".strip", card).replaceChildren(...(stages.length ? [strip] : []));
  $(".timings p", card).replaceChildren(
    ...stages.map(([stage, ms], i) => element("span", {className: `stage s${i % 6}`},
                                              element("b", {}, `${stage} ${ms.toFixed(1)} ms`))),
    ...(stages.length ? [element("br")] : []), `${Math.round(milliseconds)} ms in all, as seen from here`,
    ...(cache ? [`; cache ${cache}`] : []));
  $(".timings", card).hidden = false;
}
