"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const ROWS = 12;  // of the table of standings, until all are asked for
const views = [], chosen = {}, data = {};
let expanded = false, generation = 0;

/* Columns back to rows; text comes as codes into its levels. */
function rows(table) {
  const names = Object.keys(table);
  const value = (name, i) => table[name].levels ? table[name].levels[table[name].codes[i]] : table[name].values[i];
  const count = names.length ? (table[names[0]].codes || table[names[0]].values).length : 0;
  return Array.from({length: count}, (_, i) => Object.fromEntries(names.map(name => [name, value(name, i)])));
}

const groups = Object.fromEntries(rows(report.groups).map(row => [row.group, row]));
const trajectories = Object.fromEntries(rows(report.trajectories).map(row => [row.trajectory, row]));
for (const [name, table] of Object.entries(report.data)) data[name] = rows(table);
const references = new Set(data.last.filter(row => row.reference).map(row => row.group));

/* References stay whatever is filtered, to compare with. */
function keeps(group, seed) {
  if (chosen.seed && seed !== undefined && String(seed) !== chosen.seed) return false;
  if (references.has(group)) return true;
  return Object.entries(chosen).every(([axis, value]) => axis === "seed" || !value || groups[group][axis] === value);
}

/* Which rows no other row beats: more of `up` is better, and of `across` too, or less of it where it is a cost. */
function front(table, name, up, across, sign) {
  const known = table.filter(row => !row.joint && row[up] !== null && row[across] !== null);
  const beaten = row => known.some(other => other[up] >= row[up] && sign * other[across] >= sign * row[across] &&
    (other[up] > row[up] || sign * other[across] > sign * row[across]));
  for (const row of table) row[name] = known.includes(row) && !beaten(row);
}

/* What the filters leave of a frame; of one seed alone, standings are that seed's. */
function kept(name) {
  const left = data[name].filter(row => {
    const one = row.trajectory !== undefined ? trajectories[row.trajectory] : row;
    return !one || one.group === undefined || keeps(one.group, one.seed);
  });
  if (name !== "last") return left;
  let last = left.map(row => ({...row}));
  if (chosen.seed) {
    const at = new Map(data.points.filter(row => String(row.seed) === chosen.seed).map(row => [row.group + "\0" + row.t, row]));
    last = last.filter(row => at.has(row.group + "\0" + row.t));
    for (const row of last) Object.assign(row, (({ka, zs, gm, forgetting, bwt}) => ({ka, zs, gm, forgetting, bwt}))(at.get(row.group + "\0" + row.t)));
  }
  front(last, "front", "ka", "zs", 1);
  for (const cost of ["gflops", "seconds"]) front(last, "front_" + cost, "gm", cost, -1);
  return last;
}

function dropDown(text, values, change) {
  const label = document.createElement("label"), list = document.createElement("select");
  label.append(text + " ", list);
  for (const [value, shown] of values) list.add(new Option(shown, value));
  list.addEventListener("change", () => change(list.value));
  return [label, list];
}

/* The values that a figure's drop-down can take just now. */
function offered(choice, frames) {
  return [...new Set(frames[choice.frame].filter(row => !row.reference || choice.column !== "slice").map(row => row[choice.column]))];
}

/* The rows of a figure: of a frame that a drop-down chooses from, only what is chosen. */
function datasets(drawn, frames) {
  return Object.fromEntries(drawn.figure.data.map(name => {
    const choices = drawn.figure.choices.filter(choice => choice.frame === name);
    if (!choices.length) return [name, frames[name]];
    const wanted = new Set(choices.map(choice => drawn.values[choice.signal]));
    return [name, frames[name].filter(row => wanted.has(row[choices[0].column]) || (row.reference && choices[0].column === "slice"))];
  }));
}

/* Drop-downs of a figure offer what the filters leave; what is no longer there gives way to the first that is. */
function settle(drawn, frames) {
  const taken = [];
  for (const choice of drawn.figure.choices) {
    const values = offered(choice, frames), list = drawn.lists[choice.signal];
    if (!values.includes(drawn.values[choice.signal])) drawn.values[choice.signal] = values.find(value => !taken.includes(value)) || values[0] || "";
    taken.push(drawn.values[choice.signal]);
    list.replaceChildren(...values.map(value => new Option(value, value)));
    list.value = drawn.values[choice.signal];
    list.parentElement.hidden = values.length < 2;
  }
}

/* In which settings two trajectories that are compared differ. */
function differ(drawn) {
  const [one, other] = [drawn.values.one, drawn.values.other].map(name => trajectories[name]);
  if (!one || !other) return;
  const axes = Object.keys(report.axes), value = (at, axis) => axis === "seed" ? String(at.seed) : groups[at.group][axis];
  const told = axes.filter(axis => value(one, axis) !== value(other, axis)).map(axis => `${axis} ${value(one, axis)} / ${value(other, axis)}`);
  drawn.told.textContent = one === other ? "One and the same trajectory: choose another." : `They differ in: ${told.join("; ") || "no setting"}.`;
}

