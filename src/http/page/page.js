// Watch it think: sends a prompt and shows, for each token, what drafted it and which step decided it.
"use strict";

// Runs before the body exists, so that the page never flashes in the wrong theme.
const stored = (() => {
  try {
    return localStorage;
  } catch {
    return new Map(); // storage is disabled
  }
})();
if (stored.theme) document.documentElement.dataset.theme = stored.theme;

const SOURCES = ["model", "heads", "text", "both", "grammar"];
const ORIGINS = {
  model: "the model alone",
  heads: "drafted by heads",
  text: "drafted from text",
  both: "drafted by heads and from text",
  grammar: "left alone by the grammar",
};
const N_RUNS = 4; // rows of the table
const byId = (id) => document.getElementById(id);
const now = () => performance.now() / 1e3;
const sourceOf = (token) => token.source ?? "model";

let run = null; // the run on display
const told = []; // rows of the table of runs, newest first

// ---- A run: the part of an answer received so far.

class Run {
  constructor(mode, shares) {
    Object.assign(this, { mode, shares, began: now(), first: null, last: null, tokens: 0, accepted: 0, drafted: null, reason: null });
    this.abort = new AbortController();
    this.steps = []; // { step, rows, n, model, heads, text, both, grammar }
    this.arrivals = []; // [seconds since the first token, tokens so far, tokens per second]
    this.marks = []; // pieces on display: { text, tokens, step, element }
    this.waiting = []; // tokens that have no text yet
    this.selected = null; // an index into marks
  }

  count(tokens) {
    if (!tokens.length) return;
    this.last = now();
    this.first ??= this.last;
    for (const token of tokens) {
      const source = sourceOf(token);
      let step = this.steps.at(-1);
      if (step?.step !== token.step) {
        step = { step: token.step, rows: token.rows, n: 0, model: 0, heads: 0, text: 0, both: 0, grammar: 0 };
        this.steps.push(step);
      }
      step.n += 1;
      step[source] += 1;
      this.tokens += 1;
      this.accepted += source !== "model";
    }
  }

  // Records the arrival time of the tokens so far.
  mark() {
    if (this.first === null || this.tokens === this.arrivals.at(-1)?.[1]) return;
    const at = this.last - this.first;
    this.arrivals.push([at, this.tokens, this.pace(at)]);
  }

  // Tokens per second over the last half second.
  pace(at) {
    const before = this.arrivals.findLast(([t]) => t <= at - 0.5) ?? this.arrivals[0];
    return before && at - before[0] > 0.05 ? (this.tokens - before[1]) / (at - before[0]) : null;
  }

  get rate() {
    const [from, to] = [this.arrivals[0], this.arrivals.at(-1)];
    return to && to[0] > from[0] ? (to[1] - from[1]) / (to[0] - from[0]) : null;
  }

  finish({ usage, speculation, reason }) {
    if (reason) this.reason = reason;
    if (usage) this.tokens = usage.completion_tokens;
    if (speculation) {
      this.n_steps = speculation.steps;
      this.drafted = speculation.drafted;
      this.accepted = speculation.accepted;
    }
  }
}

// Splits the text of a piece among its tokens, as { text, tokens }. The text of a token is only a hint: it has U+FFFD in place of a
// partial character. The token that completes a character gets it; a token without text joins the next one.
function place(text, tokens, waiting) {
  const marks = [];
  let rest = text;
  tokens.forEach((token, i) => {
    const part = i === tokens.length - 1 ? rest : rest.slice(0, share(rest, token.text, tokens[i + 1].text));
    rest = rest.slice(part.length);
    waiting.push(token);
    if (part) marks.push({ text: part, tokens: waiting.splice(0) });
  });
  if (!tokens.length && text) marks.push({ text, tokens: [] });
  return marks;
}

// Length of the part of `rest` that belongs to a token with text `own`, followed by one with text `next`.
function share(rest, own, next) {
  if (!own.includes("\uFFFD")) {
    if (rest.startsWith(own)) return own.length;
    const trimmed = own.trimStart(); // some tokenizers drop the first space of a text
    if (trimmed && rest.startsWith(trimmed)) return trimmed.length;
  }
  const known = own.includes("\uFFFD") ? own : "\uFFFD";
  let head = known.slice(0, known.indexOf("\uFFFD"));
  if (!rest.startsWith(head)) head = "";
  const tail = known.slice(known.lastIndexOf("\uFFFD") + 1);
  const ahead = next.split("\uFFFD", 1)[0];
  const at = tail || ahead ? rest.indexOf(tail + ahead, head.length) : -1;
  return at < 0 ? head.length : at + tail.length;
}

