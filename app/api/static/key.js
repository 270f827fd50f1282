/* The form for the API key. It is kept for this tab only, and shown when the service wants one. */
import {$, say} from "./dom.js";
import {ask, key, setKey, whenKeyIsNeeded} from "./service.js";

const accepted = new EventTarget();
let isChecking = false;

/* call(): whenever the service has accepted a key. */
export const whenKeyIsAccepted = call => accepted.addEventListener("accepted", call);

/* Resolves with the next key that the service accepts. */
export const untilKeyIsAccepted = () => new Promise(
  resolve => accepted.addEventListener("accepted", resolve, {once: true}));

function askForKey(wasGiven) {
  setKey("");
  if (!wasGiven && !$("#key-form").hidden) return;  // the user is asked already, perhaps with more words
  show(wasGiven ? "The service does not accept this API key. Check it, and enter it again."
    : "This service needs an API key. Enter the one that you were given.", wasGiven);
}

function show(words, isWrong) {
  const wasHidden = $("#key-form").hidden;
  $("#key-form").hidden = false;
  $("#key-words").textContent = words;
  $("#key-words").classList.toggle("error", isWrong);
  $("#api-key").setAttribute("aria-invalid", String(isWrong));
  $("#change-key").hidden = !key();
  if (wasHidden || isWrong) $("#api-key").focus();
}

export function showKeyIsUsed() {
  $("#key-form").hidden = true;
  $("#api-key").value = "";
  $("#change-key").hidden = !key();
}

async function check(event) {
  event.preventDefault();
  const value = $("#api-key").value.trim();
  if (isChecking || !value) return $("#api-key").focus();
  if (/[^\x21-\x7e]/.test(value)) return show("An API key has only letters, digits and signs of ASCII, no spaces.", true);
  isChecking = true;
  setKey(value);
  try {
    await ask("models");
    showKeyIsUsed();
    say("The API key is accepted");
    $("#input").querySelector("input, textarea, button")?.focus();
    accepted.dispatchEvent(new Event("accepted"));
  } catch (error) {
    if (error.status !== 401) show(error.status ? error.message : "The service cannot be reached. Try again.", true);
  } finally {
    isChecking = false;
  }
}

export function setUpKey() {
  whenKeyIsNeeded(askForKey);
  $("#key-form").addEventListener("submit", check);
  $("#change-key").addEventListener("click", () => {
    $("#key-form").hidden ? show("Enter another API key.", false) : showKeyIsUsed();
  });
}
