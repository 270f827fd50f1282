/* Where the model looked: a map in colours over the picture, a slider for its strength, and of which class or trait. */
import {$, element, say} from "./dom.js";

const STRENGTH = 75;  // percent, at first
const FAINT = 0.05;   // of the strongest map of any trait: less is almost nothing

/* The map of a base64 PNG, as large as the picture; its URL is kept in urls, to be revoked. */
export function overlay(png, words, urls) {
  const bytes = Uint8Array.from(atob(png), character => character.charCodeAt(0));
  urls.push(URL.createObjectURL(new Blob([bytes], {type: "image/png"})));
  return element("img", {className: "overlay", src: urls.at(-1), alt: words});
}

export const nameOf = ({class: name, trait}) => name ?? trait;

/* A prediction's class as the option explain_class: its name, where a number would be another class's name. */
export const asOption = ({labels = []}, {class: name, class_id: number}) =>
  labels.includes(String(number)) ? name : number;

const peak = ({map}) => Math.max(...map.flat());

/* What is said and chosen beside a map. explanations: those of the same picture, for `show` to compare with. */
export function controls(isOfTraits, ...more) {
  const words = element("p", {className: "of"});
  const slider = element("input", {type: "range", min: 0, max: 100, value: STRENGTH});
  const root = element("div", {className: "looked"}, words,
    element("label", {}, "Overlay strength", slider), ...more, element("p", {className: "quiet"},
      "The brighter, the more that part adds to the score; each map is scaled to its own maximum. The square is what "
      + `the model saw. Choose another ${isOfTraits ? "trait" : "class"} in the list to see where it looked for that.`));
  return {
    root, words, slider,
    show(shown, entry, explanations) {
      const others = isOfTraits ? explanations.map(peak) : [];
      const isFaint = entry && peak(entry) <= Math.max(1e-6, FAINT * Math.max(...others));
      words.replaceChildren("Where it looked for ", element("b", {}, shown),
                            isFaint ? ": almost nothing adds to this score." : "");
    },
  };
}

/* Makes the rows of the list buttons, of which the chosen one is pressed; returns them. */
export function pickRows(card, chosen, choose) {
  return [...card.querySelectorAll(".bars li > span:not(.value)")].map(span => {
    let button = $(".pick", span);
    if (!button) {
      const name = span.textContent;
      button = element("button", {type: "button", className: "pick", title: "Show where it looked for this"}, name);
      button.addEventListener("click", () => choose(name, [...$(".bars", card).children].indexOf(span.parentElement)));
      span.replaceChildren(button);
    }
    button.setAttribute("aria-pressed", String(button.textContent === chosen));
    return button;
  });
}

/* Shows the explanations of an answer's frames, each [{class or trait, overlay}].
   explain(row): the explanations of the same frames for another row of the list, if the answer has them not;
   chosen(name, row): called when the user has chosen one. */
export function showLooked(card, frames, explain, wasChosen) {
  const {root, words, slider, show} = controls("trait" in frames[0].explanations[0]);
  const known = new Map();  // name → its explanation in each frame
  let chosen = nameOf(frames[0].explanations[0]);
  let current = frames[0];

  const learn = found => found[0].forEach(
    (one, i) => known.set(nameOf(one), found.map(explanations => explanations[i])));
  const fade = () => { const shown = $(".overlay", card); if (shown) shown.style.opacity = slider.value / 100; };
  const draw = () => {
    $(".picture .overlay", card)?.remove();
    const entry = current && known.get(chosen)?.[frames.indexOf(current)];
    show(chosen, entry, current?.explanations);
    if (!entry) return;
    $(".picture", card).append(overlay(entry.overlay, `Where the model looked for ${chosen}`, card.urls));
    fade();
  };
  const choose = async (name, row) => {
    if (!known.has(name)) {
      card.setAttribute("aria-busy", "true");
      const found = await explain(row).catch(error => { words.textContent = error.message; say(error.message); });
      card.removeAttribute("aria-busy");
      if (!found) return;
      learn(found);
    }
    chosen = name;
    pickRows(card, chosen, choose);
    draw();
    wasChosen(name, row);
    say(words.textContent);
  };

  learn(frames.map(({explanations}) => explanations));
  pickRows(card, chosen, choose);
  slider.addEventListener("input", fade);
  $("figure", card).append(root);
  draw();
  return frame => { current = frame; draw(); };
}
