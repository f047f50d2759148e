"use strict";
const SVG = "http://www.w3.org/2000/svg";
const root = document.documentElement;
root.classList.add("js");

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const one = (selector, within = document) => within.querySelector(selector);

function element(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

/* Tables: a header sorts its column, the controls before a table filter its rows. */
function value(cell) {
  const given = cell.dataset.v ?? cell.textContent.trim();
  return given !== "" && !Number.isNaN(Number(given)) ? Number(given) : given;
}

function sortable(table) {
  all("thead th", table).forEach((header) => {
    const column = header.cellIndex;  // which counts the cells without a title too
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [value(row.cells[column]), row]);
      rows.sort(([a], [b]) =>
        typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
      body.append(...(descending ? rows.reverse() : rows).map(([, row]) => row));
    });
  });
}

function filterable(controls) {
  const table = document.getElementById(controls.dataset.filters);
  const rows = [...table.tBodies[0].rows];
  const fields = all("input, select", controls);
  const output = one("output", controls);
  function apply() {
    let shown = 0;
    for (const row of rows) {
      const fits = fields.every((field) => {
        const wanted = field.value.trim().toLowerCase();
        return field.matches("select")
          ? !wanted || row.dataset[field.name] === field.value
          : row.textContent.toLowerCase().includes(wanted);
      });
      row.hidden = !fits;
      shown += fits;
    }
    output.textContent = `${shown} of ${rows.length} rows`;
  }
  fields.forEach((field) => field.addEventListener("input", apply));
  apply();
}

