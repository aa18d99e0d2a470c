// Draws the API's page from openapi.json. Every text goes in as text, never as markup.
"use strict";

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "class") node.className = value;
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  for (const child of children) if (child !== null && child !== undefined) node.append(child);
  return node;
}

function resolve(api, schema) {
  if (!schema) return {};
  if (schema.$ref) return resolve(api, schema.$ref.split("/").slice(1).reduce((at, key) => at[key], api));
  return schema;
}

function typeOf(api, raw) {
  const schema = resolve(api, raw);
  if (schema.anyOf) return schema.anyOf.map((one) => typeOf(api, one)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return "list of " + typeOf(api, schema.items);
  const type = Array.isArray(schema.type) ? schema.type.join(" or ") : schema.type || "any";
  return schema.format ? `${type} (${schema.format})` : type;
}

function limitsOf(schema) {
  const said = [];
  if (schema.minimum !== undefined) said.push(`≥ ${schema.minimum}`);
  if (schema.maximum !== undefined) said.push(`≤ ${schema.maximum}`);
  if (schema.maxLength !== undefined) said.push(`at most ${schema.maxLength} characters`);
  if (schema.maxItems !== undefined) said.push(`at most ${schema.maxItems}`);
  if (schema.enum) said.push(schema.enum.join(", "));
  return said.join(", ");
}

// Text with `names` in it, these as code.
function said(text) {
  return (text || "").split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

// `asked`: of what a caller sends, where fields may be required; of an answer there is nothing to require.
function fieldTable(api, raw, asked) {
  const schema = resolve(api, raw);
  if (!schema.properties) return null;
  const required = new Set(asked ? schema.required || schema.anyOf?.[0].required || [] : []);
  const properties = Object.entries(schema.properties).map(([name, property]) => [name, property, resolve(api, property)]);
  const limited = properties.some(([, , own]) => limitsOf(own));
  const rows = properties.map(([name, property, own]) =>
    el("tr", {},
      el("td", {}, el("code", {}, name), required.has(name) ? el("span", { class: "need", title: "required" }, " *") : null),
      el("td", {}, typeOf(api, property)),
      limited ? el("td", { class: "quiet" }, limitsOf(own)) : null,
      el("td", {}, ...said(property.description || own.description))));
  const titles = ["Field", "Type", ...(limited ? ["Limits"] : []), "Meaning"];
  const head = el("tr", {}, ...titles.map((text) => el("th", { scope: "col" }, text)));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
}

function section(title, content) {
  return content ? [el("h3", {}, title), content] : [];
}

function describeBody(api, content) {
  const raw = content && content["application/json"];
  if (!raw) return [];
  const schema = resolve(api, raw.schema);
  const inputs = schema.properties && schema.properties.inputs && resolve(api, schema.properties.inputs);
  const parts = [];
  if (inputs && inputs.items && resolve(api, inputs.items).properties) {
    parts.push(...section("Fields of one input", fieldTable(api, inputs.items, true)));
  } else {
    parts.push(...section("Body", fieldTable(api, schema, true)));
  }
  return parts;
}

function describeAnswer(api, responses) {
  const good = responses["200"];
  const raw = good && good.content && good.content["application/json"];
  if (!raw) return [];
  const schema = resolve(api, raw.schema);
  const parts = section("Answer", fieldTable(api, schema, false));
  for (const [name, property] of Object.entries(schema.properties || {})) {
    const own = resolve(api, property);
    if (own.type === "array" && own.items && resolve(api, own.items).properties) {
      parts.push(...section(`Each of ${name}`, fieldTable(api, own.items, false)));
    }
  }
  return parts;
}

function tryIt(api, path, verb, operation) {
  const form = el("form", {});
  const parameters = (operation.parameters || []).filter((one) => one.in === "path");
  const fields = parameters.map((one) => {
    const input = el("input", { name: one.name, required: true, autocomplete: "off" });
    form.append(el("label", {}, one.name, input));
    return [one.name, input];
  });
  const json = operation.requestBody && operation.requestBody.content["application/json"];
  let body = null;
  if (json) {
    body = el("textarea", { spellcheck: false, ariaLabel: "Request body", value: JSON.stringify(json.example || { inputs: [{}] }, null, 2) });
    form.append(body);
  }
  const button = el("button", { type: "submit" }, "Send");
  const answer = el("span", { class: "answer", role: "status" });
  const shown = el("pre", { hidden: true });
  form.append(el("div", { class: "act" }, button, answer), shown);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    let target = path.slice(1);
    for (const [name, input] of fields) target = target.replace(`{${name}}`, encodeURIComponent(input.value));
    const started = performance.now();
    try {
      const options = body ? { method: verb.toUpperCase(), headers: { "Content-Type": "application/json" }, body: body.value } : { method: verb.toUpperCase() };
      const response = await fetch(target, options);
      const text = await response.text();
      answer.textContent = `${response.status} in ${(performance.now() - started).toFixed(1)} ms`;
      answer.className = "answer " + (response.ok ? "good" : "bad");
      const isJson = (response.headers.get("content-type") || "").includes("json");
      shown.textContent = isJson ? JSON.stringify(JSON.parse(text), null, 2) : text;
    } catch (error) {
      answer.textContent = "no answer";
      answer.className = "answer bad";
      shown.textContent = String(error);
    }
    shown.hidden = false;
    button.disabled = false;
  });
  return [el("h3", {}, "Try it"), form];
}

