/* What is known to be refused before it is sent. */
import {plural, sizeInWords} from "./dom.js";

/* Why the service would refuse this file, or null. config: that of /info. */
export function refusal({name, type, size}, config = {}) {
  if (!size) return `${name} is empty: it has 0 bytes. Choose one that has content.`;
  const kind = type.split("/")[0];
  const {max_file_size: most = Infinity, max_video_size: mostOfVideo = Infinity} = config;
  const limit = kind === "video" ? mostOfVideo : ["image", "audio"].includes(kind) ? most : Math.max(most, mostOfVideo);
  if (size <= limit) return null;
  const what = {image: "picture", video: "video", audio: "recording"}[kind] || "file";
  const words = [size, limit].map(sizeInWords);
  const [said, allowed] = words[0] === words[1] ? [size, limit].map(bytes => plural(bytes, "byte")) : words;
  return `This ${what} has ${said}; the limit is ${allowed}. It was not sent.`;
}
