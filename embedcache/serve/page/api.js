// Shows openapi.json as a page.

import { api, byId, element, failure, table } from "./dom.js";

const nameOf = (schema) => schema?.$ref?.split("/").pop() ?? null;

function typeOf(schema) {
  if (!schema) return "";
  if (schema.$ref) return nameOf(schema);
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.type === "array") return `list of ${typeOf(schema.items) || "values"}`;
  if (schema.additionalProperties) return `object of ${typeOf(schema.additionalProperties) || "values"}`;
  const bounds = [
    ["minimum", "≥"], ["exclusiveMinimum", ">"], ["maximum", "≤"], ["exclusiveMaximum", "<"], ["maxLength", "length ≤"], ["maxItems", "items ≤"],
  ].filter(([name]) => schema[name] !== undefined).map(([name, sign]) => `${sign} ${schema[name]}`);
  return [schema.format === "binary" ? "bytes" : schema.type, ...bounds].filter(Boolean).join(", ");
}

const fields = (schema) => table(
  Object.entries(schema.properties ?? {}).map(([name, field]) => [
    name, typeOf(field), schema.required?.includes(name) ? "required" : field.default === undefined ? "" : `default ${JSON.stringify(field.default)}`,
    field.description ?? "",
  ]), { head: ["field", "type", "", "description"] });

const FILES = { "image/*": "image.jpg", "audio/*": "recording.wav", "video/*": "video.mp4", "application/zip": "points.npz" };

const contentOf = (holder) => Object.entries(holder?.content ?? {})[0] ?? [null, {}];

function example(method, path, operation, schemas) {
  const [kind, { schema }] = contentOf(operation.requestBody);
  const address = `${location.origin}${path.replace(/\{\w+\}/g, "0")}`;
  if (kind === "application/octet-stream") return `curl -X ${method.toUpperCase()} ${address} --data-binary @rows.bin`;
  if (method !== "post") return `curl ${address}`;
  if (kind !== "application/json") return `curl --data-binary @${FILES[kind]} '${address}?k=10'`;
  const known = schemas[nameOf(schema)]?.properties ?? {};
  const body = "text" in known ? { text: "an animal with feathers", k: 10 } : {};
  return `curl ${address} -H 'Content-Type: application/json' -d '${JSON.stringify(body)}'`;
}

function section(path, method, operation, schemas) {
  const [kind, { schema }] = contentOf(operation.requestBody);
  const [, { schema: answer }] = contentOf(operation.responses["200"]);
  const request = schemas[nameOf(schema)];
  const response = schemas[nameOf(answer)] ?? schemas[nameOf(answer?.items)];
  const parameters = (operation.parameters ?? []).map((one) => [one.name, one.in, typeOf(one.schema), one.description ?? one.schema.description ?? ""]);
  return element("section", {},
    element("h2", {}, element("span", { class: "method" }, method.toUpperCase()), " ", element("code", {}, path)),
    element("p", {}, operation.description ?? operation.summary),
    parameters.length ? element("div", { class: "scroll" }, table(parameters, { head: ["parameter", "in", "type", "description"] })) : null,
    kind ? element("h3", {}, `Request body: ${request ? nameOf(schema) : "bytes"}, ${kind}`) : null,
    request ? element("div", { class: "scroll" }, fields(request)) : null,
    response ? element("h3", {}, `Response: ${answer.items ? "list of " : ""}${nameOf(answer) ?? nameOf(answer.items)}`) : null,
    response ? element("div", { class: "scroll" }, fields(response)) : null,
    element("pre", {}, example(method, path, operation, schemas)));
}

async function start() {
  const { info, paths, components } = await api("/openapi.json");
  const schemas = components?.schemas ?? {};
  const operations = Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => section(path, method, operation, schemas)));
  const others = Object.entries(schemas).filter(([name]) =>
    /^(SearchOptions|HitOut|PlayerOut|CaptionOut|ConceptOut|PartOut|ErrorOut)$/.test(name));
  byId("operations").replaceChildren(
    element("p", {}, info.description),
    ...operations,
    element("h2", {}, "Objects"),
    ...others.map(([name, schema]) => element("section", {}, element("h2", {}, name), element("p", {}, schema.description ?? ""),
      element("div", { class: "scroll" }, fields(schema)))));
  byId("operations").removeAttribute("aria-busy");
}

start().catch((error) => byId("operations").replaceChildren(failure(error)));
