// The form's rows: the tree of segments that the next sample has.

import { asSegment, below, nameOf } from "./segments.js";

const $ = (id) => document.getElementById(id);
const cloned = (id) => $(id).content.firstElementChild.cloneNode(true);

/** An editable copy: every segment an object. */
const editable = (given) => {
  const { branches, reduce, ...rest } = asSegment(given);
  const own = { ...rest, branches: (branches ?? []).map(editable) };
  return reduce ? { ...own, reduce: editable(reduce) } : own;
};

const plain = ({ branches, reduce, ...rest }) => ({
  ...rest,
  ...(branches.length && { branches: branches.map(plain) }),
  ...(reduce && { reduce: plain(reduce) }),
});

export class Composer {
  /** onEdit: called when a text or the tree changes. */
  constructor(onEdit) {
    this.onEdit = onEdit;
    this.fill({ main: "", branches: [""] });
    $("add-row").onclick = () => this.add(this.tree, "branches");
    $("add-reduce").onclick = () => this.add(this.tree, "reduce");
  }

  /** The tree as the API takes it. */
  get sample() {
    return { ...plain(this.tree), main: $("main").value };
  }

  fill(sample) {
    this.tree = editable(sample);
    $("main").value = sample.main ?? "";
    this.render();
  }

  /** The field of a path, as errors name it. */
  field(path) {
    return [...$("rows").querySelectorAll("textarea")].find(({ dataset }) => dataset.path === path);
  }

  add(parent, kind) {
    const segment = { text: "", branches: [] };
    if (kind === "reduce") parent.reduce = segment;
    else parent.branches.push(segment);
    this.render(segment);
    this.onEdit();
  }

  remove(parent, segment) {
    const index = parent.branches.indexOf(segment);
    if (index < 0) delete parent.reduce;
    else parent.branches.splice(index, 1);
    if (!parent.branches.length) delete parent.reduce;
    this.render(parent.branches[Math.min(Math.max(index, 0), parent.branches.length - 1)] ?? parent);
    this.onEdit();
  }

  /** A text of the user's own has no settings of a sample. */
  edit(segment, text) {
    const { branches, reduce } = segment;
    for (const name of Object.keys(segment)) delete segment[name];
    Object.assign(segment, { text, branches }, reduce && { reduce });
    this.onEdit();
  }

  /** Draw the rows again. active: the segment whose field gets the focus. */
  render(active) {
    $("rows").replaceChildren(...this.rows(this.tree, "", active));
    $("add-reduce").hidden = Boolean(this.tree.reduce);
    $("rows").querySelector("[data-active]")?.focus();
  }

  rows(parent, path, active) {
    return below(parent, path).map((placed) => this.row(parent, placed, active));
  }

  row(parent, { path, segment }, active) {
    const [row, name] = [cloned("row"), nameOf(path)];
    const [field, remove, fork, reduce] = ["textarea", ".remove", ".fork", ".reduce"].map((part) => row.querySelector(part));
    row.querySelector("label span").textContent = name;
    Object.assign(field, { value: segment.text, oninput: () => this.edit(segment, field.value) });
    field.dataset.path = path;
    if (segment === active) field.dataset.active = "";
    Object.assign(remove, { ariaLabel: `Remove ${name.toLowerCase()}`, onclick: () => this.remove(parent, segment) });
    remove.hidden = parent === this.tree && this.tree.branches.length === 1 && segment !== parent.reduce;
    Object.assign(fork, { ariaLabel: `Add a branch to ${name.toLowerCase()}`, onclick: () => this.add(segment, "branches") });
    Object.assign(reduce, { ariaLabel: `Add a reduce to ${name.toLowerCase()}`, onclick: () => this.add(segment, "reduce") });
    reduce.hidden = !segment.branches.length || Boolean(segment.reduce);
    row.querySelector("ol").append(...this.rows(segment, path, active));
    return row;
  }
}
