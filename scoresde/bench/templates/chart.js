/* The plot: one SVG, a panel for each problem, drawn anew for each state. */

const SVG = "http://www.w3.org/2000/svg";
const SIZE = { width: 1180, one: 520, several: 350, left: 72, right: 24, top: 16, title: 24, bottom: 52 };
const COLOURS = 8;
const DASHES = ["", "7 4", "2 4", "9 3 2 3", "14 4", "4 2"];
const SHAPES = ["circle", "square", "diamond", "up", "down", "cross"];

function node(name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

/** A scale from values to places, with its ticks. */
function scale(low, high, log, from, to) {
  if (log) {
    if (low === high) [low, high] = [low / 2, high * 2];
    const [a, b] = [Math.log10(low), Math.log10(high)];
    const steps = b - a > 2.3 ? [1] : b - a > 0.9 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
    const stride = Math.max(1, Math.ceil((b - a) / 9));
    const ticks = [];
    for (let d = Math.floor(a); d <= b; d += 1) {
      if (d % stride) continue;
      for (const s of steps) if (s * 10 ** d >= low * 0.999 && s * 10 ** d <= high * 1.001) ticks.push(s * 10 ** d);
    }
    return { ticks, at: (v) => from + ((Math.log10(v) - a) / (b - a)) * (to - from) };
  }
  if (low === high) [low, high] = [low - 1, high + 1];
  const raw = (high - low) / 6;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((s) => s * unit).find((s) => s >= raw);
  const ticks = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) ticks.push(Number(v.toPrecision(12)));
  return { ticks, at: (v) => from + ((v - low) / (high - low)) * (to - from) };
}

/** Horizontal lines of a panel: the floor of its law, and the error of the reference. */
function levels(rows, data, state) {
  const measure = data.measures.find((m) => m.key === state.y);
  const found = [];
  for (const law of new Set(rows.map((row) => row.law))) {
    const value = (data.floors[law] ?? {})[state.y] ?? null;
    if (value !== null) found.push({ value, text: "floor: real items among themselves, 95 %", kind: "floor" });
  }
  const errors = rows.map((row) => row.reference_error).filter((e) => e !== null);
  if (measure && measure.of_path && errors.length) {
    found.push({ value: Math.max(...errors), text: "error of the reference solution", kind: "reference" });
  }
  return found;
}

/** The ends of the vertical axis: all values, and bars and lines where they are near. */
function range(lines, marks, state) {
  const values = lines.flatMap((line) => line.rows.map((row) => row[state.y]));
  const ends = lines.flatMap((line) => line.rows.flatMap((row) => row.intervals[state.y] ?? []));
  const floors = marks.filter((m) => m.kind === "floor").map((m) => m.value);
  if (!state.ylog) {
    const all = [...values, ...ends, ...floors];
    return [Math.min(0, ...all), Math.max(...all) * 1.05];
  }
  const positive = values.filter((v) => v > 0);
  const high = Math.max(...positive, ...floors, ...ends.filter((v) => v > 0));
  // Far below its floor a value is noise, and would only squeeze the rest.
  const least = floors.length ? Math.min(...floors) / 6 : 0;
  const low = Math.min(...positive.map((v) => Math.max(v, least)), ...floors);
  return Number.isFinite(low) && Number.isFinite(high) ? [low * 0.7, high * 1.3] : [0.1, 1];
}