/* Images: two contestants over each other, with a rule between them. */
function comparison(figure) {
  const stage = one(".stage", figure);
  const slider = one("input", stage);
  const [prompt, left, right] = all("select", figure);
  const [under, over] = all("img", stage);
  const rows = all("tbody tr", document.getElementById(figure.dataset.images));
  const picture = (row, column) => all("img", rows[row])[column];
  function move() {
    stage.style.setProperty("--x", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value}% ${left.selectedOptions[0].text}`);
  }
  function show() {
    for (const [image, choice] of [[under, left], [over, right]]) {
      const source = picture(choice.value, prompt.value);
      image.src = source.src;
      image.alt = source.alt;
    }
    all(".tag", stage).forEach((tag, i) => {
      tag.textContent = [left, right][i].selectedOptions[0].text;
    });
    move();
  }
  under.addEventListener("load", () => {
    stage.style.setProperty("aspect-ratio", `${under.naturalWidth} / ${under.naturalHeight}`);
    stage.classList.toggle("pixels", under.naturalWidth < 256);
  });
  slider.addEventListener("input", move);
  [left, right, prompt].forEach((choice) => choice.addEventListener("input", show));
  show();
}

/* Charts over the timestep. A series is constant in each bucket, or has a point in its middle. */
function ticks(low, high, most = 6) {
  const step = 10 ** Math.floor(Math.log10((high - low) / most));
  const width = [1, 2, 5, 10].map((x) => x * step).find((x) => (high - low) / x <= most);
  const first = Math.ceil(low / width);
  // Of numbers that a float cannot count, or of none at all, there are no ticks.
  const count = Math.min(most + 1, Math.floor(high / width) - first + 1) || 0;
  return Array.from({ length: Math.max(0, count) }, (_, i) => (first + i) * width);
}

function powers(low, high) {
  const found = [];
  const last = Math.min(308, Math.floor(Math.log10(high)));
  // Beyond 10 ** 308 a power is 0 or infinite, and a loop over them would not end.
  for (let e = Math.max(-308, Math.floor(Math.log10(low))); e <= last; e++) {
    for (const digit of [1, 2, 5]) found.push(digit * 10 ** e);
  }
  const within = found.filter((x) => x >= low && x <= high);
  return within.length > 7 ? within.filter((x) => Number.isInteger(Math.log10(x))) : within;
}

const number = (x) => (x === 0 ? "0" : Math.abs(x) < 0.001 || Math.abs(x) >= 1e5
  ? x.toExponential(1) : String(Number(x.toPrecision(3))));

function chart(svg, edges, series, logarithmic) {
  const { width, height } = svg.getBoundingClientRect();
  if (!width) return;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const box = { left: 52, right: width - 8, top: 8, bottom: height - 38 };
  const values = series.flatMap((s) => [...(s.low ?? []), ...s.high]).filter((x) => x !== null);
  const scale = logarithmic ? Math.log10 : (x) => x;
  let [low, high] = [Math.min(...values), Math.max(...values)].map(scale);
  const margin = (high - low || 1) * 0.06;
  [low, high] = [low - margin, high + margin];
  const last = edges.at(-1);
  const x = (t) => box.left + (t / last) * (box.right - box.left);
  const y = (v) => box.bottom - ((scale(v) - low) / (high - low)) * (box.bottom - box.top);
  const shown = logarithmic ? powers(10 ** low, 10 ** high) : ticks(low, high);
  for (const tick of shown) {
    svg.append(element("path", { class: tick === 0 && !logarithmic ? "axis zero" : "axis", d: `M${box.left} ${y(tick)}H${box.right}` }));
    svg.append(element("text", { x: box.left - 8, y: y(tick) + 4, "text-anchor": "end" }, number(tick)));
  }
  for (const tick of ticks(0, last, width < 480 ? 3 : 6)) {
    svg.append(element("path", { class: "axis", d: `M${x(tick)} ${box.bottom}v5` }));
    svg.append(element("text", { x: x(tick), y: box.bottom + 18, "text-anchor": tick === last ? "end" : "middle" }, number(tick)));
  }
  svg.append(element("path", { class: "axis", d: `M${box.left} ${box.bottom}H${box.right}` }));
  svg.append(element("text", { x: box.right, y: height - 4, "text-anchor": "end" }, "timestep (0 is the image, the last is noise)"));
  const steps = (points) => points.map((v, k) => `${k ? "L" : "M"}${x(edges[k])} ${y(v)}H${x(edges[k + 1])}`).join("");
  const middles = (points) => points
    .map((v, k) => v === null ? "" : `${k && points[k - 1] !== null ? "L" : "M"}${x((edges[k] + edges[k + 1]) / 2)} ${y(v)}`).join("");
  for (const [i, s] of series.entries()) {
    const look = `s${s.colour ?? i}`;
    const classes = `line ${look}${s.dashed ? " dashed" : ""}`;
    if (s.low && !s.dashed) {
      const back = s.low.map((v, k) => `L${x(edges[k + 1])} ${y(v)}H${x(edges[k])}`).reverse().join("");
      svg.append(element("path", { class: `area ${look}`, d: `${steps(s.high)}${back}Z` }));
    }
    for (const points of s.low ? [s.low, s.high] : [s.high]) {
      svg.append(element("path", { class: classes, d: s.low ? steps(points) : middles(points) }));
    }
  }
}

function legend(list, series) {
  list.replaceChildren(...series.map((s, i) => {
    const item = document.createElement("li");
    const mark = element("svg", { "aria-hidden": "true", viewBox: "0 0 28 10" });
    mark.append(element("path", { class: `line s${s.colour ?? i}${s.dashed ? " dashed" : ""}`, d: "M0 5H28" }));
    item.append(mark, s.name);
    return item;
  }));
}

function redrawn(svg, draw) {
  new ResizeObserver(draw).observe(svg);
  draw();
}

function errors(panel) {
  const data = JSON.parse(one("script", panel).textContent);
  const series = Object.entries(data.series).map(([name, high], i, { length }) =>
    // The engine's lies on that of the model which it computes.
    ({ name, high, dashed: i > 0 && i === length - 1 }));
  const values = series.flatMap((s) => s.high).filter((x) => x !== null);
  const logarithmic = Math.min(...values) > 0;
  if (logarithmic) one(".unit", panel).append(", on a logarithmic axis");
  legend(one(".legend", panel), series);
  redrawn(one(".chart", panel), () => chart(one(".chart", panel), data.edges, series, logarithmic));
}

/* Ranges: the chosen quantizer's clip range over the timestep. */
const NAMES = { calibrate: "calibrated", finetune: "finetuned, deployed", import: "imported", lora: "with LoRAs" };

function ranges(section) {
  const data = JSON.parse(one("script", section).textContent);
  const choice = one("select", section);
  const svg = one(".chart", section);
  const readout = one(".readout", section);
  const body = one(".values tbody", section);
  const bounds = (k) => `${number(data.edges[k])}–${number(data.edges[k + 1])}`;
  function draw() {
    const chosen = data.quantizers[choice.value];
    const deployed = data.stages.at(-1);
    const series = data.stages.filter((stage) => chosen.range[stage]).reverse().map((stage, i) => ({
      name: NAMES[stage] + (data.stages.length === 1 ? ", deployed" : ""), low: chosen.range[stage][0],
      high: chosen.range[stage][1], dashed: i > 0, colour: i,
    }));
    chart(svg, data.edges, series, false);
    legend(one(".legend", section), series);
    const [low, high] = chosen.range[deployed];
    svg.setAttribute("aria-label", `Clip range of ${chosen.name} over the timestep: from ` +
      `${number(low[0])} to ${number(high[0])} at the first bucket, ${number(low.at(-1))} to ${number(high.at(-1))} at the last`);
    one(".chosen", section).textContent = `${chosen.bits} bits, read by ${chosen.readers.join(", ")}; ` +
      `the widest range is ${number(chosen.moves)} times the narrowest`;
    body.replaceChildren(...low.map((_, k) => {
      const row = document.createElement("tr");
      const cells = [bounds(k), ...data.stages.map((stage) => {
        const range = chosen.range[stage];
        return range ? `${number(range[0][k])} to ${number(range[1][k])}` : "";
      })];
      row.append(...cells.map((text, i) => {
        const cell = document.createElement(i ? "td" : "th");
        if (!i) cell.scope = "row"; else cell.className = "n";
        cell.textContent = text;
        return cell;
      }));
      return row;
    }));
  }
  for (const map of all(".heat svg", section)) {
    const at = (event) => {
      const place = map.getBoundingClientRect();
      const rows = Number(map.dataset.rows);
      const row = Math.min(rows - 1, Math.floor(((event.clientY - place.top) / place.height) * rows));
      const column = Math.min(data.edges.length - 2, Math.floor(((event.clientX - place.left) / place.width) * (data.edges.length - 1)));
      return [Math.max(0, row) + Number(map.dataset.first), Math.max(0, column)];
    };
    map.addEventListener("pointermove", (event) => {
      const [row, k] = at(event);
      const [low, high] = data.quantizers[row].range[data.stages.at(-1)];
      readout.textContent = `${data.quantizers[row].name}, timesteps ${bounds(k)}: ${number(low[k])} to ${number(high[k])}`;
    });
    map.addEventListener("click", (event) => {
      choice.value = at(event)[0];
      draw();
    });
  }
  choice.addEventListener("input", draw);
  redrawn(svg, draw);
}

all("table.sortable").forEach(sortable);
all("[data-filters]").forEach(filterable);
all(".compare[data-images]").forEach(comparison);
all(".errors").forEach(errors);
all(".ranges").forEach(ranges);
addEventListener("beforeprint", () => all("details").forEach((each) => { each.open = true; }));
