/* The same request in Python, with its standard library alone, and in JavaScript for Node; shown beside curl's line. */
import {curl, fileName} from "./curl.js";
import {$} from "./dom.js";
import {key} from "./service.js";

/* job: see queue.js; mediaType: of the file that is the answer, if it is one. */
export function showSnippets(card, job, mediaType = job.model.media_types?.[0]) {
  card.showSnippets = () => {  // again with another key
    const withKey = {...job, key: key()};
    $("code.curl", card).textContent = curl(withKey, mediaType);
    $("code.python", card).textContent = python(withKey, mediaType);
    $("code.javascript", card).textContent = javascript(withKey, mediaType);
  };
  card.showSnippets();
}

/* Characters that are not seen, or change how others are seen, are written as what `escape` makes of their number. */
const quoted = (text, escape) => JSON.stringify(text).replace(
  /[\p{C}\p{Zl}\p{Zp}]/gu, character => escape(character.codePointAt(0)));

const hexadecimal = (number, digits) => number.toString(16).padStart(digits, "0");
const inPython = text => quoted(
  text, code => code > 0xffff ? `\\U${hexadecimal(code, 8)}` : `\\u${hexadecimal(code, 4)}`);
const inJavaScript = text => quoted(text, code => `\\u{${hexadecimal(code, 1)}}`);

/* The source of a value of JSON, or of a File's content as ofFile(name). */
function literal(value, {string, words, ofFile}) {
  const inner = one => literal(one, {string, words, ofFile});
  if (value instanceof File) return ofFile(string(value.name));
  if (typeof value === "string") return string(value);
  if (Array.isArray(value)) return `[${value.map(inner).join(", ")}]`;
  if (value !== null && typeof value === "object")
    return `{${Object.entries(value).map(([name, one]) => `${string(name)}: ${inner(one)}`).join(", ")}}`;
  return words[value] ?? String(value);
}

const hasFiles = options => Object.values(options).some(value => value instanceof File);

export function python({file, input, options, url, key}, mediaType) {
  const language = {string: inPython, words: {true: "True", false: "False", null: "None"},
                    ofFile: name => `base64.b64encode(open(${name}, "rb").read()).decode()`};
  const asJson = !file || hasFiles(options);
  const values = file ? {file, ...options} : {...input, ...options, ...input};
  const query = asJson ? "" : String(new URLSearchParams(options));
  const headers = {"Content-Type": asJson ? "application/json" : "application/octet-stream",
                   ...(key ? {Authorization: `Bearer ${key}`} : {})};
  const needsFiles = asJson && Object.values(values).some(value => value instanceof File);
  return [
    ...(needsFiles ? ["import base64"] : []),
    ...(asJson || !mediaType ? ["import json"] : []),
    "from urllib.request import Request, urlopen",
    "",
    `url = ${inPython(url + (query && `?${query}`))}`,
    `headers = ${literal(headers, language)}`,
    ...(asJson ? [`request = Request(url, json.dumps(${literal(values, language)}).encode(), headers)`]
      : [`with open(${inPython(file.name)}, "rb") as file:`, "    request = Request(url, file.read(), headers)"]),
    "with urlopen(request) as response:",
    ...(mediaType
      ? [`    with open(${inPython(fileName(mediaType))}, "wb") as answer:`, "        answer.write(response.read())"]
      : ["    print(json.dumps(json.load(response), indent=2))"]),
  ].join("\n");
}

export function javascript({file, input, options, url, key}, mediaType) {
  const language = {string: inJavaScript, words: {}, ofFile: name => `await readFile(${name}, "base64")`};
  const values = {...input, ...options, ...input};
  const headers = {...(file ? {} : {"Content-Type": "application/json"}),
                   ...(key ? {Authorization: `Bearer ${key}`} : {})};
  const part = value => value instanceof File
    ? `await openAsBlob(${inJavaScript(value.name)}), ${inJavaScript(value.name)}` : inJavaScript(String(value));
  const fields = Object.entries({file, ...options}).map(
    ([name, value]) => `body.append(${inJavaScript(name)}, ${part(value)});`);
  const names = [...(!file && hasFiles(options) ? ["readFile"] : []), ...(mediaType ? ["writeFile"] : [])];
  return [
    "// Node 20 or later: node predict.mjs",
    ...(file ? ['import {openAsBlob} from "node:fs";'] : []),
    ...(names.length ? [`import {${names.join(", ")}} from "node:fs/promises";`] : []),
    "",
    `const url = ${inJavaScript(url)};`,
    `const headers = ${literal(headers, language)};`,
    ...(file ? ["const body = new FormData();", ...fields]
      : [`const body = JSON.stringify(${literal(values, language)});`]),
    'const response = await fetch(url, {method: "POST", headers, body});',
    ...(mediaType
      ? [`await writeFile(${inJavaScript(fileName(mediaType))}, Buffer.from(await response.arrayBuffer()));`]
      : ["console.log(JSON.stringify(await response.json(), null, 2));"]),
  ].join("\n");
}
