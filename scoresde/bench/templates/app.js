/* The page: controls, the address, the pointer and the keys. */

function start(data) {
  const find = (id) => document.getElementById(id);
  let state = parseState(location.hash, data);
  let drawn = { lines: [], points: [], height: 1 };
  let lit = null;
  let current = -1;

  function header() {
    find("command").textContent = data.command ?? "";
    find("incomplete").hidden = data.complete !== false;
    const v = data.versions ?? {};
    const parts = [data.date, v.hardware && `${v.device}, ${v.hardware}`, v.threads && (v.threads === 1 ? "1 thread" : `${v.threads} threads`),
                   v.scoresde && `scoresde ${v.scoresde}`, v.commit && `commit ${v.commit}`, v.torch && `torch ${v.torch}`];
    find("summary").textContent = parts.filter(Boolean).join(" · ");
    const list = find("settings");
    const say = (name, value) => {
      if (value === null || value === undefined) return;
      list.append(element("dt", {}, name), element("dd", {}, plain(value)));
    };
    for (const [name, value] of Object.entries(data.settings ?? {})) say(name, value);
    for (const [name, value] of Object.entries(data.sdes ?? {})) say(`process ${name}`, value);
    for (const [name, value] of Object.entries(data.laws ?? {})) say(`reference ${name}`, value);
    for (const [name, value] of Object.entries(data.floors ?? {})) say(`floor ${name}`, value);
    for (const [name, value] of Object.entries(v)) say(name, value);
  }

  function glossary() {
    const say = (name, text) => find("glossary").append(element("dt", {}, name), element("dd", {}, text));
    say("NFE", "evaluations of the score for a sample, the last denoising included; on average where samples take steps of their own");
    say("seconds", "wall-clock time of all samples; the median over the repeats, without the first if there are several; the range when you point at it");
    for (const m of shownMeasures(data)) say(m.name, m.meaning + (m.in_units ? ` (${data.unit})` : ""));
    say("vs best", "the error over that of the best row here which takes no more evaluations, a geometric mean over the repeats; of the endpoint RMS where a row has one, else of sliced W2");
    say("floor", "the 95 % quantile of what as many real items reach against the same reference in one run; below it, a sampler cannot be told from the truth");
    say("±", (data.settings?.repeats ?? 1) > 1
      ? "95 % interval by Student's t over the repeats, which draw new starts and noise against one reference set; the longer side, where it is uneven or cut at zero"
      : "95 % interval over the samples of one run (endpoint, MMD^2); the longer side, where it is uneven. Sliced W2 and the moments have one only with repeats");
  }

  function controls() {
    for (const group of GROUPS) {
      const all = choices(data, group);
      if (all.length < 2) continue;
      const set = element("fieldset", {}, element("legend", {}, TITLES[group]));
      for (const value of all) {
        const box = element("input", { type: "checkbox", "data-group": group });
        box.value = value;
        box.addEventListener("change", () => {
          const boxes = [...find("groups").querySelectorAll("input")].filter((b) => b.dataset.group === group);
          change({ [group]: boxes.filter((b) => b.checked).map((b) => b.value) });
        });
        set.append(element("label", {}, box, ` ${value}`));
      }
      find("groups").append(set);
    }
    for (const m of shownMeasures(data)) find("y").append(element("option", { value: m.key }, m.title));
    for (const id of ["x", "y", "converged"]) find(id).addEventListener("change", () => change({ [id]: find(id).value }));
    for (const id of ["xlog", "ylog"]) find(id).addEventListener("change", () => change({ [id]: find(id).checked }));
    find("reset").addEventListener("click", () => change(defaults(data)));
    find("controls").addEventListener("submit", (event) => event.preventDefault());
  }

  function change(part) {
    state = { ...state, ...part };
    const hash = formatState(state, data);
    try {
      history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    } catch {
      location.hash = hash; // some browsers refuse the former for files
    }
    show();
  }

  function show() {
    for (const box of find("groups").querySelectorAll("input")) box.checked = state[box.dataset.group].includes(box.value);
    for (const id of ["x", "y", "converged"]) find(id).value = state[id];
    for (const id of ["xlog", "ylog"]) find(id).checked = state[id];
    const rows = filterRows(data, state);
    plot(rows);
    drawBest(find("best"), rows, data, state);
    const measure = data.measures.find((m) => m.key === state.y);
    find("best-hint").textContent = `Of the converged rows shown that take no more evaluations, the one with the least error (${measure ? measure.title : "none"}); the next is the best other solver there.`;
    find("rows-hint").textContent = `${rows.length} of ${data.rows.length} rows. Shaded: not above the floor of real items among themselves. Italic: below three times the error of the reference. ± is the longer side of the 95 % interval.`;
    drawRows(find("rows"), rows, data, state, (key) => {
      change({ sort: key, down: state.sort === key && !state.down });
      [...find("rows").querySelectorAll("th")].find((th) => th.dataset.key === key)?.querySelector("button").focus();
    });
  }

  function plot(rows) {
    drawn = drawChart(find("chart"), rows, data, state, lit);
    hide();
    const named = drawn.lines.filter((line, i) => drawn.lines.findIndex((other) => other.name === line.name) === i);
    const missing = [...new Set(rows.filter((row) => row[state.y] === null).map((row) => row.solver))];
    find("missing").textContent = missing.length ? `Without this error, in some rows or all: ${missing.join(", ")}.` : "";
    find("legend").replaceChildren(...named.map((line) => {
      const { colour, dash, shape } = look(line);
      const sign = node("svg", { viewBox: "0 0 34 12", "aria-hidden": "true" });
      sign.append(node("path", { d: "M0 6H34", stroke: colour, "stroke-width": 1.8, "stroke-dasharray": dash, fill: "none" }), marker(shape, 17, 6, colour, false));
      const button = element("button", { type: "button", "aria-pressed": String(lit === line.name) }, sign, line.name);
      button.addEventListener("click", () => {
        lit = lit === line.name ? null : line.name;
        plot(rows);
        [...find("legend").querySelectorAll("button")].find((b) => b.textContent === line.name)?.focus();
      });
      return element("li", {}, button);
    }));
  }

  function tell(index) {
    const point = drawn.points[index];
    if (!point) return hide();
    current = index;
    const { row } = point;
    const span = row.intervals[state.y];
    const box = find("chart").getBoundingClientRect();
    const tip = find("tip");
    tip.textContent = [
      point.line.name,
      `${row.steps === null ? "own steps" : `${row.steps} steps`}, NFE ${short(row.nfe)}, ${short(row.seconds)} s`,
      `${data.measures.find((m) => m.key === state.y).name} ${short(row[state.y])}` + (span ? `, 95 %: ${short(span[0])} to ${short(span[1])}` : ""),
      noteOf(row),
    ].filter(Boolean).join("\n");
    tip.hidden = false;
    const place = { x: (point.x / SIZE.width) * box.width, y: (point.y / drawn.height) * box.height };
    tip.style.left = `${Math.min(place.x + 12, Math.max(0, box.width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${place.y > box.height / 2 ? place.y - tip.offsetHeight - 10 : place.y + 12}px`;
  }

  function hide() {
    current = -1;
    find("tip").hidden = true;
  }

  function pointer(event) {
    const box = find("chart").getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * SIZE.width;
    const y = ((event.clientY - box.top) / box.height) * drawn.height;
    let [nearest, distance] = [-1, 30];
    drawn.points.forEach((point, i) => {
      const d = Math.hypot(point.x - x, point.y - y);
      if (d < distance) [nearest, distance] = [i, d];
    });
    tell(nearest);
  }

  function keys(event) {
    const count = drawn.points.length;
    if (!count) return;
    const line = current >= 0 ? drawn.lines.indexOf(drawn.points[current].line) : -1;
    const first = (i) => drawn.points.findIndex((p) => p.line === drawn.lines[(i + drawn.lines.length) % drawn.lines.length]);
    const moves = { ArrowRight: () => (current + 1) % count, ArrowLeft: () => (current <= 0 ? count : current) - 1,
                    ArrowDown: () => first(line + 1), ArrowUp: () => first(line < 0 ? -1 : line - 1), Home: () => 0, End: () => count - 1 };
    if (event.key === "Escape") hide();
    else if (event.key in moves) {
      event.preventDefault();
      tell(moves[event.key]());
    }
  }

  header();
  glossary();
  controls();
  find("chart").addEventListener("pointermove", pointer);
  find("chart").addEventListener("pointerleave", hide);
  find("chart").addEventListener("blur", hide);
  find("chart").addEventListener("keydown", keys);
  addEventListener("hashchange", () => {
    state = parseState(location.hash, data);
    show();
  });
  show();
}

if (typeof document !== "undefined") start(JSON.parse(document.getElementById("data").textContent));
