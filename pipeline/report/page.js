"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const views = [];

/* Columns back to rows; text comes as codes into its levels. */
function rows(table) {
  const names = Object.keys(table);
  const value = (name, i) => table[name].levels ? table[name].levels[table[name].codes[i]] : table[name].values[i];
  const count = names.length ? (table[names[0]].codes || table[names[0]].values).length : 0;
  return Array.from({length: count}, (_, i) => Object.fromEntries(names.map(name => [name, value(name, i)])));
}

function choose(axis, value) {
  for (const view of views) view.signal("only_" + axis, value).runAsync();
}

function select(axis, values) {
  const label = document.createElement("label"), list = document.createElement("select");
  label.append(axis + " ", list);
  list.id = "only_" + axis;
  for (const value of ["all", ...values]) list.add(new Option(value, value));
  list.addEventListener("change", () => choose(axis, list.value));
  document.getElementById("filters").append(label);
}

async function draw() {
  const data = Object.fromEntries(Object.entries(report.data).map(([name, table]) => [name, rows(table)]));
  for (const [axis, values] of Object.entries(report.axes)) select(axis, values);
  const options = {ast: true, renderer: "svg", actions: {export: true, source: false, compiled: false, editor: false}};
  for (const figure of report.figures) {
    const datasets = Object.fromEntries(figure.data.map(name => [name, data[name]]));
    const made = await vegaEmbed("#" + figure.name + " .chart", {...figure.spec, datasets}, options);
    if (figure.filtered) views.push(made.view);
  }
  document.body.dataset.drawn = report.figures.length;
}
draw();
