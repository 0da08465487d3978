// The page of a controller: what /api/state says, shown again every second. All texts are put in as texts.
"use strict";

const EVERY = 1000;
let token = sessionStorage.getItem("token") || "";
let shown = "";
const trouble = { asked: "", seen: "" }; // with what was asked for last, which stays; with looking

const size = (bytes) => {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (bytes < 1024) return `${bytes.toFixed(unit === "B" || bytes >= 100 ? 0 : 1)} ${unit}`;
    bytes /= 1024;
  }
  return `${bytes.toFixed(1)} TiB`;
};
const duration = (seconds) => {
  if (seconds < 1) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 120) return `${seconds.toFixed(1)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
};
const percent = (share) => `${(share * 100).toFixed(0)} %`;

function element(kind, text, attributes = {}) {
  const made = document.createElement(kind);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function state(word) {
  return element("span", word, { class: `state ${word.replace(/[^a-z]/g, "")}` });
}

function meter(share, what) {
  const box = element("span", undefined, { class: "bar" });
  box.append(element("meter", percent(share), { value: Math.min(Math.max(share, 0), 1), high: 0.9, "aria-label": what }));
  box.append(` ${percent(share)}`);
  return box;
}

// columns: [title, cell of a row, "number" or "text" (of any length)]
function table(section, columns, rows, nothing) {
  const box = document.querySelector(`#${section} .rows`);
  if (!rows.length) {
    box.replaceChildren(element("p", nothing, { class: "empty" }));
    return;
  }
  const made = element("table");
  const head = element("tr");
  for (const [title, , kind] of columns) {
    head.append(element("th", title, { scope: "col", class: kind || "short" }));
  }
  const thead = element("thead");
  thead.append(head);
  const body = element("tbody");
  for (const row of rows) {
    const line = element("tr");
    for (const [title, cell, kind] of columns) {
      const td = element("td", undefined, { "data-name": title, class: kind || "short" });
      const value = cell(row);
      td.append(value instanceof Node ? value : String(value ?? "-"));
      line.append(td);
    }
    body.append(line);
  }
  made.append(thead, body);
  box.replaceChildren(made);
}

function action(label, path, body, question) {
  if (!token) return "";
  const made = element("button", label, { type: "button", "aria-label": `${label} ${Object.values(body).join(" ")}` });
  made.addEventListener("click", async () => {
    if (!window.confirm(question)) return;
    const answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", Authorization: `Bearer ${token}` },
      body: JSON.stringify(body),
    });
    const said = answer.ok ? "" : (await answer.json().catch(() => ({}))).error || `the controller says ${answer.status}`;
    fail("asked", said && `${label}: ${said}.`);
    if (answer.status === 403) remember("");
    refresh();
  });
  return made;
}

function fail(what, text) {
  trouble[what] = text;
  const box = document.querySelector("#error");
  box.textContent = Object.values(trouble).filter(Boolean).join(" ");
  box.hidden = !box.textContent;
}

function remember(given) {
  token = given;
  sessionStorage.setItem("token", token);
  document.querySelector("#token").value = "";
  shown = "";
}

function moveList(plan) {
  const box = element("details");
  box.append(element("summary", plan.moves.length === 1 ? "1 move" : `${plan.moves.length} moves`));
  const list = element("ul");
  for (const move of plan.moves) {
    const cost = `sends ${size(move.bytes)}, takes ${duration(move.seconds)}, stops ${duration(move.downtime)}, risk ${percent(move.risk)}`;
    list.append(element("li", `${move.workload}: ${move.source} → ${move.target}. ${move.reason}. Gain ${move.gain.toFixed(3)}; ${cost}.`));
  }
  for (const note of plan.notes) list.append(element("li", note));
  box.append(list);
  return box;
}

