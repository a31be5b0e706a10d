// The output: a card for each segment, side by side with its siblings and over what follows it.

import { nameOf, parentOf } from "./segments.js";

const $ = (id) => document.getElementById(id);
const cloned = (id) => $(id).content.firstElementChild.cloneNode(true);

const STATES = {
  waiting: "waiting",
  writing: "writing",
  stop: "finished",
  length: "length limit",
  forked: "forked",
  cancelled: "stopped",
  error: "error",
  read: "read",
};
const SILENT = {
  stop: "The model ended the text at once.",
  length: "The length limit left no room for text.",
  forked: "Forked before its first token.",
  cancelled: "Stopped before its first token.",
  read: "Only read: nothing is decoded here.",
};

/** The card of one segment. actions: `stop(button)` and `fork(texts)`. */
export class Card {
  constructor(path, actions) {
    this.node = cloned("segment");
    const find = (selector) => this.node.querySelector(selector);
    [this.article, this.children, this.reduce] = ["article", ".branches", ".reduce"].map(find);
    [this.title, this.badge, this.stop, this.fork] = ["h2", ".state", ".stop", ".fork"].map(find);
    [this.prompt, this.tokens, this.note, this.place] = [".prompt", ".tokens", ".note", "footer"].map(find);
    [this.forker, this.forks] = [".forker", ".forker textarea"].map(find);
    this.silent = []; // tokens whose text has not arrived yet
    this.ended = false;
    this.name = this.article.ariaLabel = this.title.textContent = nameOf(path);
    this.stop.ariaLabel = `Stop ${this.name.toLowerCase()}`;
    this.fork.ariaLabel = `Fork ${this.name.toLowerCase()}`;
    this.stop.onclick = () => actions.stop(this.stop);
    this.fork.onclick = () => (this.show("forker"), this.forks.focus());
    this.forker.onsubmit = (event) => (event.preventDefault(), actions.fork(this.forks.value.split("\n").filter(Boolean)));
    this.forker.querySelector("[type=button]").onclick = () => (this.forker.hidden = true, this.fork.focus());
    this.become("waiting");
  }

  show(part) {
    this[part].hidden = false;
  }

  become(state) {
    this.article.dataset.state = state;
    this.badge.textContent = STATES[state] ?? state;
  }

  locate(branch, time) {
    this.first ??= time;
    this.place.textContent = `branch coordinate ${branch}, time ${this.first}${time > this.first ? ` to ${time}` : ""}`;
  }

  write({ text, token, branch, time, logprob, finish_reason: reason, error }) {
    if (token !== null) {
      const odds = typeof logprob === "number" ? `\nlogprob ${logprob.toFixed(3)}` : "";
      this.silent.push(`branch coordinate ${branch}, time ${time}\ntoken ${token}${odds}`);
      this.locate(branch, time);
      this.become("writing");
    }
    if (text || (reason && this.silent.length)) this.append(text);
    if (reason) this.end(reason, error);
  }

  append(text) {
    if (!this.silent.length) return this.tokens.append(text);
    const span = document.createElement("span");
    span.textContent = text;
    span.dataset.about = [text ? JSON.stringify(text) : "no text", ...this.silent.splice(0)].join("\n");
    span.tabIndex = -1;
    this.tokens.append(span);
    if (this.tokens.firstElementChild === span) this.offerTokens();
  }

  /** One tab stop in each card; arrow keys move within it. */
  offerTokens() {
    const first = this.tokens.firstElementChild;
    if (first) first.tabIndex = $("details").checked ? 0 : -1;
  }

  end(reason, error) {
    if (this.ended) return;
    this.ended = true;
    const state = reason === "length" && this.readOnly ? "read" : reason;
    this.become(state);
    this.note.textContent = error ?? (this.tokens.textContent.trim() ? "" : (SILENT[state] ?? ""));
    if ([this.stop, this.fork, ...this.forker.elements].includes(document.activeElement)) this.article.focus({ preventScroll: true });
    this.stop.hidden = this.fork.hidden = this.forker.hidden = true;
  }
}

/** The cards of a sample, by index. actions: `stop(index, button)` and `fork(index, texts)`. */
export class Cards {
  constructor(actions) {
    [this.actions, this.byIndex, this.byPath] = [actions, [], {}];
    $("columns").replaceChildren();
    $("joined").replaceChildren();
  }

  at(index, path) {
    if (this.byIndex[index]) return this.byIndex[index];
    const card = new Card(path, {
      stop: (button) => this.actions.stop(index, button),
      fork: (texts) => this.actions.fork(index, texts),
    });
    const parent = this.byPath[parentOf(path)] ?? { children: $("columns"), reduce: $("joined") };
    (path.endsWith("reduce") ? parent.reduce : parent.children).append(card.node);
    return (this.byPath[path] = this.byIndex[index] = card);
  }
}