async function redraw(drawn, frames) {
  if (drawn.told) differ(drawn);
  for (const [name, value] of Object.entries(drawn.values)) drawn.view.signal(name, value);
  for (const [name, table] of Object.entries(datasets(drawn, frames))) drawn.view.data(name, table);
  await drawn.view.runAsync();
}

function framesNow() {
  return Object.fromEntries(Object.keys(data).map(name => [name, kept(name)]));
}

async function choose(axis, value) {
  chosen[axis] = value === "all" ? "" : value;
  const mine = ++generation, frames = framesNow();
  standings(frames.last);
  for (const drawn of views) {
    if (mine !== generation) return;
    settle(drawn, frames);
    await redraw(drawn, frames);
  }
  document.body.dataset.filtered = mine;
}

/* The table: rows of what is kept, the first dozen until all are asked for; of one seed alone without intervals. */
function standings(last) {
  const body = document.querySelector("#standings tbody"), now = new Map(last.map(row => [row.group, row]));
  let shown = 0;
  for (const line of body.rows) {
    const row = now.get(line.dataset.group), here = row !== undefined;
    line.hidden = !here || (!expanded && shown >= ROWS);
    shown += here;
    for (const cell of line.querySelectorAll("[data-metric]")) {
      cell.dataset.text ??= cell.textContent;
      const value = row && row[cell.dataset.metric];
      cell.textContent = chosen.seed ? (value === null || value === undefined ? "-" : value.toFixed(3)) : cell.dataset.text;
    }
  }
  const more = document.getElementById("all");
  more.hidden = shown <= ROWS;
  fit();
  more.textContent = expanded ? `Show the first ${ROWS}` : `Show all ${shown} groups`;
  document.getElementById("kept").textContent = `${shown} of ${body.rows.length} groups`;
}

function sortBy(button) {
  const head = button.parentElement, body = document.querySelector("#standings tbody");
  const place = [...head.parentElement.children].indexOf(head);
  const text = head.classList.contains("text");
  const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : !text;
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = line => text ? line.cells[place].textContent : parseFloat(line.cells[place].textContent);
  const order = (a, b) => {
    const one = value(a), other = value(b);
    if (!text && (Number.isNaN(one) || Number.isNaN(other))) return Number.isNaN(one) - Number.isNaN(other);
    return (text ? one.localeCompare(other, "en", {numeric: true}) : one - other) * (down ? -1 : 1);
  };
  body.append(...[...body.rows].sort(order));
  standings(kept("last"));
}

/* Where there is no room for a column per axis, the axes stand below the name of the group. */
function fit() {
  for (const table of document.querySelectorAll("table")) {
    table.classList.remove("narrow");
    if (table.offsetWidth > table.parentElement.clientWidth) table.classList.add("narrow");
  }
}

async function draw() {
  const form = document.getElementById("filters");
  for (const [axis, values] of Object.entries(report.axes)) {
    if (values.length < 2) continue;
    const [label, list] = dropDown(axis, ["all", ...values].map(value => [value, value]), value => choose(axis, value));
    list.id = "only_" + axis;
    form.append(label);
    form.hidden = false;
  }
  form.addEventListener("submit", event => event.preventDefault());
  for (const button of document.querySelectorAll("#standings thead button")) button.addEventListener("click", () => sortBy(button));
  document.getElementById("all").addEventListener("click", () => { expanded = !expanded; standings(kept("last")); });
  standings(data.last);
  fit();
  window.addEventListener("resize", fit);
  const options = {ast: true, logLevel: 1, renderer: "svg", actions: {export: true, source: false, compiled: false, editor: false}};
  for (const figure of report.figures) {
    const drawn = {figure, values: {}, lists: {}}, place = document.querySelector(`#${figure.name} .choices`);
    for (const choice of figure.choices) {
      const [label, list] = dropDown(choice.label, [], value => { drawn.values[choice.signal] = value; redraw(drawn, framesNow()); });
      drawn.values[choice.signal] = choice.value;
      drawn.lists[choice.signal] = list;
      place.append(label);
    }
    if (figure.choices.some(choice => choice.signal === "other")) {
      drawn.told = document.createElement("p");
      drawn.told.className = "differ";
      drawn.told.setAttribute("role", "status");
      place.after(drawn.told);
    }
    const frames = framesNow();
    settle(drawn, frames);
    if (drawn.told) differ(drawn);
    drawn.view = (await vegaEmbed(`#${figure.name} .chart`, {...figure.spec, datasets: datasets(drawn, frames)}, options)).view;
    for (const choice of figure.choices) drawn.view.signal(choice.signal, drawn.values[choice.signal]);
    if (figure.choices.length) await drawn.view.runAsync();
    views.push(drawn);
    await new Promise(done => setTimeout(done));
  }
  document.body.dataset.drawn = report.figures.length;
}
draw();
