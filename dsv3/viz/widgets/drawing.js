// Draws a scene (dsv3/viz/scene.py) as SVG. Hover and focus show a mark's label; the arrow keys
// go to the nearest mark in their direction; click, Enter and space report its key.
const SVG = "http://www.w3.org/2000/svg";
const colour = (name) => (name ? `var(--dsv3-${name})` : "none");

function shape(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function build(mark) {
  const { kind, x, y } = mark;
  if (kind === "rect")
    return shape("rect", { x, y, width: mark.width || 0, height: mark.height || 0,
                           rx: mark.rounded || 0 });
  if (kind === "image")
    return shape("image", { x, y, width: mark.width, height: mark.height, href: mark.url,
                            preserveAspectRatio: "none" });
  if (kind === "circle") return shape("circle", { cx: x, cy: y, r: mark.radius });
  if (kind === "line")
    return shape("polyline", { points: mark.points.map((point) => point.join(",")).join(" "),
                               "stroke-dasharray": mark.dashed ? "5 4" : "none" });
  if (kind === "polygon")
    return shape("polygon", { points: mark.points.map((point) => point.join(",")).join(" ") });
  const node = shape("text", { x, y, "font-size": mark.size, "text-anchor": mark.anchor,
                               "dominant-baseline": "central" });
  node.textContent = mark.text;
  node.classList.toggle("bold", Boolean(mark.bold));
  node.classList.toggle("code", Boolean(mark.code));
  return node;
}

function paint(node, mark, hatch) {
  node.style.fill = mark.hatched ? `url(#${hatch})` : colour(mark.fill);
  node.style.stroke = mark.hatched ? "none" : colour(mark.stroke);
  if (mark.opacity) node.style.fillOpacity = mark.opacity;
  node.style.strokeWidth = mark.stroke_width || 1;
  if (!mark.label && !mark.key) return;
  node.classList.add("says");
  node.setAttribute("role", mark.key ? "button" : "img");
  node.setAttribute("aria-label", mark.label || mark.text);
  node.setAttribute("tabindex", "-1");
  node.dataset.label = mark.label || "";
  if (!mark.key) return;
  node.dataset.key = mark.key;
  node.setAttribute("aria-pressed", String(Boolean(mark.chosen)));
}

function middle(node) {
  const box = node.getBBox();
  return [box.x + box.width / 2, box.y + box.height / 2];
}

// The mark that lies best in a direction: near, and little off to the side.
function neighbour(from, nodes, [dx, dy]) {
  const [x, y] = middle(from);
  let best = null, least = Infinity;
  for (const node of nodes) {
    const [a, b] = middle(node);
    const ahead = (a - x) * dx + (b - y) * dy;
    const aside = Math.abs((a - x) * dy) + Math.abs((b - y) * dx);
    const cost = ahead + 4 * aside;
    if (node !== from && ahead > 1 && cost < least) [best, least] = [node, cost];
  }
  return best;
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// Sliders say their name and their value as it is shown; ipywidgets says neither to a screen reader.
function nameSliders(panel) {
  for (const slider of panel.querySelectorAll(".widget-slider, .widget-hslider")) {
    const handle = slider.querySelector("[role='slider']");
    const said = { "aria-label": slider.querySelector(".widget-label"),
                   "aria-valuetext": slider.querySelector(".widget-readout") };
    for (const [name, node] of Object.entries(said))
      if (handle && node && handle.getAttribute(name) !== node.textContent)
        handle.setAttribute(name, node.textContent);
  }
}

function watchSliders(el) {
  const panel = el.closest(".widget-vbox");
  if (!panel) return () => {};
  const observer = new MutationObserver(() => nameSliders(panel));
  observer.observe(panel, { subtree: true, childList: true, characterData: true,
                            attributeFilter: ["aria-valuetext"] });
  nameSliders(panel);
  return () => observer.disconnect();
}

function render({ model, el }) {
  // Each widget has this module anew, so a counter would give two widgets of a page one id.
  const hatch = `dsv3-hatch-${Math.random().toString(36).slice(2)}`;
  const root = document.createElement("div");
  root.className = "dsv3-drawing";
  root.dataset.lmSuppressShortcuts = "true"; // the keys here are not for the notebook
  const svg = shape("svg", { role: "application" });
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true"); // screen readers have the label
  const spoken = document.createElement("div");
  spoken.className = "spoken";
  spoken.setAttribute("aria-live", "polite");
  root.append(svg, tip, spoken);
  el.append(root);

  const marks = () => [...svg.querySelectorAll(".says")];
  // Found again in the next picture: a mark that can be chosen by its key, others by their place.
  const identity = (node) => node.dataset.key || `mark ${marks().indexOf(node)}`;

  function show(node) {
    tip.hidden = !node || !node.dataset.label;
    if (tip.hidden) return;
    tip.textContent = node.dataset.label;
    const box = node.getBoundingClientRect(), page = root.getBoundingClientRect();
    const left = box.left + box.width / 2 - page.left - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(0, Math.min(left, page.width - tip.offsetWidth))}px`;
    const above = box.top - page.top - tip.offsetHeight - 6;
    tip.style.top = `${above < 0 ? box.bottom - page.top + 6 : above}px`;
  }

  function stop(node) { // the one tab stop
    for (const other of marks()) other.setAttribute("tabindex", other === node ? "0" : "-1");
  }

  function draw() {
    const scene = model.get("scene"), focused = svg.contains(document.activeElement);
    const tabbed = svg.querySelector("[tabindex='0']"), place = tabbed && identity(tabbed);
    svg.setAttribute("viewBox", `0 0 ${scene.width} ${scene.height}`);
    svg.setAttribute("aria-label", `${model.get("title")}. ${scene.alt}`);
    svg.style.maxWidth = `${scene.width}px`;
    const pattern = shape("pattern", { id: hatch, width: 6, height: 6,
                                       patternUnits: "userSpaceOnUse",
                                       patternTransform: "rotate(45)" });
    pattern.append(shape("line", { x1: 0, y1: 0, x2: 0, y2: 6 }));
    const nodes = scene.marks.map((mark) => {
      const node = build(mark);
      paint(node, mark, hatch);
      return node;
    });
    svg.replaceChildren(pattern, ...nodes);
    const all = marks();
    const pressed = all.find((node) => node.getAttribute("aria-pressed") === "true");
    const same = focused && all.find((node) => identity(node) === place);
    const again = same || pressed || all[0];
    if (!again) return show(null);
    stop(again);
    if (focused) again.focus({ preventScroll: true });
    else show(null);
  }

  const choose = (node) => node && node.dataset.key && model.send({ chosen: node.dataset.key });
  svg.addEventListener("pointerover", (event) => show(event.target.closest(".says")));
  svg.addEventListener("pointerleave", () => show(null));
  // On the root: Chromium makes an SVG that listens to focus a tab stop of its own.
  root.addEventListener("focusin", (event) => show(event.target.closest(".says")));
  root.addEventListener("focusout", () => show(null));
  svg.addEventListener("click", (event) => {
    const node = event.target.closest(".says");
    if (!node) return;
    stop(node);
    node.focus({ preventScroll: true });
    choose(node);
  });
  svg.addEventListener("keydown", (event) => {
    const node = event.target.closest(".says");
    if (!node || event.ctrlKey || event.metaKey || event.altKey) return;
    const all = marks();
    let next = null;
    if (event.key in ARROWS) next = neighbour(node, all, ARROWS[event.key]) || node;
    else if (event.key === "Home") next = all[0];
    else if (event.key === "End") next = all[all.length - 1];
    else if (event.key === "Escape") show(null);
    else if (event.key === "Enter" || event.key === " ") choose(node);
    else return;
    event.preventDefault();
    event.stopPropagation();
    if (next) {
      stop(next);
      next.focus();
    }
  });
  const change = () => {
    draw();
    spoken.textContent = model.get("scene").alt;
  };
  model.on("change:scene", change);
  draw();
  let unwatch = () => {};
  const later = requestAnimationFrame(() => { unwatch = watchSliders(el); }); // once in the page
  return () => {
    cancelAnimationFrame(later);
    unwatch();
    model.off("change:scene", change);
  };
}

export default { render };
