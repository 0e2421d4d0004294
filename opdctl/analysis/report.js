"use strict";
// Values of curves, curves to choose, and the order of the responses. The page is complete without this script.

const element = (tag, properties = {}, ...children) => {
  const created = Object.assign(document.createElement(tag), properties);
  created.append(...children);
  return created;
};
const tip = element("div", { id: "tip", hidden: true });
tip.setAttribute("role", "status");
document.body.append(tip);
document.documentElement.classList.add("script");

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 16 + height > innerHeight ? Math.max(4, y - height - 10) : y + 16}px`;
}

// ── Values of curves ────────────────────────────────────────────────────────────────────────────────────────────────

const points = new WeakMap();
function pointsOf(path) {
  if (!points.has(path)) {
    points.set(path, [...path.getAttribute("d").matchAll(/([-\d.]+) ([-\d.]+)/g)].map((pair) => [+pair[1], +pair[2]]));
  }
  return points.get(path);
}

function readScale(text) {
  const [low, high, kind] = text.split(" ");
  return { low: +low, high: +high, isLog: kind === "log" };
}

function valueAt({ low, high, isLog }, fraction) {
  return isLog ? low * (high / low) ** fraction : low + (high - low) * fraction;
}

function format(value, { low, high, isLog }) {
  if (isLog) return value.toPrecision(3);
  const digits = Math.max(0, Math.min(6, 3 - Math.ceil(Math.log10(high - low))));
  return value.toFixed(digits);
}

function showValues(svg, event) {
  const [left, top, right, bottom] = svg.dataset.box.split(" ").map(Number);
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const at = (event.clientX - svg.getBoundingClientRect().left) / scale;
  const x = readScale(svg.dataset.x), y = readScale(svg.dataset.y);
  const closest = [...svg.querySelectorAll(".curve:not([hidden])")].flatMap((curve) =>
    [...curve.querySelectorAll("path")].flatMap(pointsOf).reduce((best, point) => (
      !best.length || Math.abs(point[0] - at) < Math.abs(best[0][1][0] - at) ? [[curve, point]] : best), []));
  if (!closest.length || at < left - 5 || at > right + 5) return hideValues(svg);
  const nearest = closest.map(([, point]) => point[0]).sort((a, b) => Math.abs(a - at) - Math.abs(b - at))[0];
  const lines = closest.filter(([, point]) => Math.abs(point[0] - nearest) < 2).map(([curve, point]) =>
    `${curve.dataset.series || "value"}: ${format(valueAt(y, (bottom - point[1]) / (bottom - top)), y)}`);
  const guide = svg.querySelector(".guide") ?? svg.appendChild(document.createElementNS(svg.namespaceURI, "line"));
  guide.setAttribute("class", "guide");
  for (const [name, number] of Object.entries({ x1: nearest, x2: nearest, y1: top, y2: bottom })) guide.setAttribute(name, number);
  const position = valueAt(x, (nearest - left) / (right - left));
  showTip([`${svg.dataset.label}: ${Number(position.toFixed(1))}`, ...lines].join("\n"), event.clientX, event.clientY);
}

function hideValues(svg) {
  svg.querySelector(".guide")?.remove();
  tip.hidden = true;
}

for (const svg of document.querySelectorAll(".panels svg")) {
  svg.addEventListener("pointermove", (event) => showValues(svg, event));
  svg.addEventListener("pointerleave", () => hideValues(svg));
}

// ── Curves to choose ────────────────────────────────────────────────────────────────────────────────────────────────

for (const figure of document.querySelectorAll("figure")) {
  const curves = [...figure.querySelectorAll(".curve")];
  const names = [...new Set(curves.map((curve) => curve.dataset.series).filter(Boolean))];
  if (names.length < 2) continue;
  const choices = element("fieldset", { className: "choose" }, element("legend", { textContent: "Show" }));
  for (const name of names) {
    const box = element("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => {
      for (const part of figure.querySelectorAll("[data-series]")) {
        if (part.dataset.series === name) part.toggleAttribute("hidden", !box.checked);
      }
    });
    choices.append(element("label", {}, box, ` ${name}`));
  }
  figure.querySelector(".panels").before(choices);
}

// ── Responses ───────────────────────────────────────────────────────────────────────────────────────────────────────

const responses = document.querySelector(".responses");
if (responses) {
  const articles = [...responses.querySelectorAll("article")];
  const search = element("input", { type: "search", placeholder: "text of the prompt" });
  const order = element("select", {});
  const orders = { chosen: "as chosen", signal: "mean |A|", length: "length", ratio: "log-ratio to the teacher" };
  for (const [value, textContent] of Object.entries(orders)) order.append(element("option", { value, textContent }));
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const each of articles) each.hidden = !each.querySelector(".prompt").textContent.toLowerCase().includes(wanted);
  });
  order.addEventListener("change", () => {
    const key = order.value;
    const sorted = key === "chosen" ? articles : [...articles].sort((a, b) => b.dataset[key] - a.dataset[key]);
    articles[0].parentElement.append(...sorted);
  });
  responses.querySelector(".controls").append(
    element("label", {}, "Search ", search),
    element("label", {}, "Order by ", order),
  );

  // One token of each response is in the tab order; the arrow keys move to the others.
  const showToken = (token) => {
    const { left, bottom } = token.getBoundingClientRect();
    showTip(token.dataset.n, left - 14, bottom - 12);
  };
  for (const tokens of responses.querySelectorAll(".tokens")) {
    const own = [...tokens.querySelectorAll("[data-n]")];
    if (own.length) own[0].tabIndex = 0;
    tokens.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -own.length, End: own.length }[event.key];
      const from = own.indexOf(document.activeElement);
      if (event.key === "Escape") tip.hidden = true;
      if (!move || from < 0) return;
      event.preventDefault();
      const next = own[Math.max(0, Math.min(own.length - 1, from + move))];
      own[from].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
    tokens.addEventListener("focusin", (event) => showToken(event.target));
    tokens.addEventListener("focusout", () => { tip.hidden = true; });
    tokens.addEventListener("pointerover", (event) => {
      if (event.target.dataset.n) showToken(event.target);
      else tip.hidden = true;
    });
    tokens.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
}