// ---- Requests.

async function send(event) {
  event?.preventDefault();
  run?.abort.abort();
  clearInterval(run?.tick);
  const mine = new Run(document.querySelector("[name=speculation]:checked").value, byId("share").checked);
  run = mine;
  begin(mine);
  try {
    const { response, read } = await ask(mine);
    for await (const events of batches(response)) {
      if (mine !== run) return;
      take(mine, events.map(read));
    }
    if (mine === run) end(mine, mine.reason ? null : "The answer broke off: the server closed the connection.");
  } catch (error) {
    if (mine !== run) return;
    if (error.name === "AbortError") mine.reason = "stopped";
    end(mine, error.name === "AbortError" ? null : error.message);
  }
}

// Sends a chat, or the raw prompt if the model has no chat template.
async function ask(mine) {
  const prompt = byId("prompt").value;
  const number = (id) => (byId(id).value.trim() === "" ? undefined : Number(byId(id).value));
  const common = {
    model: byId("model").value || undefined,
    max_tokens: number("max-tokens"), temperature: number("temperature"), seed: number("seed"),
    // Without this, a repeated prompt would be drafted from its own earlier answer, and runs would not be comparable.
    speculation: mine.mode, share_text: mine.shares, details: true, stream: true,
  };
  const chat = { ...common, ...functions(), messages: [{ role: "user", content: prompt }], stream_options: { include_usage: true } };
  const response = await post("v1/chat/completions", chat, mine);
  if (response.ok) return { response, read: readChat };
  const refusal = await problem(response);
  if (response.status !== 400 || refusal.param !== "messages") throw new Error(refusal.message);
  const plain = await post("generate", { ...common, prompt }, mine);
  if (!plain.ok) throw new Error((await problem(plain)).message);
  return { response: plain, read: readGenerate };
}

// The fields for the functions that the model may call.
function functions() {
  const text = byId("tools").value.trim();
  if (!text) return {};
  try {
    return { tools: JSON.parse(text), tool_choice: byId("must-call").checked ? "required" : "auto" };
  } catch (error) {
    throw new Error(`The functions are not JSON: ${error.message}`);
  }
}

async function post(path, body, mine) {
  const options = { method: "POST", body: JSON.stringify(body), signal: mine.abort.signal };
  return request(path, { ...options, headers: { "content-type": "application/json" } });
}

async function request(path, options) {
  const key = byId("key").value.trim();
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(`Cannot reach the server: ${error.message}`);
  }
  if (response.status === 401) askForKey(options.method === "POST");
  return response;
}

async function problem(response) {
  const body = await response.json().catch(() => ({}));
  return { message: `${response.status} ${response.statusText}`.trim(), ...body.error };
}

// The bodies of a stream's events, in the batches in which they arrive.
async function* batches(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    const data = events.flatMap((event) => event.split("\n")).filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
    yield data.filter((line) => line !== "[DONE]").map((line) => JSON.parse(line));
  }
}

function readChat({ choices: [choice] = [], usage, error }) {
  const { delta = {}, tokens = [], finish_reason: reason, speculation } = choice ?? {};
  const call = ({ function: { name, arguments: more = "" } }) => (name ? `\n${name} ` : "") + more;
  const calls = (delta.tool_calls ?? []).map(call).join("");
  const text = (delta.reasoning_content ?? "") + (delta.content ?? "") + calls;
  return { text, tokens, reason, speculation, usage, error, isThought: Boolean(delta.reasoning_content) };
}

function readGenerate({ generated_text: text = "", tokens = [], finish_reason: reason, speculation, usage, error }) {
  return { text, tokens, reason, speculation, usage, error };
}

function take(mine, pieces) {
  for (const piece of pieces) {
    if (piece.error) throw new Error(piece.error.message);
    mine.count(piece.tokens);
    show(mine, place(piece.text, piece.tokens, mine.waiting), piece.isThought);
  }
  mine.mark();
  pieces.forEach((piece) => mine.finish(piece));
  follow();
  update();
}

// ---- Display.