function draw(fleet) {
  document.querySelector("#status").textContent = fleet.leads
    ? `${fleet.name} leads` : `${fleet.name} waits; ${fleet.leader || "nobody"} leads`;
  document.querySelector("#unlock").hidden = !fleet.may_act || Boolean(token);
  const summary = document.querySelector("#summary");
  summary.replaceChildren(...[
    [fleet.hosts.length, "hosts"], [fleet.workloads.length, "workloads"],
    [fleet.imbalance.toFixed(3), "imbalance"], [fleet.moves.length, "moves under way"], [fleet.mode, "mode"],
  ].map(([value, name]) => {
    const box = element("div");
    box.append(element("b", value), element("span", name));
    return box;
  }));
  const notes = document.querySelector("#notes");
  notes.hidden = !fleet.notes.length;
  notes.querySelector("ul").replaceChildren(...fleet.notes.map((note) => element("li", note)));

  table("moves", [
    ["Workload", (m) => m.workload], ["From", (m) => m.source], ["To", (m) => m.destination],
    ["Phase", (m) => m.phase || "asked for"], ["Sent", (m) => progressOf(m)],
    ["Would stop", (m) => (m.predicted_downtime === null ? "-" : duration(m.predicted_downtime)), "number"],
    ["Because", (m) => m.reason, "text"],
  ], fleet.moves, "Nothing is moving.");

  table("drains", [
    ["Host", (d) => d.host], ["State", (d) => state(d.state)],
    ["Gone", (d) => drainOf(d)], ["Over in", (d) => (d.ends_in === null ? "-" : duration(d.ends_in)), "number"],
    ["Stays", (d) => Object.entries(d.stays).map(([name, why]) => `${name}: ${why}`).join("; ") || "-", "text"],
  ], fleet.drains, "No host is being emptied.");

  table("hosts", [
    ["Name", (h) => h.name], ["State", (h) => state(h.state)],
    ["CPU", (h) => (h.state === "lost" ? "-" : meter(h.cpu, `cpu of ${h.name}`))],
    ["Memory", (h) => (h.state === "lost" ? "-" : meter(h.memory, `memory of ${h.name}`))],
    ["Pressure", (h) => percent(h.pressure), "number"], ["Workloads", (h) => h.workloads, "number"],
    ["", (h) => (h.state === "active"
      ? action("Drain", "api/drain", { host: h.name }, `Move everything off ${h.name}?`)
      : h.state === "lost" ? "" : action("Uncordon", "api/uncordon", { host: h.name }, `Let workloads come to ${h.name} again?`))],
  ], fleet.hosts, "The fleet has no hosts: migrator init HOST…");

  table("workloads", [
    ["Name", (w) => w.name], ["Host", (w) => w.host + (w.moving_to ? ` → ${w.moving_to}` : "")],
    ["CPU", (w) => w.cpu.toFixed(2), "number"], ["Memory", (w) => size(w.memory), "number"],
    ["Writes", (w) => (w.dirty_rate ? `${size(w.dirty_rate)}/s` : "-"), "number"], ["Pinned", (w) => (w.pinned ? "yes" : "no")],
  ], fleet.workloads, "No containers.");

  table("plans", [
    ["Plan", (p) => p.id], ["State", (p) => state(p.state)], ["Moves", moveList, "text"],
    ["Imbalance", (p) => `${p.imbalance.toFixed(3)} → ${p.predicted.toFixed(3)} predicted` +
      (p.achieved === null ? "" : `, ${p.achieved.toFixed(3)} achieved`)],
    ["Note", (p) => p.why || "-", "text"],
    ["", (p) => (p.state === "proposed" ? action("Apply", "api/apply", { plan: p.id }, `Carry out plan ${p.id}?`) : "")],
  ], fleet.plans, "No plan was made yet.");

  table("history", [
    ["Workload", (m) => m.workload], ["From", (m) => m.source], ["To", (m) => m.destination],
    ["Outcome", (m) => state(m.outcome)],
    ["Stopped", (m) => (m.downtime ? `${duration(m.downtime)} (predicted ${duration(m.predicted_downtime)})` : "-"), "number"],
    ["Sent", (m) => size(m.bytes), "number"], ["Note", (m) => m.why || "-", "text"],
  ], fleet.history, "No move has ended yet.");
}

function progressOf(move) {
  const box = element("span", undefined, { class: "bar" });
  if (move.predicted_bytes) {
    box.append(element("progress", undefined, {
      value: Math.min(move.bytes, move.predicted_bytes), max: move.predicted_bytes, "aria-label": `of ${move.workload}` }));
  }
  box.append(` ${size(move.bytes)}`);
  return box;
}

function drainOf(drain) {
  const box = element("span", undefined, { class: "bar" });
  box.append(element("progress", undefined, {
    value: drain.done, max: Math.max(drain.total, 1), "aria-label": `drain of ${drain.host}` }));
  box.append(` ${drain.done} of ${drain.total}`);
  return box;
}

async function refresh() {
  try {
    const answer = await fetch("api/state", { cache: "no-store" });
    if (!answer.ok) throw new Error(`the controller says ${answer.status}`);
    const text = await answer.text();
    if (text === shown) return;
    const open = [...document.querySelectorAll("#plans details")].map((one) => one.open);
    const focus = document.activeElement?.getAttribute("aria-label");
    draw(JSON.parse(text));
    document.querySelectorAll("#plans details").forEach((one, number) => { one.open = Boolean(open[number]); });
    if (focus && document.activeElement === document.body) {
      [...document.querySelectorAll("[aria-label]")].find((one) => one.getAttribute("aria-label") === focus)?.focus();
    }
    shown = text;
    fail("seen", "");
  } catch (error) {
    fail("seen", `The controller does not answer (${error.message}). What is below is as it was.`);
  }
}

document.querySelector("#unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  remember(document.querySelector("#token").value);
  fail("asked", "");
  refresh();
});

refresh();
setInterval(refresh, EVERY);
