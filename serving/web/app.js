// The playground: a form, the sample that it runs, and a card for each of the sample's segments.

import { call, events, failure } from "./api.js";
import { Composer } from "./composer.js";
import { Cards } from "./output.js";
import { walk } from "./segments.js";

const $ = (id) => document.getElementById(id);
const [form, columns, adder, card] = ["composer", "columns", "adder", "card"].map($);
const say = (message) => ($("status").textContent = message);

let sample = { over: true }; // the sample that is shown
const composer = new Composer(() => ($("sample").value = ""));
const actions = { stop: (index, button) => stop(button, `/branches/${index}`), fork };

async function loadModels() {
  const { data } = await (await call("GET", "v1/models")).json();
  $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
  await loadSamples();
}

/** The samples of the model. The first one is put into a form that holds a sample, not somebody's own text. */
async function loadSamples() {
  const isOwn = $("sample").options.length && !$("sample").value;
  const model = $("model").value;
  const { data } = await (await call("GET", `v1/samples?model=${encodeURIComponent(model)}`)).json();
  const options = data.map((each, index) => new Option(titleOf(each), index));
  $("sample").replaceChildren(new Option("Own text", ""), ...options);
  $("sample").samples = data;
  $("sample-field").hidden = !data.length;
  if (isOwn || !data.length) return;
  $("sample").value = "0";
  composer.fill(data[0]);
}

function titleOf({ main, branches }) {
  const text = main || branches.map(({ text }) => text).join(" ");
  return text.length > 48 ? `${text.slice(0, 47).trimEnd()}…` : text;
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
    if (error.name === "AbortError") return finish("cancelled", "Stopped");
    finish("error", "Ended by an error");
    complain(error);
  }
}

function begin() {
  sample = { id: null, cards: new Cards(actions), tokens: 0, begun: 0, over: false, abort: new AbortController() };
  walk(composer.sample).forEach(({ path, segment }, index) => {
    const placed = sample.cards.at(index, path);
    placed.prompt.textContent = segment.text;
    placed.readOnly = segment.max_tokens === 0;
  });
  complain(null);
  say("Waiting for the server");
  $("speed").textContent = "";
  $("trunk").textContent = $("main").value;
  $("stop-all").hidden = false;
  $("run").setAttribute("aria-disabled", "true");
}

function take(event) {
  if (event.error) throw failure(event.error.message, event.error);
  const { branches = [], deltas = [] } = event;
  sample.id = event.id;
  for (const { index, path, branch, time } of branches) sample.cards.at(index, path).locate(branch, time);
  for (const delta of deltas) {
    const written = sample.cards.at(delta.index, delta.path);
    written.write(delta);
    for (const { index, path, title } of delta.fork?.branches ?? []) sample.cards.at(index, path).prompt.textContent = title;
    if (delta.finish_reason) say(`${written.name}: ${written.badge.textContent}`);
  }
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

/** The stream is over. Segments that it has left without a reason get this one. */
function finish(reason, message) {
  sample.over = true;
  sample.cards.byIndex.forEach((each) => each.end(reason));
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

/** Stop a segment and continue it with these texts. */
async function fork(index, texts) {
  const from = sample;
  if (!texts.length) return;
  const body = { branches: texts, ...settings() };
  const response = await call("POST", `v1/branches/${from.id}/branches/${index}/fork`, body).catch(complain);
  if (!response) return;
  const { branches } = await response.json();
  branches.forEach((place, number) => (from.cards.at(place.index, place.path).prompt.textContent = texts[number]));
}

async function addToRunning() {
  const [to, text] = [sample, $("more").value];
  complain(null);
  const response = await call("POST", `v1/branches/${to.id}/branches`, { text, ...settings() }).catch(complain);
  if (!response) return;
  const { index, path } = await response.json();
  to.cards.at(index, path).prompt.textContent = text;
  if ($("more").value === text) $("more").value = "";
}

/** What is typed, as a number where it reads as one: whether it makes sense is the server's to judge. */
function settings() {
  const typed = ["max_tokens", "temperature", "top_p", "seed"].map((name) => [name, form.elements[name].value.trim()]);
  const given = typed.filter(([, value]) => value);
  return Object.fromEntries(given.map(([name, value]) => [name, Number.isFinite(Number(value)) ? Number(value) : value]));
}

function sampleRequest() {
  const logprobs = $("logprobs").checked ? 1 : null;
  return { model: $("model").value, ...composer.sample, ...settings(), logprobs, stream: true };
}

/** Show an error, or none, and mark the fields that are to blame. */
function complain(error) {
  document.querySelectorAll("[aria-invalid]").forEach((field) => field.removeAttribute("aria-invalid"));
  $("alert").textContent = error?.message ?? "";
  if (error?.status === 401) $("key-field").hidden = false;
  const param = error?.status === 401 ? "key" : (error?.param ?? "");
  const own = composer.field(param.replace(/\.text$/, ""));
  const rows = /^(branches|reduce)/.test(param) ? [...$("rows").querySelectorAll("textarea")] : [];
  const blamed = own ? [own] : rows.length ? rows : [...document.getElementsByName(param.match(/^\w*/)[0])];
  blamed.forEach((field) => field.setAttribute("aria-invalid", "true"));
  if ($("settings").contains(blamed[0])) $("settings").open = true;
  blamed[0]?.focus();
}

let pointed; // the token under the pointer, otherwise the focused one
function showCard({ target }) {
  pointed = $("details").checked && [target, document.activeElement].find((each) => each?.matches(".tokens > span"));
  card.hidden = !pointed;
  if (card.hidden) return;
  card.textContent = pointed.dataset.about;
  const { left, top } = pointed.getClientRects()[0];
  card.style.left = `clamp(0.5rem, ${left}px, 100% - 14.5rem)`;
  card.style.bottom = `min(100% - ${top - 6}px, 100% - 6.5rem)`;
}

function walkTokens(event) {
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
  (event.target.closest("#output form") ?? form).requestSubmit();
}

function showDetails() {
  $("output").classList.toggle("details", $("details").checked);
  sample.cards?.byIndex.forEach((each) => each.offerTokens());
}

const hideCard = () => (card.hidden = true);
form.addEventListener("submit", (event) => (event.preventDefault(), run()));
adder.addEventListener("submit", (event) => (event.preventDefault(), addToRunning()));
$("main").addEventListener("input", () => composer.onEdit());
$("sample").addEventListener("change", () => $("sample").value && composer.fill($("sample").samples[$("sample").value]));
$("model").addEventListener("change", () => loadSamples().catch(complain));
$("details").addEventListener("change", showDetails);
$("stop-all").addEventListener("click", () => stop($("stop-all")));
$("key").addEventListener("input", () => sessionStorage.setItem("key", $("key").value));
$("key").addEventListener("change", () => loadModels().catch(complain));
adder.addEventListener("focusout", ({ relatedTarget }) => (adder.hidden = sample.over && !adder.contains(relatedTarget)));
const onTokens = { pointerover: showCard, focusin: showCard, pointerleave: showCard, focusout: hideCard, keydown: walkTokens };
for (const [kind, action] of Object.entries(onTokens)) $("output").addEventListener(kind, action);
document.addEventListener("scroll", () => card.hidden || showCard({ target: pointed }), { capture: true, passive: true });
document.addEventListener("keydown", press);
$("settings").open = matchMedia("(min-width: 900px)").matches; // on a narrow screen the output begins below the form
loadModels().catch(complain);
