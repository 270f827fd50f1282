/* The cards of the results, and what can be done with all of them. */
import {cardFor, forget, showEnd, showFrame, showHeld, showSending} from "./card.js";
import {$, plural, save, say} from "./dom.js";
import {areEqual, chosenOptions} from "./options.js";
import {cancel, packed, send, setUpQueue} from "./queue.js";
import {asCsv, asJson} from "./table.js";
import {asOption} from "./looked.js";
import {ask} from "./service.js";

let jobs = [];        // see queue.js; in the order of their cards
let isMany = false;   // whether the results are too many to be read aloud, each one
let currentUrl = () => "";

const isEnded = ({state}) => state === "answered" || state === "failed" || state === "refused";
const optionsFor = ({file}) => chosenOptions(Boolean(file?.type.startsWith("video/")));
const isOld = job => job.state !== "refused" && job.url === currentUrl() && !areEqual(job.options, optionsFor(job));

/* Shows jobs and sends them, but those with a problem already: they have failed. */
export function add(added) {
  if (!added.length) return;
  document.body.classList.add("has-results");
  $("#tools").hidden = false;
  for (const job of added) job.card = cardFor(job);
  $("#results").prepend(...added.map(({card}) => card));
  jobs = [...added, ...jobs];
  isMany = added.length > 1 || jobs.filter(job => !isEnded(job)).length > 1;
  say(added.length === 1 ? `Working on ${added[0].name}` : `Working on ${added.length} files`);
  for (const job of added.filter(({problem}) => problem)) {
    job.state = "refused";
    ended(job);
  }
  send(added.filter(({problem}) => !problem));
  if (matchMedia("(max-width: 44rem)").matches) $("#results").firstElementChild.scrollIntoView();
  count();
}

function ended(job) {
  const words = showEnd(job, explain);
  $(".again", job.card).hidden = job.state === "refused";  // it would be refused again
  const left = jobs.filter(one => !isEnded(one)).length;
  if (!isMany) say(words);
  else if (!left) say(inWords());
  isMany &&= left > 0;
  count();
}

/* Sends jobs again, with these options. */
function again(some, options = job => job.options) {
  for (const job of some) {
    if (!isEnded(job)) cancel(job);
    const old = job.card;
    Object.assign(job, {options: options(job), state: "waiting", answer: undefined, problem: undefined});
    job.card = cardFor(job);
    job.card.style.minHeight = `${old.offsetHeight}px`;  // what is below stays where it is
    const hadFocus = old.contains(document.activeElement);
    old.replaceWith(job.card);
    if (hadFocus) job.card.focus();
    forget(old);
  }
  isMany = some.length > 1;
  send(some);
  count();
}

function remove(some) {
  const place = jobs.indexOf(some[0]);
  jobs = jobs.filter(job => !some.includes(job));
  for (const job of some) {
    if (!isEnded(job)) cancel(job);
    forget(job.card);
    job.card.remove();
  }
  say(some.length === 1 ? `${some[0].name} is removed` : "All results are removed");
  $("#tools").hidden = !jobs.length;
  document.body.classList.toggle("has-results", jobs.length > 0);
  const next = jobs[Math.min(place, jobs.length - 1)];
  (next ? $(".remove", next.card) : $("#drop").hidden ? $("#text") : $("#choose")).focus();
  count();
}

/* The explanations of each frame for the class of this entry in the answer's predictions. */
async function explain(job, prediction) {
  const options = {...job.options, explain_class: asOption(job.model, prediction)};
  const {metadata} = (await ask(job.url, {method: "POST", ...await packed({...job, options})})).body;
  return metadata.explanations ? [metadata.explanations]
    : metadata.frames.filter(frame => frame.explanations).map(frame => frame.explanations);
}

function inWords() {
  const failed = jobs.filter(({state}) => state === "failed" || state === "refused").length;
  const done = jobs.filter(isEnded).length;
  const all = `${done < jobs.length ? `${done.toLocaleString("en")} of ` : ""}${plural(jobs.length, "result")}`;
  return failed ? `${all}, ${failed.toLocaleString("en")} failed` : all;
}

/* How many there are, and what can be done with them. Also when other options are chosen. */
export function count() {
  $("#count").textContent = inWords();
  $("#apply").disabled = !jobs.some(isOld);
  $("#again").hidden = !jobs.some(({state}) => state === "failed");
  $("#csv").disabled = $("#json").disabled = !jobs.some(isEnded);
}

/* With another key, the lines that the cards show are others. */
export function showSnippetsAgain() {
  for (const {card} of jobs) card.showSnippets();
}

/* url(): where what is sent now goes. */
export function setUpResults(url) {
  currentUrl = url;
  setUpQueue({sending: showSending, held: showHeld, frame: showFrame, ended});
  $("#apply").addEventListener("click", () => again(jobs.filter(isOld), optionsFor));
  $("#again").addEventListener("click", () => again(jobs.filter(({state}) => state === "failed")));
  $("#clear").addEventListener("click", () => remove(jobs));
  $("#csv").addEventListener("click", () => save(asCsv(jobs.filter(isEnded)), "text/csv", "results.csv"));
  $("#json").addEventListener("click", () => save(asJson(jobs.filter(isEnded)), "application/json", "results.json"));
  $("#results").addEventListener("click", ({target}) => {
    const job = jobs.find(({card}) => card.contains(target));
    if (target.matches(".remove")) remove([job]);
    else if (target.matches(".again")) again([job]);
    else if (target.matches(".copy")) copy(target);
  });
}

async function copy(button) {
  const code = $("code", button.parentElement);
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
    say("Copied");
  } catch {  // without HTTPS there is no clipboard: select it for the user
    getSelection().selectAllChildren(code);
    say("Selected; copy it with the keyboard");
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}
