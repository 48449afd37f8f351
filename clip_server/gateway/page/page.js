const SEARCH_LIMIT = 12;
// {name, uri}: the data: URI of a file's content.
const images = [];
let info = null;

/** The JSON of an endpoint's answer. Throws an Error with the server's message. */
async function ask(endpoint, body) {
  const headers = { "Content-Type": "application/json" };
  if (byId("key").value) headers.Authorization = `Bearer ${byId("key").value}`;
  const method = body ? "POST" : "GET";
  // Without credentials the browser does not ask for a name and password of its own.
  const request = { method, headers, body: body && JSON.stringify(body), credentials: "omit" };
  let response;
  try {
    response = await fetch(endpoint, request);
  } catch {
    throw new Error("the server does not answer");
  }
  if (response.status === 401) {
    byId("key-field").hidden = false;
    byId("key").focus();
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error?.message ?? `status ${response.status}`);
  return answer;
}

/** The model that the user chose; empty: the first, as without a choice. */
function chosenModel() {
  const models = byId("models");
  return models.selectedIndex > 0 ? models.value : "";
}

async function showModels() {
  const models = (await ask("v1/models")).data.map((model) => model.id);
  byId("models").replaceChildren(...models.map((id) => element("option", {}, id)));
  byId("models-field").hidden = models.length < 2;
  await showModel();
}

async function showModel() {
  const model = chosenModel();
  info = await ask(model ? `info?model=${encodeURIComponent(model)}` : "info");
  const precision = `${info.runtime} on ${info.device}, ${info.dtype}`;
  byId("model").textContent = `${info.model}: ${info.dim} dimensions, ${precision}`;
  byId("search").hidden = !info.collection;
}

/** What is on the form, texts first: {text} or {name, uri}. */
function chosenItems() {
  const lines = byId("texts").value.split("\n").map((line) => line.trim());
  return [...lines.filter(Boolean).map((text) => ({ text })), ...images];
}

const entryOf = (item) => ("text" in item ? { text: item.text } : { uri: item.uri });
const nameOf = (item) => item.text ?? item.name;
const pictureOf = (item) => ("uri" in item ? element("img", { src: item.uri, alt: "" }) : null);

/** Runs one request for the items of the form, and shows what became of it. */
async function run(doing, answer) {
  const buttons = [...document.querySelectorAll("form button")];
  clearResults();
  const items = chosenItems();
  if (!items.length) {
    byId("status").textContent = "Type a text or choose an image first.";
    byId("texts").focus();
    return;
  }
  byId("status").textContent = `${doing}…`;
  buttons.forEach((button) => { button.disabled = true; });
  try {
    if (!info) await showModels();
    byId("status").textContent = await answer(items);
    byId("results").focus();
  } catch (error) {
    byId("status").textContent = "";
    showErrors([error.message]);
  } finally {
    buttons.forEach((button) => { button.disabled = false; });
  }
}

function clearResults() {
  byId("errors").replaceChildren();
  byId("results").replaceChildren();
  byId("code").hidden = true;
}

function showErrors(messages) {
  byId("errors").replaceChildren(...messages.map((message) => element("li", {}, message)));
}

/** The items and their answers of those that the server answered; shows the errors of the others. */
function answered(items, data) {
  const pairs = items.map((item, index) => ({ ...item, ...{ answer: data[index] } }));
  const failed = pairs.filter((item) => item.answer.error);
  showErrors(failed.map((item) => `${nameOf(item)}: ${item.answer.error}`));
  return pairs.filter((item) => !item.answer.error);
}

async function compare(items) {
  const model = chosenModel();
  const parameters = { normalize: true, ...(model && { model }) };
  const body = { data: items.map(entryOf), parameters };
  const good = answered(items, (await ask("encode", body)).data);
  const texts = good.filter((item) => "text" in item);
  const pictures = good.filter((item) => "uri" in item);
  if (texts.length && pictures.length) {
    const scores = scored(pictures, texts);
    showMatrix(pictures, texts, scores);
    showCharts(pictures, texts, scores);
  } else if (good.length > 1) {
    showMatrix(good, good, scored(good, good));
  }
  const argument = model && `, model=${JSON.stringify(model)}`;
  showCode(items, "encode", parameters, [
    `embeddings = client.encode(items, normalize=True${argument})`,
    "print(embeddings @ embeddings.T)  # cosines",
    ...classifying(items, argument),
  ]);
  return `${good.length} of ${items.length} encoded.`;
}

