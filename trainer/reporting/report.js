"use strict";
// Draws the curves of a report as SVG. Their numbers are JSON in the page, see curves.py.
const {runs, panels} = JSON.parse(document.getElementById("curves").textContent);
const view = {axis: "steps", smooth: 0, log: new Set(), hidden: new Set()};
const charts = [...document.querySelectorAll("figure[data-panel]")];
const tip = document.getElementById("tip");
const M = {left: 52, right: 12, top: 8, bottom: 26};

const escape = s => String(s).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);
const key = c => `${c.run} ${c.label}`;

function short(v) {
  const a = Math.abs(v);
  if (a >= 1e6) return +(v / 1e6).toPrecision(4) + "M";
  if (a >= 1e4) return +(v / 1e3).toPrecision(4) + "k";
  if (a && a < 1e-3) return v.toExponential(1);
  return String(+v.toPrecision(4));
}

// Words of marks on an axis: as many digits as tell neighbours apart.
function words(v, marks) {
  const step = Math.abs(marks[1] - marks[0]), a = Math.abs(v);
  if (marks.length < 2 || a >= 1e4 || !step || step < 1e-4) return short(v);
  return v.toFixed(Math.max(0, Math.min(4, -Math.floor(Math.log10(step) + 1e-9))));
}

function duration(s) {
  if (s >= 3600) return `${Math.floor(s / 3600)} h ${Math.round(s % 3600 / 60)} min`;
  return s >= 60 ? `${Math.floor(s / 60)} min ${Math.round(s % 60)} s` : `${Math.round(s)} s`;
}

// Position of each point of a curve on the chosen axis.
function along(c) {
  if (view.axis === "time") return c.t;
  const factor = view.axis === "epochs" ? runs[c.run].epochs : 1;
  return c.x.map(x => x * factor);
}

