/* The same request as a line for curl in a shell. */

const EXTENSIONS = new Map([["mpeg", "mp3"], ["jpeg", "jpg"], ["svg+xml", "svg"], ["plain", "txt"]]);

/* The body of a JSON request: what is written in the input goes before what is chosen in the form. */
export function json(input, chosen) {
  return JSON.stringify({...input, ...chosen, ...input});
}

/* url: where the job (see queue.js) is sent; key: the API key, if one is needed; mediaType: of the file that is the
   answer, if it is one. */
export function curl({file, text, input, options, url, model, key}, mediaType) {
  const command = key ? `curl -H ${forShell(`Authorization: Bearer ${key}`)}` : "curl";
  const end = `${mediaType ? `--output ${fileName(mediaType)} ` : ""}${forShell(url)}`;
  const fields = Object.entries(options);
  const form = fields.map(([name, value]) => formField(name, value));
  if (file) return [command, formField("file", file), ...form, end].join(" ");
  const files = fields.filter(([name, value]) => value instanceof File && !(name in input));
  if (files.length && model.takes.includes("text"))
    return [command, formField(model.field, text), ...form, end].join(" ");
  const rest = json(input, Object.fromEntries(fields.filter(([, value]) => !(value instanceof File))));
  const post = `${command} -H 'Content-Type: application/json' -d`;
  if (!files.length) return `${post} ${forShell(rest)} ${end}`;
  const inBase64 = files.map(([name, value], i) => {  // whose line breaks curl removes
    const comma = i || rest !== "{}" ? "," : "";
    return `${forShell(`${comma}${JSON.stringify(name)}:"`)} "$(base64 < ${forShell(value.name)})" '"'`;
  });
  return `printf %s ${forShell(rest.slice(0, -1))} ${inBase64.join(" ")} '}' | ${post} @- ${end}`;
}

/* curl reads a value that begins with @ or < from a file, and takes what follows a semicolon as a type. */
function formField(name, value) {
  if (value instanceof File) return `-F ${forShell(`${name}=@${forCurl(value.name)}`)}`;
  return `${/^[@<"]|;/.test(value) ? "--form-string" : "-F"} ${forShell(`${name}=${value}`)}`;
}

export function fileName(mediaType) {
  const subtype = mediaType.split(";")[0].split("/").pop().trim().toLowerCase().replace(/^x-/, "");
  return `answer.${EXTENSIONS.get(subtype) || subtype.replace(/[^a-z0-9]/g, "")}`;
}

/* curl takes several files separated by commas, options of a file after a semicolon, and - for standard input. */
function forCurl(filename) {
  if (filename === "-") return "./-";
  return /[",;\\]|^\s|\s$/.test(filename) ? `"${filename.replace(/["\\]/g, "\\$&")}"` : filename;
}

/* Control characters would act on the terminal that the line is pasted into, and others change how it looks: they are
   written as octal bytes, which bash, zsh and ksh read. */
function forShell(text) {
  const unseen = /[\p{C}\p{Zl}\p{Zp}]/gu;
  if (/^[\w@%+=:,./-]+$/.test(text)) return text;
  if (text.search(unseen) < 0) return `'${text.replaceAll("'", "'\\''")}'`;
  const octal = character => Array.from(new TextEncoder().encode(character),
                                        byte => "\\" + byte.toString(8).padStart(3, "0")).join("");
  return `$'${text.replace(/['\\]/g, "\\$&").replace(unseen, octal)}'`;
}