function draw(api) {
  document.title = document.getElementById("title").textContent = api.info.title;
  document.getElementById("about").append(...said(api.info.description));
  const groups = new Map();
  for (const [path, verbs] of Object.entries(api.paths)) {
    for (const [verb, operation] of Object.entries(verbs)) {
      const tag = (operation.tags || ["other"])[0];
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push([path, verb, operation]);
    }
  }
  const menu = document.getElementById("menu");
  const page = document.getElementById("operations");
  page.replaceChildren();
  // What most callers come for stands first.
  const ordered = [...groups].sort(([, a], [, b]) => b.some(([, verb]) => verb === "post") - a.some(([, verb]) => verb === "post"));
  for (const [tag, operations] of ordered) {
    menu.append(el("h2", {}, tag));
    for (const [path, verb, operation] of operations) {
      const id = operation.operationId;
      menu.append(el("a", { href: `#${id}` }, operation.summary || path));
      page.append(el("article", { id },
        el("div", { class: "head" }, el("span", { class: `verb ${verb}` }, verb.toUpperCase()), el("span", { class: "path" }, path),
          el("span", { class: "summary" }, operation.summary || "")),
        el("div", { class: "body" }, operation.description ? el("p", {}, ...said(operation.description)) : null,
          ...describeBody(api, operation.requestBody && operation.requestBody.content), ...tryIt(api, path, verb, operation),
          ...describeAnswer(api, operation.responses))));
    }
  }
  nameModel();
}

// The state and the operations come from two answers, in either order: whoever is second finds the other's part.
let servedModel = "";
function nameModel() {
  for (const input of document.querySelectorAll("input[name=model]")) input.placeholder = servedModel;
}

async function showState() {
  const state = document.getElementById("state");
  try {
    const response = await fetch("health/ready");
    const told = await response.json();
    state.className = "state " + (response.ok ? "ready" : "unready");
    state.textContent = response.ok ? "ready: " + Object.entries(told.models).map(([name, version]) => `${name} v${version}`).join(", ") : "not ready";
    servedModel = Object.keys(told.models || {})[0] || "";
    nameModel();
    state.title = response.ok ? told.warnings.join("\n") : told.detail;
  } catch (error) {
    state.className = "state unready";
    state.textContent = "no answer";
  }
}

fetch("openapi.json").then((response) => response.json()).then(draw);
showState();
setInterval(showState, 5000);
