// The playground: a form, the sample that it runs, and a column for each of the sample's branches.

const $ = (id) => document.getElementById(id);
const [composer, rows, columns, adder, card] = ["composer", "rows", "columns", "adder", "card"].map($);
const cloned = (id) => $(id).content.firstElementChild.cloneNode(true);
const fields = () => [...rows.querySelectorAll("textarea")];
const texts = () => fields().map(({ value }) => value);
const say = (message) => ($("status").textContent = message);
const column = (of, index) => (of.columns[index] ??= new Column(index));

let sample = { over: true }; // the sample that is shown

const failure = (message, more) => Object.assign(new Error(message), more);
const networkError = (message) => (error) => Promise.reject(error.name === "AbortError" ? error : failure(`${message}: ${error.message}`));

async function call(method, path, body, signal) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const sent = fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  const response = await sent.catch(networkError("The server can't be reached"));
  if (response.ok) return response;
  const { message = `The server answered ${response.status}`, param } = (await response.json().catch(() => null))?.error ?? {};
  const wait = response.headers.get("Retry-After");
  throw failure(wait ? `${message} (try again in ${wait} s)` : message, { status: response.status, param });
}

/** The events of a stream, each one line of data. Read by hand, since EventSource can send no body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read().catch(networkError("The connection broke"));
    if (done) throw failure("The connection closed before the sample was done.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((each) => each.startsWith("data:"))) {
      const data = line.slice("data:".length).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function loadModels() {
  const { data } = await (await call("GET", "v1/models")).json();
  $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
}

class Column {
  constructor(index) {
    this.node = cloned("column");
    const parts = ["h2", ".state", "button", ".prompt", ".tokens", "footer"].map((part) => this.node.querySelector(part));
    [this.title, this.badge, this.stop, this.prompt, this.tokens, this.place] = parts;
    this.silent = []; // tokens whose text has not arrived yet
    this.node.ariaLabel = this.title.textContent = `Branch ${index + 1}`;
    Object.assign(this.stop, { ariaLabel: `Stop branch ${index + 1}`, onclick: () => stop(this.stop, `/branches/${index}`) });
    this.show("waiting");
    columns.append(this.node);
  }

  show(state) {
    this.node.dataset.state = this.badge.textContent = state;
  }

  locate(branch, time) {
    this.first ??= time;
    this.place.textContent = `branch ${branch}, time ${this.first}${time > this.first ? ` to ${time}` : ""}`;
  }

  write({ text, token, branch, time, logprob, finish_reason: reason }) {
    if (token !== null) {
      const odds = typeof logprob === "number" ? `\nlogprob ${logprob.toFixed(3)}` : "";
      this.silent.push(`branch ${branch}, time ${time}\ntoken ${token}${odds}`);
      this.locate(branch, time);
      this.show("writing");
    }
    if (text || (reason && this.silent.length)) this.append(text);
    if (reason) this.end(reason);
  }

  append(text) {
    if (!this.silent.length) return this.tokens.append(text);
    const span = document.createElement("span");
    span.textContent = text;
    span.title = [text ? JSON.stringify(text) : "no text", ...this.silent.splice(0)].join("\n");
    span.tabIndex = this.tokens.childElementCount ? -1 : 0; // one tab stop per column; arrow keys move within it
    this.tokens.append(span);
  }

  end(reason) {
    if (this.stop.hidden) return; // already ended
    this.show(reason);
    if (this.stop === document.activeElement) this.node.focus({ preventScroll: true }); // keep the keyboard focus in this column
    this.stop.hidden = true;
    if (!sample.over) say(`${this.node.ariaLabel} ended: ${reason}`);
  }
}

async function run() {
  if (!sample.over) return say("A sample is running: stop it first");
  begin();
  try {
    if (!$("model").value) await loadModels();
    const response = await call("POST", "v1/branches", sampleRequest(), sample.abort.signal);
    for await (const event of events(response.body)) take(event);
    finish("error", "Done");
  } catch (error) {
    if (error.name === "AbortError") return finish("cancelled", "Cancelled");
    finish("error", "Ended by an error");
    complain(error);
  }
}

function begin() {
  sample = { id: null, columns: [], tokens: 0, begun: 0, over: false, abort: new AbortController() };
  columns.replaceChildren();
  texts().forEach((text, index) => (column(sample, index).prompt.textContent = text));
  complain(null);
  say("Waiting for the server");
  $("speed").textContent = "";
  $("trunk").textContent = $("main").value;
  $("stop-all").hidden = false;
  $("run").setAttribute("aria-disabled", "true");
  // On a narrow screen the columns lie below the form.
  $("output").scrollIntoView();
}

function take(event) {
  if (event.error) throw failure(event.error.message, event.error);
  const { branches = [], deltas = [] } = event;
  sample.id = event.id;
  for (const { index, branch, time } of branches) column(sample, index).locate(branch, time);
  for (const delta of deltas) column(sample, delta.index).write(delta);
  sample.tokens += deltas.filter(({ token }) => token !== null).length;
  if (event.object === "branches.begun") {
    sample.begun = performance.now();
    adder.hidden = false;
    say("Running");
  } else if (deltas.length) {
    const seconds = Math.max(performance.now() - sample.begun, 1) / 1000;
    $("speed").textContent = `${sample.tokens} tokens, ${(sample.tokens / seconds).toFixed(1)} tokens/s`;
  }
}

/** The stream is over. Branches that it has left without a reason get this one. */
function finish(reason, message) {
  sample.over = true;
  sample.columns.forEach((each) => each.end(reason));
  $("run").removeAttribute("aria-disabled");
  if ($("stop-all") === document.activeElement) $("output").focus({ preventScroll: true });
  $("stop-all").hidden = true;
  adder.hidden = !adder.contains(document.activeElement); // do not hide a field that has the focus
  say(message);
}

