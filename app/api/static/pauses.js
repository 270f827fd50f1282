/* Times in which nothing is sent, as the service is away or wants fewer requests. The page says so, and goes on by
   itself. */
import {$, pause, say} from "./dom.js";
import {here} from "./service.js";

const FIRST_S = 1, LONGEST_S = 15;  // between two attempts to reach the service
const UNNOTICED_S = 1.5;            // a shorter pause is not worth a notice

let away = null;   // a promise, while the service is away
let asked = null;  // and while the service wants a pause
let goOn = () => {};
let tellBack = () => {};

/* call(): whenever the service is back. */
export function whenBack(call) {
  tellBack = call;
}

$("#try-now").addEventListener("click", () => goOn());
addEventListener("online", () => goOn());

/* Resolves when something may be sent. */
export async function untilFree() {
  while (away || asked) await (away || asked);
}

/* Whether the service answers at all. */
export async function isThere() {
  const response = await fetch(new URL("live", here), {cache: "no-store"}).catch(() => null);
  return Boolean(response?.ok);
}

/* Resolves when the service is back. */
export function untilBack() {
  away ??= (async () => {
    for (let seconds = FIRST_S; ; seconds = Math.min(LONGEST_S, 2 * seconds)) {
      await countdown("The service cannot be reached; is it still running?", seconds);
      if (await isThere()) break;
    }
    hide();
    say("The service is back");
  })().finally(() => { away = null; tellBack(); });
  return away;
}

/* Nothing is sent for this time, which the service has asked for with these words. */
export function rest(words, seconds) {
  asked ??= (seconds < UNNOTICED_S ? pause(seconds) : countdown(words, seconds).then(hide))
    .finally(() => { asked = null; });
  return asked;
}

/* Shows why nothing happens, and for how long; resolves then, or when the user does not want to wait. */
async function countdown(words, seconds) {
  const until = Date.now() + 1000 * seconds;
  let isOver = false;
  $("#pause").hidden = false;
  document.body.classList.add("pausing");
  if ($("#pause-words").textContent !== words) $("#pause-words").textContent = words;  // read aloud once
  await new Promise(resolve => {
    goOn = resolve;
    const tick = () => {
      const left = Math.ceil((until - Date.now()) / 1000);
      if (isOver || left <= 0) return resolve();
      $("#pause-time").textContent = `Trying again in ${inWords(left)}.`;
      setTimeout(tick, Math.min(1000, until - Date.now()));
    };
    tick();
  });
  isOver = true;
  goOn = () => {};
  $("#pause-time").textContent = "Trying again…";
}

function hide() {
  $("#pause").hidden = true;
  $("#pause-words").textContent = "";
  document.body.classList.remove("pausing");
}

const inWords = seconds => seconds < 100 ? `${seconds} s` : seconds < 5400 ? `${Math.ceil(seconds / 60)} min`
  : `${Math.ceil(seconds / 3600)} h`;
