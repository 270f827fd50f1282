/* Where the model looked: a map in colours over the picture, a slider for its strength, and of which class or trait. */
import {$, element} from "./dom.js";

const STRENGTH = 75;  // percent, at first

/* The map of a base64 PNG, as large as the picture; its URL is kept in urls, to be revoked. */
export function overlay(png, words, urls) {
  const bytes = Uint8Array.from(atob(png), character => character.charCodeAt(0));
  urls.push(URL.createObjectURL(new Blob([bytes], {type: "image/png"})));
  return element("img", {className: "overlay", src: urls.at(-1), alt: words});
}

const nameOf = ({class: name, trait}) => name ?? trait;

/* Shows the explanations of an answer's frames, each [{class or trait, overlay}].
   explain(row): the explanations of the same frames for another row of the list, if the answer has them not. */
export function showLooked(card, frames, explain) {
  const slider = element("input", {type: "range", min: 0, max: 100, value: STRENGTH});
  const words = element("span", {}, "");
  const label = element("label", {}, words, slider);
  const known = new Map();  // name → its explanation in each frame
  let chosen = nameOf(frames[0].explanations[0]);
  let current = frames[0];

  const learn = found => found[0].forEach(
    (one, i) => known.set(nameOf(one), found.map(explanations => explanations[i])));
  const fade = () => { const shown = $(".overlay", card); if (shown) shown.style.opacity = slider.value / 100; };
  const draw = () => {
    $(".picture .overlay", card)?.remove();
    const entry = current && known.get(chosen)?.[frames.indexOf(current)];
    words.textContent = `Where it looked for ${chosen}`;
    if (!entry) return;
    $(".picture", card).append(overlay(entry.overlay, `Where the model looked for ${chosen}`, card.urls));
    fade();
  };
  const choose = async (name, row) => {
    if (!known.has(name)) {
      card.setAttribute("aria-busy", "true");
      const found = await explain(row).catch(error => { words.textContent = error.message; });
      card.removeAttribute("aria-busy");
      if (!found) return;
      learn(found);
    }
    chosen = name;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.textContent === name));
    draw();
  };

  learn(frames.map(({explanations}) => explanations));
  const buttons = [...card.querySelectorAll(".bars li span:not(.value)")].filter(
    span => !span.closest(".quiet")).map((span, row) => {
    const button = element("button", {type: "button", className: "pick", title: "Show where it looked for this"},
                           span.textContent);
    button.setAttribute("aria-pressed", String(span.textContent === chosen));
    button.addEventListener("click", () => choose(span.textContent, row));
    span.replaceChildren(button);
    return button;
  });
  slider.addEventListener("input", fade);
  const kind = "trait" in frames[0].explanations[0] ? "trait" : "class";
  $("figure", card).append(element("div", {className: "looked"}, label, element(
    "p", {className: "quiet"}, `Choose another ${kind} in the list to see where it looked for that.`)));
  draw();
  return frame => { current = frame; draw(); };
}