function begin(mine) {
  byId("answer").replaceChildren();
  byId("answer").classList.add("busy");
  byId("answer").setAttribute("aria-busy", "true");
  byId("stop").disabled = false;
  byId("error").textContent = "";
  byId("inspect").textContent = "";
  byId("status").textContent = "Answering.";
  mine.tick = setInterval(information, 2000);
  update();
}

function end(mine, error) {
  clearInterval(mine.tick);
  byId("answer").classList.remove("busy");
  byId("answer").removeAttribute("aria-busy");
  if (document.activeElement === byId("stop")) byId("prompt").focus();
  byId("stop").disabled = true;
  byId("error").textContent = error ?? "";
  const [tokens, steps] = [mine.tokens, mine.n_steps ?? mine.steps.length];
  const what = { stop: "Ended by the model", length: "Full length", tool_calls: "Ended with calls", stopped: "Stopped" }[mine.reason];
  byId("status").textContent = error ? "Failed." : `${what ?? "Done"}: ${plural(tokens, "token")} in ${plural(steps, "step")}.`;
  if (tokens) addRow(mine, error ? "failed" : mine.reason);
  mine.over = true;
  update();
  information();
}

function show(mine, marks, isThought) {
  const answer = byId("answer");
  for (const { text, tokens } of marks) {
    const token = tokens.at(-1);
    if (!token) {
      // The held-back rest of a token that is on display already.
      answer.lastChild ? answer.lastChild.lastChild.append(text) : answer.append(text);
      continue;
    }
    let group = answer.lastChild;
    if (mine.marks.at(-1)?.step !== token.step) {
      group = document.createElement("span");
      group.className = "s";
      answer.append(group);
    }
    const element = document.createElement("span");
    element.className = token.source ? `t ${token.source}` : "t";
    if (/^\n+$/.test(text)) element.classList.add("nl");
    if (isThought) element.classList.add("thought");
    element.textContent = text;
    element.dataset.mark = mine.marks.length;
    group.append(element);
    if (group.childElementCount > 1) group.classList.add("m");
    mine.marks.push({ text, tokens, step: token.step, element });
  }
}

// Keeps the newest line in view, unless the reader has scrolled up.
let follows = true;
function follow() {
  const answer = byId("answer");
  if (follows) answer.scrollTop = answer.scrollHeight;
}

function select(index) {
  const mark = run?.marks[index];
  if (!mark || run.selected === index) return;
  run.marks[run.selected]?.element.classList.remove("on");
  mark.element.classList.add("on");
  run.selected = index;
  const step = run.steps.find(({ step }) => step === mark.step);
  const origins = [...new Set(mark.tokens.map((token) => ORIGINS[sourceOf(token)]))].join(", ");
  const parts = mark.tokens.length > 1 ? ` (${mark.tokens.length} tokens)` : "";
  byId("inspect").textContent =
    `${JSON.stringify(mark.text)}${parts}: ${origins}; step ${mark.step} gave ${plural(step.n, "token")} from ${plural(step.rows, "row")}`;
  redraw();
}

const plural = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
const decimal = (n, digits) => (n === null || !Number.isFinite(n) ? "–" : n.toFixed(digits));
const duration = (s) => (s === null ? "–" : s < 0.9995 ? `${Math.round(s * 1e3)} ms` : `${s.toFixed(2)} s`);

// Figures for the totals and for the table.
function figures(mine) {
  const steps = mine.n_steps ?? mine.steps.length;
  return {
    tokens: mine.tokens, steps, perStep: decimal(mine.tokens / steps, 2), drafted: mine.drafted ?? "–", accepted: mine.accepted,
    first: duration(mine.first === null ? null : mine.first - mine.began), rate: decimal(mine.rate, 1),
  };
}

function update() {
  const f = figures(run);
  const shown = { "n-tokens": f.tokens, "n-steps": f.steps, "per-step": f.perStep, "n-drafted": f.drafted, "n-accepted": f.accepted, "first-token": f.first };
  for (const [id, value] of Object.entries(shown)) byId(id).textContent = value;
  redraw();
}

// Row elements stay; their contents move down.
function addRow(mine, reason) {
  const f = figures(mine);
  told.unshift([told.length + 1, mine.shares ? `${mine.mode}, recent` : mine.mode, f.tokens, f.steps, f.perStep, f.drafted, f.accepted, f.first, f.rate, reason]);
  [...byId("runs").rows].forEach((row, i) => told[i]?.forEach((value, cell) => (row.cells[cell].textContent = value)));
}

// ---- Plots.

let drawn = 0;
let isScheduled = false;
let colours = null;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