/** Cancel the sample, or the part of it at `path`. The stream then tells that it has ended. */
async function stop(button, path = "") {
  const from = sample;
  if (!from.id) return path ? say("Not started yet: use Stop all") : from.abort.abort();
  button.setAttribute("aria-disabled", "true");
  await call("DELETE", `v1/branches/${from.id}${path}`).catch((error) => from.over || complain(error));
  button.removeAttribute("aria-disabled");
}

async function addToRunning() {
  const [to, text] = [sample, $("more").value];
  complain(null);
  const response = await call("POST", `v1/branches/${to.id}/branches`, { text, ...settings() }).catch(complain);
  if (!response) return;
  column(to, (await response.json()).index).prompt.textContent = text;
  if ($("more").value === text) $("more").value = "";
}

/** What is typed, as a number where it reads as one: whether it makes sense is the server's to judge. */
function settings() {
  const typed = ["max_tokens", "temperature", "top_p", "seed"].map((name) => [name, composer.elements[name].value.trim()]);
  const given = typed.filter(([, value]) => value);
  return Object.fromEntries(given.map(([name, value]) => [name, Number.isFinite(Number(value)) ? Number(value) : value]));
}

function sampleRequest() {
  const [branches, logprobs] = [texts().map((text) => ({ text })), $("logprobs").checked ? 1 : null];
  return { model: $("model").value, main: $("main").value, branches, ...settings(), logprobs, stream: true };
}

/** Show an error, or none, and mark the fields that are to blame. */
function complain(error) {
  document.querySelectorAll("[aria-invalid]").forEach((field) => field.removeAttribute("aria-invalid"));
  $("alert").textContent = error?.message ?? "";
  if (error?.status === 401) $("key-field").hidden = false;
  const [, name, index] = /^(\w+)(?:\W+(\d+))?/.exec(error?.status === 401 ? "key" : (error?.param ?? "")) ?? [];
  const blamed = name === "branches" ? [fields()[index] ?? fields()].flat() : [...document.getElementsByName(name)];
  blamed.forEach((field) => field.setAttribute("aria-invalid", "true"));
  blamed[0]?.focus();
}

/** One row for each text. Focus goes to the row at `active`, or the last. */
function fillRows(values, active) {
  rows.replaceChildren(...values.map((value, index) => {
    const row = cloned("row");
    row.querySelector("span").textContent = `Branch ${index + 1}`;
    row.querySelector("textarea").value = value;
    const removed = () => fillRows(texts().toSpliced(index, 1), index);
    Object.assign(row.querySelector("button"), { ariaLabel: `Remove branch ${index + 1}`, onclick: removed });
    return row;
  }));
  if (active !== undefined) (fields()[active] ?? fields().at(-1)).focus();
}

let pointed; // the token under the pointer, otherwise the focused one
function showCard({ target }) {
  pointed = [target, document.activeElement].find((each) => each?.matches(".tokens > span"));
  card.hidden = !pointed;
  if (card.hidden) return;
  card.textContent = pointed.title;
  const { left, top } = pointed.getClientRects()[0];
  card.style.left = `clamp(0.5rem, ${left}px, 100% - 14.5rem)`;
  card.style.bottom = `min(100% - ${top - 6}px, 100% - 6.5rem)`;
}

function walk(event) {
  const way = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  const next = way && event.target.matches(".tokens > span") && event.target[way];
  if (!next) return;
  event.preventDefault();
  [event.target.tabIndex, next.tabIndex] = [-1, 0];
  next.focus();
}

function press(event) {
  if (event.key === "Escape") card.hidden = true;
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  (adder.contains(event.target) ? adder : composer).requestSubmit();
}

const hideCard = () => (card.hidden = true);
composer.addEventListener("submit", (event) => (event.preventDefault(), run()));
adder.addEventListener("submit", (event) => (event.preventDefault(), addToRunning()));
$("add-row").addEventListener("click", () => fillRows([...texts(), ""], texts().length));
$("stop-all").addEventListener("click", () => stop($("stop-all")));
$("key").addEventListener("input", () => sessionStorage.setItem("key", $("key").value));
$("key").addEventListener("change", () => loadModels().catch(complain));
adder.addEventListener("focusout", ({ relatedTarget }) => (adder.hidden = sample.over && !adder.contains(relatedTarget)));
const onColumns = { pointerover: showCard, focusin: showCard, pointerleave: showCard, focusout: hideCard, keydown: walk };
for (const [kind, action] of Object.entries(onColumns)) columns.addEventListener(kind, action);
document.addEventListener("scroll", () => card.hidden || showCard({ target: pointed }), { capture: true, passive: true });
document.addEventListener("keydown", press);
fillRows(["What does Ada eat?", "Who likes rice?"]);
loadModels().catch(complain);
