/* Files that are chosen, dropped or pasted, folders included, and links in their place. */

const MOST_OF_FOLDERS = 1000;
const MEDIA = /^(image|video|audio)\//;

/* {files, skipped}: what was dropped. Of folders, what is wanted (a function of a file); skipped: how many others were in
   them. To be called while the event is handled, as the browser empties it then. */
export async function dropped({items, files}, isWanted) {
  const entries = [...items].filter(({kind}) => kind === "file").map(item => item.webkitGetAsEntry?.());
  if (!entries.some(entry => entry?.isDirectory)) return {files: [...files], skipped: 0};
  const alone = [...files].filter((_, i) => !entries[i]?.isDirectory);
  const found = [];
  for (const entry of entries) if (entry?.isDirectory) await walk(entry, found);
  const wanted = found.filter(file => !file.name.startsWith(".") && isWanted(file));
  return {files: [...alone, ...wanted].slice(0, MOST_OF_FOLDERS),
          skipped: found.length - wanted.length + Math.max(0, alone.length + wanted.length - MOST_OF_FOLDERS)};
}

/* Adds the files of a folder, and of those in it, in the order of their names. */
async function walk(folder, found) {
  const reader = folder.createReader();
  const entries = [];
  for (;;) {  // it gives a hundred at a time
    const more = await new Promise((resolve, reject) => { reader.readEntries(resolve, reject); }).catch(() => []);
    if (!more.length) break;
    entries.push(...more);
  }
  entries.sort((a, b) => a.name.localeCompare(b.name, undefined, {numeric: true}));
  for (const entry of entries) {
    if (entry.isDirectory) await walk(entry, found);
    else found.push(await new Promise(resolve => { entry.file(resolve, () => resolve(null)); }));
  }
  found.splice(0, found.length, ...found.filter(Boolean));
}

/* The address of a picture or file that was dropped or pasted as a link or a part of a page; null if there is none. */
export function linkIn(data) {
  const isAddress = line => /^(https?|data|blob|file):\S+$/i.test(line);
  const page = new DOMParser().parseFromString(data.getData("text/html"), "text/html");
  const text = `${data.getData("text/uri-list")}\n${data.getData("text/plain")}`;
  const lines = text.split(/\r?\n/).map(line => line.trim());
  return [page.querySelector("img[src]")?.getAttribute("src"), ...lines].find(line => line && isAddress(line)) ?? null;
}

/* The File behind a link, where the browser lets this page have it. Throws an Error that says why not. */
export async function linked(link) {
  const {protocol, origin, host, pathname} = new URL(link);
  if (protocol === "data:") return fromDataUrl(link);
  if (protocol === "file:")
    throw new Error("Browsers keep pages from opening files by their path. Choose the file instead.");
  if (protocol === "blob:" || origin !== location.origin)
    throw new Error(`This is a link to a file of ${host || "another page"}, which this page may not fetch. `
      + "Save the file and choose it here, or copy the picture itself and paste it.");
  const response = await fetch(link).catch(() => null);
  const type = response?.headers.get("Content-Type") ?? "";
  if (!response?.ok || !MEDIA.test(type)) throw new Error("There is no picture behind this link.");
  return new File([await response.blob()], nameOf(pathname), {type});
}

function nameOf(pathname) {
  const last = pathname.split("/").pop();
  try {
    return decodeURIComponent(last);
  } catch {
    return last;
  }
}

function fromDataUrl(link) {
  const [, type, base64, content] = /^data:([^;,]*)[^,]*?(;base64)?,(.*)$/is.exec(link) ?? [];
  if (!MEDIA.test(type ?? "")) throw new Error("There is no picture in this link.");
  let binary;
  try {
    binary = base64 ? atob(decodeURIComponent(content)) : decodeURIComponent(content);
  } catch {
    throw new Error("The picture in this link is damaged.");
  }
  const bytes = base64 ? Uint8Array.from(binary, character => character.charCodeAt(0)) : binary;
  return new File([bytes], `pasted.${type.split("/")[1].replace(/[^a-z0-9].*/i, "")}`, {type});
}