function redraw() {
  if (isScheduled) return;
  isScheduled = true;
  const wait = Math.max(0, drawn + (calm.matches ? 500 : 60) - performance.now());
  setTimeout(() => requestAnimationFrame(() => {
    isScheduled = false;
    drawn = performance.now();
    draw();
  }), wait);
}

function draw() {
  colours ??= readColours();
  const steps = run?.steps ?? [];
  const at = steps.findIndex(({ step }) => step === run?.marks[run.selected]?.step);
  const chosen = steps[at] ?? steps.at(-1);
  const where = chosen ? ` at step ${chosen.step}` : "";
  bars(byId("plot-tokens"), steps, at, (step) => SOURCES.map((source) => [step[source], colours[source]]), 4);
  bars(byId("plot-rows"), steps, at, (step) => [[step.rows, colours.rows]], 8);
  curve(byId("plot-rate"), (run?.arrivals ?? []).filter(([, , rate]) => rate !== null));
  byId("now-tokens").textContent = chosen ? chosen.n + where : "";
  byId("now-rows").textContent = chosen ? chosen.rows + where : "";
  byId("now-rate").textContent = run?.rate ? `${decimal(run.rate, 1)} over ${run.arrivals.at(-1)[0].toFixed(1)} s` : "";
  if (!run?.over) return;
  const f = figures(run);
  byId("plot-tokens").ariaLabel = `Tokens per step: ${f.perStep} in the mean of ${plural(f.steps, "step")}`;
  byId("plot-rows").ariaLabel = `Rows per step: ${Math.max(0, ...steps.slice(1).map(({ rows }) => rows))} at most after the first`;
  byId("plot-rate").ariaLabel = `Tokens per second: ${f.rate} in the mean`;
}

// Prepares a canvas and draws the labelled grid lines of its scale.
function axes(canvas, top) {
  const [w, h, ratio] = [canvas.clientWidth, canvas.clientHeight, devicePixelRatio];
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, w, h);
  pen.font = `11px ${colours.mono}`;
  pen.fillStyle = colours.muted;
  pen.strokeStyle = colours.line;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const area = { x: 30, y: 8, w: w - 31, h: h - 16 };
  const y = (value) => area.y + area.h - (Math.min(value, top) / top) * area.h;
  for (const value of [0, top / 2, top]) {
    const line = Math.round(y(value)) + 0.5;
    pen.beginPath();
    pen.moveTo(area.x, line);
    pen.lineTo(area.x + area.w, line);
    pen.stroke();
    pen.fillText(value, area.x - 6, line);
  }
  return { pen, area, y };
}

// One stacked bar per step, bottom part first; only the latest ones if not all fit. The first step reads the prompt and is
// excluded from the scale: its bar is clipped, with its height beside it.
function bars(canvas, steps, selected, parts, least) {
  const height = (step) => parts(step).reduce((sum, [n]) => sum + n, 0);
  const width = Math.min(8, Math.max(3, (canvas.clientWidth - 31) / Math.max(1, steps.length)));
  const from = Math.max(0, steps.length - Math.floor((canvas.clientWidth - 31) / width));
  const seen = steps.slice(from);
  const top = even(Math.max(least, ...seen.filter(({ step }) => step > 1).map(height)));
  const { pen, area, y } = axes(canvas, top);
  seen.forEach((step, i) => {
    const x = area.x + i * width;
    if (from + i === selected) {
      pen.fillStyle = colours.line;
      pen.fillRect(x - 1, area.y, width + 1, area.h);
    }
    let sum = 0;
    for (const [n, colour] of parts(step)) {
      pen.fillStyle = colour;
      pen.fillRect(x, y(sum + n), width - 1, y(sum) - y(sum + n));
      sum += n;
    }
  });
  if (seen[0] && height(seen[0]) > top) {
    pen.fillStyle = colours.muted;
    pen.textAlign = "left";
    pen.fillText(`${height(seen[0])} in step ${seen[0].step}`, area.x + width + 4, area.y + 8);
  }
}

function curve(canvas, points) {
  const seconds = Math.max(1, points.at(-1)?.[0] ?? 0);
  const { pen, area, y } = axes(canvas, even(Math.max(10, ...points.map(([, , rate]) => rate))));
  pen.strokeStyle = colours.ink;
  pen.lineWidth = 1.5;
  pen.beginPath();
  for (const [at, , rate] of points) pen.lineTo(area.x + (at / seconds) * area.w, y(rate));
  pen.stroke();
}

