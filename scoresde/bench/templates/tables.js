/* The tables: the best at each cost, and all rows. */

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children); // strings become text, never markup
  return made;
}

/** A value with half of its interval. */
function cell(row, key, data) {
  const value = row[key];
  const made = element("td", {}, short(value));
  const span = row.intervals[key];
  if (span && value !== null) {
    made.append(element("span", { class: "span" }, ` ± ${tickOf(Number(spread(value, span).toPrecision(2)))}`));
    made.title = `95 % interval ${short(span[0])} to ${short(span[1])}`;
  }
  const floor = (data.floors[row.law] ?? {})[key];
  if (value !== null && floor !== undefined && value <= floor) {
    made.classList.add("good");
    made.title = [made.title, `not above the floor ${short(floor)}`].filter(Boolean).join("; ");
  }
  const measure = data.measures.find((m) => m.key === key);
  if (measure && measure.of_path && value !== null && row.reference_error !== null && value < 3 * row.reference_error) {
    made.classList.add("doubtful");
    made.title = `below three times the error of the reference, ${short(row.reference_error)}`;
  }
  return made;
}

const stepsOf = (row) => (row.grid === null ? "own" : row.steps === null ? "–" : String(row.steps));

function noteOf(row) {
  if (row.nfe === null) return `failed: ${row.message}`;
  return row.converged ? row.message : `not converged: ${row.message}`;
}

function seconds(row) {
  const made = element("td", {}, short(row.seconds));
  if (row.seconds_low !== row.seconds_high) made.title = `${short(row.seconds_low)} to ${short(row.seconds_high)}`;
  return made;
}

/** A line for each law shown: the floor of each measure. */
function floorLines(rows, data, shown) {
  const several = choices(data, "law").length > 1;
  return [...new Set(rows.map((row) => row.law))].filter((law) => data.floors[law]).map((law) =>
    element("tr", { class: "floor" }, ...shown.map(({ key, text }) => {
      const words = { solver: "floor", law: several ? law : "", message: "real items among themselves, 95 %" };
      return element("td", { class: text ? "text" : "" }, text ? words[key] ?? "" : key in data.floors[law] ? short(data.floors[law][key]) : "");
    })));
}

function drawRows(table, rows, data, state, onSort) {
  const shown = columns(data);
  const head = element("tr");
  for (const column of shown) {
    const sorted = state.sort === column.key;
    const button = element("button", { type: "button" }, column.name + (sorted ? (state.down ? " ▼" : " ▲") : ""));
    button.addEventListener("click", () => onSort(column.key));
    const aria = sorted ? { "aria-sort": state.down ? "descending" : "ascending" } : {};
    head.append(element("th", { scope: "col", class: column.text ? "text" : "", "data-key": column.key, ...aria }, button));
  }
  const body = element("tbody");
  for (const row of sortRows(rows, state.sort, state.down)) {
    const line = element("tr", { class: row.nfe === null ? "failed" : "" });
    for (const { key, text } of shown) {
      if (key === "message") line.append(element("td", { class: "text message" }, noteOf(row)));
      else if (text) line.append(element("td", { class: "text" }, valueOf(row, key)));
      else if (key === "steps") line.append(element("td", {}, stepsOf(row)));
      else if (key === "seconds") line.append(seconds(row));
      else line.append(cell(row, key, data));
    }
    body.append(line);
  }
  table.replaceChildren(element("thead", {}, head), body, element("tfoot", {}, ...floorLines(rows, data, shown)));
}

function drawBest(table, rows, data, state) {
  const cases = choices(data, "sde").length > 1 || choices(data, "law").length > 1;
  const measure = data.measures.find((m) => m.key === state.y);
  const budgets = rows.some((row) => row.budget !== null);
  const heads = [...(cases ? ["Process", "Data or law"] : []), ...(budgets ? ["NFE at most"] : []), "Best", "Grid", "Steps", "NFE", measure ? measure.name : "", "Seconds", "Next solver", "Its error, times"];
  const texts = new Set(["Process", "Data or law", "Best", "Grid", "Next solver"]);
  const head = element("tr", {}, ...heads.map((name) => element("th", { scope: "col", class: texts.has(name) ? "text" : "" }, name)));
  const body = element("tbody");
  for (const { cost, row, other, ratio } of bestAtEach(rows, state.y)) {
    const text = (value) => element("td", { class: "text" }, value);
    body.append(element("tr", {},
      ...(cases ? [text(row.sde), text(row.law)] : []),
      ...(budgets ? [element("td", {}, short(cost))] : []), text(row.solver), text(valueOf(row, "grid")),
      element("td", {}, stepsOf(row)), element("td", {}, short(row.nfe)),
      cell(row, state.y, data), element("td", {}, short(row.seconds)),
      text(other ? other.solver : "–"), element("td", {}, short(ratio))));
  }
  table.replaceChildren(element("thead", {}, head), body);
}
