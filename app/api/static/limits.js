/* What is known to be refused before it is sent, and the service's limits in words. */
import {megabytes} from "./dom.js";

/* Why the service would refuse this file, or null. config: that of /info. */
export function refusal({name, type, size}, config = {}) {
  if (!size) return `${name} is empty: it has 0 bytes. Choose one that has content.`;
  const kind = type.split("/")[0];
  const {max_file_size: most = Infinity, max_video_size: mostOfVideo = Infinity} = config;
  const limit = kind === "video" ? mostOfVideo : ["image", "audio"].includes(kind) ? most : Math.max(most, mostOfVideo);
  if (size <= limit) return null;
  const what = {image: "picture", video: "video", audio: "recording"}[kind] || "file";
  return `This ${what} has ${megabytes(size, Math.ceil)}; at most ${megabytes(limit)} are allowed. It was not sent.`;
}

/* The message of an error about a file, with sizes in MB. */
export function inWords({message, body}, file) {
  if (body?.error !== "FILE_TOO_LARGE" || !file) return message;
  return message.replace(/(\d+) bytes/, (_, bytes) => megabytes(Number(bytes), Math.ceil))
    .replace(/at most (\d+) are/, (_, bytes) => `at most ${megabytes(Number(bytes))} are`);
}