/** {cosine, probability} for each row and column. */
function scored(rows, columns) {
  const bothKinds = rows !== columns;
  return rows.map((row) => {
    const cosines = columns.map((column) => dot(row.answer.embedding, column.answer.embedding));
    const probabilities = bothKinds ? probabilitiesOf(cosines) : cosines.map(() => null);
    return cosines.map((cosine, index) => ({ cosine, probability: probabilities[index] }));
  });
}

const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);

const hasLogitBias = () => info.logit_bias !== undefined;

/** Sigmoids for a model with a bias, as SigLIP; else the softmax. */
function probabilitiesOf(cosines) {
  const logits = cosines.map((cosine) => cosine * info.logit_scale + (info.logit_bias ?? 0));
  if (hasLogitBias()) return logits.map((logit) => 1 / (1 + Math.exp(-logit)));
  const largest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function showMatrix(rows, columns, scores) {
  const hasShares = scores[0][0].probability !== null;
  const how = hasLogitBias() ? "of each pair alone" : "over the texts";
  const explained = hasShares ? `Cosine, and probability ${how}` : "Cosine";
  const head = element("tr", {}, element("td"), ...columns.map((column) =>
    element("th", { scope: "col" }, pictureOf(column), nameOf(column))));
  const body = rows.map((row, index) =>
    element("tr", {}, element("th", { scope: "row" }, pictureOf(row), nameOf(row)),
      ...scores[index].map(cellOf)));
  const table = element("table", {}, element("caption", {}, explained),
    element("thead", {}, head), element("tbody", {}, ...body));
  const region = { class: "scroll", role: "region", tabindex: "0", "aria-label": "Similarities" };
  byId("results").append(element("h2", {}, "Similarities"), element("div", region, table));
}

function cellOf({ cosine, probability }) {
  const share = probability === null ? null : element("small", {}, percent(probability));
  const cell = element("td", {}, cosine.toFixed(3), share);
  const shade = Math.min(1, Math.max(0, probability ?? cosine));
  cell.style.backgroundColor = `rgba(var(--bar), ${(0.45 * shade).toFixed(3)})`;
  return cell;
}

function showCharts(pictures, texts, scores) {
  const charts = pictures.map((picture, row) => {
    const ranked = texts.map((text, column) => ({ text: text.text, ...scores[row][column] }))
      .sort((a, b) => b.cosine - a.cosine);
    return element("figure", {},
      element("figcaption", {}, pictureOf(picture), picture.name),
      element("ol", {}, ...ranked.map(({ text, probability }) =>
        scoreOf(element("li"), text, percent(probability), probability))));
  });
  byId("results").append(element("h2", {}, "Zero-shot classification"),
    element("div", { class: "charts" }, ...charts));
}

/** Adds a label, a figure and its bar to an element. */
function scoreOf(parent, label, figure, share) {
  const bar = element("div", { class: "bar" });
  bar.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  parent.append(
    element("div", { class: "score" }, element("span", {}, label), element("span", {}, figure)),
    element("div", { class: "track", "aria-hidden": "true" }, bar));
  return parent;
}

async function search(items) {
  const body = { data: items.map(entryOf), parameters: { limit: SEARCH_LIMIT } };
  const good = answered(items, (await ask("search", body)).data);
  for (const item of good) {
    byId("results").append(element("h2", {}, pictureOf(item), `Matches of ${nameOf(item)}`),
      element("ul", { class: "grid" }, ...item.answer.matches.map(cardOf)));
  }
  showCode(items, "search", { limit: SEARCH_LIMIT }, [
    `for matches in client.search(items, limit=${SEARCH_LIMIT}):`,
    "    for match in matches:",
    "        print(match.score, match.id, match.text or match.uri)",
  ]);
  const count = good.reduce((sum, item) => sum + item.answer.matches.length, 0);
  return `${count} matches.`;
}

function cardOf(match) {
  const { relevance, ...scores } = match.scores;
  const [[metric, { value }]] = Object.entries(scores);
  const closeness = metric === "l2" ? 1 / (1 + value) : value;
  const tags = Object.entries(match.tags ?? {}).map(([key, tag]) =>
    `${key}: ${typeof tag === "object" ? JSON.stringify(tag) : tag}`);
  const card = element("li", { class: "card" },
    element("h3", {}, match.text || match.uri || match.id),
    element("p", { class: "hint" }, [match.modality, ...tags].join(" · ")));
  return scoreOf(card, metric, value.toFixed(3), relevance?.value ?? closeness);
}

function classifying(items, argument) {
  const names = images.map((image) => image.name);
  const texts = items.filter((item) => "text" in item).map((item) => item.text);
  if (!names.length || !texts.length) return [];
  return [
    `for labels in client.classify(${JSON.stringify(names)}, ${JSON.stringify(texts)}, prompt="{}"${argument}):`,
    "    print([(label.label, label.probability) for label in labels])",
  ];
}

/** Shows the request as curl and Python; images are files in the current folder. */
function showCode(items, endpoint, parameters, calls) {
  const data = items.map((item) => ("text" in item
    ? `{"text": ${inHereDocument(JSON.stringify(item.text))}}`
    : `{"blob": "$(base64 < ${quoted(item.name)} | tr -d '\\n')"}`));
  const needsKey = !byId("key-field").hidden;
  byId("curl").textContent = [
    `curl -s ${quoted(new URL(endpoint, location.href).href)} \\`,
    "  -H 'Content-Type: application/json' \\",
    ...(needsKey ? ['  -H "Authorization: Bearer $CLIP_AUTH_TOKEN" \\'] : []),
    "  -d @- <<END",
    `{"data": [${data.join(",\n  ")}],`,
    ` "parameters": ${JSON.stringify(parameters)}}`,
    "END",
  ].join("\n");
  const listed = items.map((item) => ("text" in item
    ? `    {"text": ${JSON.stringify(item.text)}},`
    : `    {"image": ${JSON.stringify(item.name)}},`));
  byId("python").textContent = [
    "from clip_client import Client", "",
    `client = Client(${JSON.stringify(location.origin)})`,
    "items = [", ...listed, "]", ...calls,
  ].join("\n");
  const hints = [
    images.length ? "Run it in the folder of the images." : "",
    needsKey ? "The key is in the environment variable CLIP_AUTH_TOKEN." : "",
  ];
  byId("code-hint").textContent = hints.filter(Boolean).join(" ");
  byId("code").hidden = false;
}

const inHereDocument = (text) => text.replace(/[\\$`]/g, "\\$&");

/** Adds files to the chosen images. */
async function add(files) {
  if (!files.length) return;
  const unreadable = [];
  for (const file of files) {
    try {
      images.push({ name: file.name || "image.png", uri: await uriOf(file) });
    } catch {
      unreadable.push(`${file.name} cannot be read: choose files, not folders`);
    }
  }
  showThumbnails();
  showErrors(unreadable);
  byId("status").textContent = `${images.length} ${images.length === 1 ? "image" : "images"} chosen.`;
}

function uriOf(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(imageUri(reader.result));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** The server tells the format from the content, but a URI of another type would be a text. */
const imageUri = (uri) => `data:image/any${uri.slice(uri.indexOf(";base64,"))}`;

function showThumbnails() {
  byId("thumbnails").replaceChildren(...images.map((image, index) => {
    const remove = element("button", { type: "button", "aria-label": `Remove ${image.name}` }, "Remove");
    remove.addEventListener("click", () => {
      images.splice(index, 1);
      showThumbnails();
      byId("files").focus();
    });
    return element("li", {}, pictureOf(image), image.name, remove);
  }));
}

byId("input").addEventListener("submit", (event) => {
  event.preventDefault();
  run("Encoding", compare);
});
byId("search").addEventListener("click", () => run("Searching", search));
byId("texts").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("input").requestSubmit();
});
byId("files").addEventListener("change", async (event) => {
  await add([...event.target.files]);
  event.target.value = ""; // so that the same file may be chosen again
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  if (files.length) event.preventDefault();
  add(files);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
document.addEventListener("dragleave", () => byId("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  add([...event.dataTransfer.files]);
});
byId("key").addEventListener("change", begin);
byId("models").addEventListener("change", () => {
  clearResults();
  showModel().catch((error) => showErrors([error.message]));
});
document.querySelectorAll("[data-copies]").forEach((button) => {
  button.addEventListener("click", async () => {
    await copy(byId(button.dataset.copies));
    byId("status").textContent = "Copied.";
  });
});

/** Copies by selection where the page is not on HTTPS or loopback, whose clipboard is closed. */
async function copy(code) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(code.textContent);
    return;
  }
  getSelection().selectAllChildren(code);
  document.execCommand("copy");
}

function begin() {
  showModels().catch((error) => {
    byId("model").textContent = "";
    showErrors([error.message]);
  });
}

begin();