// The next round number with a round half: 4, 6, 8, 10, 20, 40, 60 and so on.
function even(n) {
  const unit = 10 ** Math.floor(Math.log10(Math.max(1, n)));
  return [1, 2, 4, 6, 8, 10].map((k) => k * unit).find((k) => k >= n && k > 1);
}

function readColours() {
  const style = (id) => getComputedStyle(byId(id));
  const line = (id) => style(id).borderBottomColor;
  const body = getComputedStyle(document.body);
  return {
    heads: line("ink-heads"), text: line("ink-text"), both: line("ink-both"), grammar: line("ink-grammar"), model: style("plot-rows").color, rows: style("plot-rows").color,
    ink: body.color, muted: style("runs-label").color, line: line("answer"), mono: style("now-rate").fontFamily,
  };
}

// ---- The server.

async function information() {
  try {
    const response = await request("./", { headers: { accept: "application/json" } });
    if (!response.ok) return;
    showServer(await response.json());
  } catch {
    byId("fact-load").textContent = "server not reachable";
  }
}

function showServer({ model, models, loading, context_size, slots, heads, text_drafts, drafting_on, load }) {
  if (models) {
    const { value } = byId("model");
    byId("model").replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === value)));
    byId("model-row").hidden = false;
    byId("fact-model").textContent = plural(models.length, "model");
    return;
  }
  if (!model) {
    byId("fact-model").textContent = loading === undefined ? "none: the engine has stopped" : `loading, ${Math.round(loading * 100)}%`;
    if (loading !== undefined) setTimeout(information, 1000);
    return;
  }
  const size = model.parameters >= 1e9 ? `${(model.parameters / 1e9).toFixed(1)}B` : `${Math.round(model.parameters / 1e6)}M`;
  const drafts = [heads ? `${heads} heads on ${drafting_on}` : "", text_drafts ? "text" : ""].filter(Boolean);
  byId("fact-model").textContent = byId("fact-model").title = `${model.name}, ${model.quantization}, ${size}`;
  byId("fact-context").textContent = `${context_size} tokens, ${plural(slots, "slot")}`;
  byId("fact-drafts").textContent = drafts.join(", ") || "none";
  byId("fact-load").textContent = `${load.running} running, ${load.waiting} waiting`;
  byId("max-tokens").max = context_size;
}

// Focuses the field when it appears or a prompt was rejected for lack of a key, but not on every poll of the server's state.
function askForKey(wasSending) {
  const appears = byId("key-row").hidden;
  byId("key-row").hidden = false;
  if (appears || wasSending) byId("key").focus();
}

// ---- Start.

function start() {
  byId("form").addEventListener("submit", send);
  byId("stop").addEventListener("click", () => run?.abort.abort());
  byId("key").addEventListener("change", information);
  document.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(event);
    if (event.key === "Escape") run?.abort.abort();
  });
  for (const button of document.querySelectorAll("[data-example]")) {
    button.addEventListener("click", () => {
      byId("prompt").value = button.dataset.example;
      byId("prompt").focus();
    });
  }

  const answer = byId("answer");
  const point = ({ target }) => target.dataset.mark && select(Number(target.dataset.mark));
  answer.addEventListener("pointerover", point);
  answer.addEventListener("click", point);
  answer.addEventListener("scroll", () => (follows = answer.scrollTop + answer.clientHeight > answer.scrollHeight - 40));
  answer.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !run?.marks.length) return;
    event.preventDefault();
    select(Math.min(run.marks.length - 1, Math.max(0, (run.selected ?? (by > 0 ? -1 : run.marks.length)) + by)));
    run.marks[run.selected].element.scrollIntoView({ block: "nearest" });
  });

  for (let i = 0; i < N_RUNS; i++) {
    const row = byId("runs").insertRow();
    for (let cell = 0; cell < 10; cell++) row.insertCell();
  }
  byId("theme").value = stored.theme ?? "system";
  byId("theme").addEventListener("change", ({ target }) => {
    stored.theme = document.documentElement.dataset.theme = target.value;
    repaint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  new ResizeObserver(redraw).observe(byId("plot-tokens"));
  document.addEventListener("visibilitychange", () => document.hidden || information());
  redraw();
  information();
}

function repaint() {
  colours = null;
  redraw();
}

document.addEventListener("DOMContentLoaded", start);
