/* What is drawn on the picture, or on a video at its frames: the face, and where the model looked. */
import {$, boxes, element} from "./dom.js";
import {asOption, showLooked} from "./looked.js";
import {showSnippets} from "./snippets.js";

const NEAR_S = 0.06;  // from a frame's time: it is the one that is shown

/* explain(job, prediction): the explanations for another class. */
export function showPicture(job, {predictions, metadata}, explain) {
  const {card} = job;
  const {frames = [], explanations, image_size: size, media_type: mediaType} = metadata;
  const video = $(".picture video", card);
  const shown = mediaType === "video" ? frames : [{...frames[0], explanations}];
  const explained = shown.filter(frame => frame.explanations);
  const look = explained.length && showLooked(
    card, explained, row => explain(job, predictions[row]), (name, row) => {
      const option = Array.isArray(predictions) ? asOption(job.model, predictions[row]) : name;
      showSnippets(card, {...job, options: {...job.options, explain_class: option}});
    });
  const draw = frame => {
    $(".picture > svg", card)?.remove();
    if (frame?.face_box) $(".picture", card).append(boxes(size, frame.face_box));
    if (look) look(frame);
  };
  if (mediaType !== "video") return draw(shown[0]);
  if (shown.length) showFrames(card, shown, video, draw);
}

/* Which frames were used; where the browser can play the video, it goes to the one that is chosen. */
function showFrames(card, frames, video, draw) {
  const of = frame => `${frame.time_s.toFixed(1)} s${frame.predictions ? "" : " (no face)"}`;
  const used = frames.filter(({predictions}) => predictions);
  const words = used.length === 1 ? "One frame was used, at "
    : `The answer is the mean over ${used.length} frames, at `;
  const group = element("div", {className: "frames", ariaLabel: "Frames that the model saw"},
                        element("p", {className: "quiet"}, words + (video ? "" : frames.map(of).join(", "))));
  group.setAttribute("role", "group");
  $("figcaption", card).after(group);
  if (!video) return;
  const buttons = frames.map(frame => {
    const button = element("button", {className: "button small", type: "button"}, of(frame));
    button.addEventListener("click", () => { video.pause(); video.currentTime = frame.time_s; show(frame); });
    return button;
  });
  group.append(element("div", {className: "buttons"}, ...buttons));
  const show = frame => {
    draw(frame);
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(frames[i] === frame)));
  };
  const current = () => frames.find(frame => Math.abs(frame.time_s - video.currentTime) < NEAR_S);
  for (const event of ["timeupdate", "seeked"]) video.addEventListener(event, () => show(current()));
  video.currentTime = frames[0].time_s;
  show(frames[0]);
}
