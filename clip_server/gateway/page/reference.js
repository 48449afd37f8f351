const SCHEMAS = "#/components/schemas/";

const block = (text, label) => element("pre", { tabindex: "0", "aria-label": label }, element("code", {}, text));

/** A schema as indented JSON, in which references are the names of schemas. */
function schemaText(schema) {
  const short = (_, value) =>
    typeof value?.$ref === "string" ? `→ ${value.$ref.replace(SCHEMAS, "")}` : value;
  return JSON.stringify(schema, short, 2);
}

/** The names of the schemas that a schema refers to. */
function referredIn(schema) {
  const found = JSON.stringify(schema).matchAll(/"\$ref":"#\/components\/schemas\/(\w+)"/g);
  return [...new Set([...found].map((match) => match[1]))];
}

function schemaView(schema, label) {
  const links = referredIn(schema).map((name) => element("a", { href: `#schema-${name}` }, `${name} `));
  const isLink = Object.keys(schema).join() === "$ref";
  return element("div", {}, ...links, isLink ? null : block(schemaText(schema), label));
}

function curl(path, method, operation) {
  const base = new URL(".", location).href.replace(/\/$/, "");
  const named = (operation.parameters ?? []).filter((parameter) => parameter.in === "path");
  const filled = named.reduce((so, each) => so.replace(`{${each.name}}`, each.example), path);
  const lines = [`curl -s -X ${method.toUpperCase()} ${quoted(base + filled)}`];
  for (const [type, { example }] of Object.entries(operation.requestBody?.content ?? {})) {
    if (example === undefined) continue;
    if (type === "multipart/form-data") {
      for (const [name, value] of Object.entries(example)) lines.push(`-F ${quoted(`${name}=${value}`)}`);
    } else {
      lines.push(`-H ${quoted(`Content-Type: ${type}`)}`, `-d ${quoted(JSON.stringify(example))}`);
    }
  }
  return lines.join(" \\\n  ");
}

function parametersView(parameters) {
  const rows = parameters.map((each) =>
    element("li", {}, element("code", {}, each.name), ` (${each.in}${each.required ? ", required" : ""}) `,
      each.description ?? ""));
  return rows.length ? element("ul", {}, ...rows) : null;
}

function bodyView(content, label) {
  return element("div", {}, ...Object.entries(content ?? {}).map(([type, { schema }]) =>
    element("div", {}, element("code", {}, type), schemaView(schema, `${label}, ${type}`))));
}

function operationView(path, method, operation) {
  const name = `${method.toUpperCase()} ${path}`;
  const responses = Object.entries(operation.responses).map(([status, response]) =>
    element("details", {}, element("summary", {}, `${status}: ${response.description}`),
      bodyView(response.content, `${name}, status ${status}`)));
  return element("details", { class: "card" },
    element("summary", {}, element("code", {}, name), ` ${operation.summary}`),
    operation.description ? element("p", {}, operation.description) : null,
    parametersView(operation.parameters ?? []),
    operation.requestBody ? element("h3", {}, "Request") : null,
    bodyView(operation.requestBody?.content, `${name}, request`),
    element("h3", {}, "Try it"), block(curl(path, method, operation), `${name}, curl`),
    element("h3", {}, "Responses"), ...responses);
}

function tagView(tag, paths) {
  const operations = Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods)
      .filter(([, operation]) => operation.tags[0] === tag.name)
      .map(([method, operation]) => operationView(path, method, operation)));
  return element("section", {}, element("h2", {}, tag.name), element("p", { class: "hint" }, tag.description),
    ...operations);
}

function schemasView(schemas) {
  return element("section", {}, element("h2", {}, "Schemas"), ...Object.entries(schemas).map(([name, schema]) =>
    element("div", { class: "card", id: `schema-${name}` }, element("h3", {}, name), schemaView(schema, name))));
}

async function show() {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`status ${response.status}`);
  const api = await response.json();
  byId("title").textContent = `${api.info.title} ${api.info.version}`;
  byId("description").textContent = api.info.description;
  byId("operations").append(...api.tags.map((tag) => tagView(tag, api.paths)), schemasView(api.components.schemas));
  byId("status").hidden = true;
}

show().catch((error) => {
  byId("status").textContent = `The document cannot be shown: ${error.message}`;
});