// Mean with weights that fall off by `smooth` per point, unbiased at the start.
function smoothed(y) {
  const b = view.smooth;
  let sum = 0, weight = 0;
  return y.map(v => {
    if (v === null) return null;
    sum = b * sum + (1 - b) * v;
    weight = b * weight + 1 - b;
    return sum / weight;
  });
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(m => m * power >= raw) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {
  const found = [], fine = Math.log10(high / low) < 2;
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
    for (const m of fine ? [1, 2, 5] : [1])
      if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(m * 10 ** e);
  return found.length > 1 ? found : [low, high];
}

function timeTicks(high) {
  const unit = high >= 7200 ? 3600 : high >= 120 ? 60 : 1;
  return ticks(0, high / unit, 5).map(v => [v * unit, `${short(v)} ${{3600: "h", 60: "min", 1: "s"}[unit]}`]);
}

// By run where there are several; else by curve, with that of evaluations where it is alone.
const colour = (c, i, all) => `var(--c${(runs.length > 1 ? c.run : all.length === 1 && c.eval ? 1 : i) % 8})`;

function draw(figure) {
  const panel = panels[figure.dataset.panel], log = view.log.has(panel.title);
  const width = Math.max(280, figure.clientWidth - 24), height = 220;
  const curves = panel.curves.map((c, i) => ({
    ...c, colour: colour(c, i, panel.curves), px: along(c), raw: c.y, value: smoothed(c.y),
  }));
  const shown = curves.filter(c => !view.hidden.has(key(c)));
  const ys = shown.flatMap(c => c.y).filter(v => v !== null && (!log || v > 0));
  const xs = shown.flatMap(c => c.px);
  if (!ys.length) ys.push(1, 10);  // all hidden, or none above 0; a logarithm needs a positive range
  let low = Math.min(...ys), high = Math.max(...ys);
  if (!log && panel.zero) low = Math.min(0, low);
  if (low === high) { high += Math.abs(high) * 0.1 || 1; if (!log) low -= panel.zero ? 0 : Math.abs(low) * 0.1; }
  const right = xs.length ? Math.max(...xs) || 1 : 1;
  const f = log ? Math.log : v => v, span = f(high) - f(low);
  const X = v => M.left + v / right * (width - M.left - M.right);
  const Y = v => height - M.bottom - (f(v) - f(low)) / span * (height - M.top - M.bottom);
  const good = v => v !== null && (!log || v > 0);

  const path = (c, values) => {
    let d = "", pen = false;
    values.forEach((v, i) => {
      if (good(v)) d += `${pen ? "L" : "M"}${X(c.px[i]).toFixed(1)} ${Y(v).toFixed(1)}`;
      pen = good(v);
    });
    return d;
  };
  let svg = "";
  const heights = log ? logTicks(low, high) : ticks(low, high, 4);
  for (const v of heights)
    svg += `<path class="grid" d="M${M.left} ${Y(v)}H${width - M.right}"/><text x="${M.left - 6}" y="${Y(v) + 4}" text-anchor="end">${log ? short(v) : words(v, heights)}</text>`;
  const marks = view.axis === "time" ? timeTicks(right) : ticks(0, right, width < 400 ? 4 : 6).map(v => [v, short(v)]);
  for (const [v, mark] of marks)
    svg += `<text x="${X(v)}" y="${height - 8}" text-anchor="${X(v) > width - 30 ? "end" : "middle"}">${mark}</text>`;
  for (const c of shown) {
    const dash = runs.length > 1 && !c.eval && panel.curves.some(o => o.eval) ? ' stroke-dasharray="4 3"' : "";
    if (view.smooth) svg += `<path class="curve faint" stroke="${c.colour}" d="${path(c, c.raw)}"/>`;
    svg += `<path class="curve" stroke="${c.colour}"${dash} d="${path(c, c.value)}"/>`;
    if (c.y.length <= 40)
      c.value.forEach((v, i) => { if (good(v)) svg += `<circle r="2.5" fill="${c.colour}" cx="${X(c.px[i])}" cy="${Y(v)}"/>`; });
  }
  svg += `<path class="cross" d=""/>`;
  figure.querySelector(".plot").innerHTML =
    `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${escape(panel.title)}">${svg}</svg>`;
  figure.querySelector(".keys").innerHTML = curves.map(c => {
    const name = [runs.length > 1 ? runs[c.run].name : "", c.label].filter(Boolean).join(" ");
    return name && `<button type="button" data-key="${escape(key(c))}" aria-pressed="${!view.hidden.has(key(c))}"><i style="background:${c.colour}"></i>${escape(name)}</button>`;
  }).join("");
  figure.chart = {shown, X, right, width, height};
}

const drawAll = () => charts.forEach(draw);

function hover(figure, event) {
  const {shown, X, right, width, height} = figure.chart, svg = figure.querySelector("svg");
  const box = svg.getBoundingClientRect();
  const at = ((event.clientX - box.left) / box.width * width - M.left) / (width - M.left - M.right) * right;
  const points = shown.filter(c => c.px.length).map(c => {
    let i = 0;
    c.px.forEach((x, j) => { if (Math.abs(x - at) < Math.abs(c.px[i] - at)) i = j; });
    return {c, i};
  });
  if (!points.length) return;
  const near = points.reduce((a, b) => Math.abs(b.c.px[b.i] - at) < Math.abs(a.c.px[a.i] - at) ? b : a);
  const x = X(near.c.px[near.i]);
  svg.querySelector(".cross").setAttribute("d", `M${x} ${M.top}V${height - M.bottom}`);
  const scale = runs[near.c.run].epochs, step = near.c.x[near.i];
  tip.innerHTML = `<div>step ${step.toLocaleString("en")}${scale ? `, epoch ${(step * scale).toFixed(2)}` : ""}, ${duration(near.c.t[near.i])}</div>` +
    points.map(({c, i}) => `<div><i style="background:${c.colour}"></i>${escape([runs.length > 1 ? runs[c.run].name : "", c.label].filter(Boolean).join(" "))} <b>${c.value[i] === null ? "not finite" : short(c.value[i])}</b>${c.x[i] === step ? "" : ` at ${c.x[i].toLocaleString("en")}`}</div>`).join("");
  tip.hidden = false;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, room))}px`;
  tip.style.top = `${box.top + 6 > 0 ? box.top + 6 : event.clientY + 14}px`;
}

charts.forEach(figure => {
  const plot = figure.querySelector(".plot"), title = panels[figure.dataset.panel].title;
  plot.addEventListener("pointermove", event => hover(figure, event));
  plot.addEventListener("pointerdown", event => hover(figure, event));
  plot.addEventListener("pointerleave", () => { tip.hidden = true; draw(figure); });
  figure.querySelector(".log").addEventListener("click", event => {
    if (!view.log.delete(title)) view.log.add(title);
    event.target.setAttribute("aria-pressed", view.log.has(title));
    draw(figure);
  });
  figure.querySelector(".keys").addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    if (!view.hidden.delete(button.dataset.key)) view.hidden.add(button.dataset.key);
    drawAll();
  });
});

document.getElementById("axis").addEventListener("change", event => { view.axis = event.target.value; drawAll(); });
document.getElementById("smooth").addEventListener("input", event => { view.smooth = +event.target.value; drawAll(); });
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
if (runs.some(run => !run.epochs)) document.querySelector('#axis option[value="epochs"]').disabled = true;
addEventListener("resize", drawAll);
addEventListener("beforeprint", () => { tip.hidden = true; });
drawAll();