function marker(shape, x, y, colour, hollow) {
  const r = 4.6;
  const look = { fill: hollow ? "var(--paper)" : colour, stroke: colour, "stroke-width": 1.6 };
  const paths = {
    square: `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    diamond: `M${x} ${y - r - 1.5}L${x + r + 1.5} ${y}L${x} ${y + r + 1.5}L${x - r - 1.5} ${y}z`,
    up: `M${x} ${y - r - 1}L${x + r + 1} ${y + r}H${x - r - 1}z`,
    down: `M${x} ${y + r + 1}L${x + r + 1} ${y - r}H${x - r - 1}z`,
    cross: `M${x - r} ${y - r}L${x + r} ${y + r}M${x - r} ${y + r}L${x + r} ${y - r}`,
  };
  return shape in paths ? node("path", { d: paths[shape], ...look, style: `fill:${look.fill}` })
                        : node("circle", { cx: x, cy: y, r, ...look });
}

const look = (line) => ({
  colour: `var(--c${line.colour % COLOURS})`,
  dash: DASHES[line.dash % DASHES.length],
  shape: SHAPES[(line.colour + Math.floor(line.colour / COLOURS)) % SHAPES.length],
});

/** The place of each panel: one alone is wide, several stand in two columns. */
function frames(cases) {
  const one = cases.length === 1;
  const width = one ? SIZE.width : SIZE.width / 2;
  const height = one ? SIZE.one : SIZE.several;
  return cases.map((name, i) => {
    const [x, y] = one ? [0, 0] : [(i % 2) * width, Math.floor(i / 2) * height];
    return { name: one ? "" : name, edge: x, left: x + SIZE.left, right: x + width - SIZE.right,
             top: y + SIZE.top + (one ? 0 : SIZE.title), bottom: y + height - SIZE.bottom, end: y + height };
  });
}

function drawAxes(svg, frame, x, y, titles) {
  const { left, right, top, bottom } = frame;
  for (const tick of y.ticks) {
    const place = y.at(tick);
    svg.append(node("line", { class: "grid", x1: left, x2: right, y1: place, y2: place }));
    svg.append(node("text", { x: left - 8, y: place + 4, "text-anchor": "end" }, tickOf(tick)));
  }
  for (const tick of x.ticks) {
    const place = x.at(tick);
    svg.append(node("line", { class: "grid", x1: place, x2: place, y1: top, y2: bottom }));
    svg.append(node("text", { x: place, y: bottom + 18, "text-anchor": "middle" }, tickOf(tick)));
  }
  svg.append(node("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  svg.append(node("text", { class: "title", x: (left + right) / 2, y: frame.end - 10, "text-anchor": "middle" }, titles.x));
  const [side, middle] = [frame.edge + 16, (top + bottom) / 2];
  svg.append(node("text", { class: "title", x: side, y: middle, "text-anchor": "middle", transform: `rotate(-90 ${side} ${middle})` }, titles.y));
  svg.append(node("text", { class: "title case", x: left, y: top - 10 }, frame.name));
}

function drawPanel(svg, frame, lines, data, state, lit) {
  const marks = levels(lines.flatMap((line) => line.rows), data, state);
  const [low, high] = range(lines, marks, state);
  const costs = lines.flatMap((line) => line.rows.map((row) => row[state.x]));
  const [few, many] = state.xlog ? [Math.min(...costs) / 1.08, Math.max(...costs) * 1.08] : [0, Math.max(...costs) * 1.02];
  const x = scale(few, many, state.xlog, frame.left, frame.right);
  const y = scale(low, high, state.ylog, frame.bottom, frame.top);
  const at = (value) => y.at(Math.min(Math.max(value, low), high)); // what is below lies on the bottom
  const measure = data.measures.find((m) => m.key === state.y);
  const unit = measure.in_units ? ` (${data.unit})` : "";
  const names = { nfe: "evaluations of the score for a sample (NFE)", seconds: "seconds for all samples", steps: "steps" };
  drawAxes(svg, frame, x, y, { x: names[state.x], y: frame.name ? measure.name + unit : measure.title + unit });
  for (const mark of marks) {
    if (mark.value < low || mark.value > high) continue;
    const place = at(mark.value);
    svg.append(node("line", { class: `level ${mark.kind}`, x1: frame.left, x2: frame.right, y1: place, y2: place }));
    svg.append(node("text", { x: frame.left + 6, y: place - 5 }, `${mark.text}: ${short(mark.value)}`));
  }
  const points = [];
  for (const line of lines) {
    const { colour, dash, shape } = look(line);
    const group = node("g", { class: lit && lit !== line.name ? "series faded" : "series" });
    const path = line.rows.map((row) => `${x.at(row[state.x]).toFixed(1)} ${at(row[state.y]).toFixed(1)}`);
    group.append(node("path", { d: `M${path.join("L")}`, stroke: colour, "stroke-width": 1.8, "stroke-dasharray": dash }));
    for (const row of line.rows) {
      const place = { x: x.at(row[state.x]), y: at(row[state.y]), row, line };
      const span = row.intervals[state.y];
      if (span) group.append(node("line", { x1: place.x, x2: place.x, y1: at(span[0]), y2: at(span[1]), stroke: colour, "stroke-width": 1.4 }));
      group.append(marker(shape, place.x, place.y, colour, !row.converged));
      points.push(place);
    }
    svg.append(group);
  }
  return points;
}

/** Draws all panels; returns the lines, the points with their places, and the height. */
function drawChart(svg, rows, data, state, lit) {
  svg.replaceChildren();
  const lines = seriesOf(rows, data, state);
  const cases = [...new Set(lines.map((line) => line.problem))];
  const places = frames(cases.length ? cases : [""]);
  const height = places[places.length - 1].end;
  svg.setAttribute("viewBox", `0 0 ${SIZE.width} ${height}`);
  if (!lines.length) {
    svg.append(node("text", { x: SIZE.width / 2, y: height / 2, "text-anchor": "middle" }, "No row has this error and cost under these filters."));
  }
  const points = cases.flatMap((name, i) => drawPanel(svg, places[i], lines.filter((line) => line.problem === name), data, state, lit));
  return { lines, points, height };
}
