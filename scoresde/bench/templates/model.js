"use strict";
/* What is shown, apart from how: state in the address, filters, lines, the best rows. */

const GROUPS = ["solver", "grid", "sde", "law", "count"];
const TITLES = { solver: "Solver", grid: "Grid", sde: "Process", law: "Data or law", count: "Steps, or budget of evaluations" };
const OWN = "own steps"; // the grid of a solver that chooses its steps

/** A field of a row; its "count" is what was asked for, a budget or else a number of steps. */
function valueOf(row, key) {
  if (key === "grid") return row.grid ?? OWN;
  if (key === "count") return String(row.budget ?? row.steps ?? OWN);
  return row[key];
}

/** The values of a group, in the order of the rows; counts in their own. */
function choices(data, group) {
  const found = [...new Set(data.rows.map((row) => valueOf(row, group)))];
  const size = (text) => (text === OWN ? Infinity : Number(text));
  return group === "count" ? found.sort((a, b) => size(a) - size(b) || 0) : found;
}

/** The measures that some row has, the first of them the one to start with. */
function shownMeasures(data) {
  return data.measures.filter((m) => data.rows.some((row) => row[m.key] !== null));
}

function defaults(data) {
  const first = shownMeasures(data)[0];
  const state = { x: "nfe", y: first ? first.key : "sliced_w2", xlog: true, ylog: true,
                  converged: "", sort: "", down: false };
  for (const group of GROUPS) state[group] = choices(data, group);
  return state;
}

/** The state that an address such as "#solver=heun&y=sliced_w2" asks for; the rest by default. */
function parseState(hash, data) {
  const asked = new URLSearchParams(hash.replace(/^#/, ""));
  const state = defaults(data);
  for (const group of GROUPS) {
    const wanted = asked.getAll(group);
    const known = state[group].filter((value) => wanted.includes(value));
    if (known.length || wanted.includes("")) state[group] = known; // "solver=" is none
  }
  const one = (key, accepted) => {
    if (accepted.includes(asked.get(key))) state[key] = asked.get(key);
  };
  one("x", ["nfe", "seconds", "steps"]);
  one("y", shownMeasures(data).map((m) => m.key));
  one("converged", ["yes", "no"]);
  one("sort", columns(data).map((c) => c.key));
  for (const key of ["xlog", "ylog"]) if (asked.has(key)) state[key] = asked.get(key) !== "0";
  state.down = asked.get("down") === "1";
  return state;
}

/** The address of a state: only what differs from the default, so that it stays short. */
function formatState(state, data) {
  const usual = defaults(data);
  const asked = new URLSearchParams();
  for (const group of GROUPS) {
    if (state[group].length !== usual[group].length) {
      for (const value of state[group].length ? state[group] : [""]) asked.append(group, value);
    }
  }
  for (const key of ["x", "y", "converged", "sort"]) {
    if (state[key] !== usual[key]) asked.set(key, state[key]);
  }
  for (const key of ["xlog", "ylog"]) if (!state[key]) asked.set(key, "0");
  if (state.down) asked.set("down", "1");
  return asked.toString();
}

function filterRows(data, state) {
  return data.rows.filter(
    (row) =>
      GROUPS.every((group) => state[group].includes(valueOf(row, group))) &&
      (state.converged === "" || row.converged === (state.converged === "yes"))
  );
}

/** Lines: rows of one solver and grid in one problem; their name is that of solver and grid. */
function seriesOf(rows, data, state) {
  const several = choices(data, "grid").length > 1;
  const [solvers, grids, found] = [choices(data, "solver"), choices(data, "grid"), new Map()];
  for (const row of rows) {
    if (row[state.y] === null || row[state.x] === null) continue;
    const grid = valueOf(row, "grid");
    const key = JSON.stringify([row.solver, grid, row.sde, row.law]);
    if (!found.has(key)) {
      found.set(key, { name: several ? `${row.solver}, ${grid}` : row.solver, problem: `${row.sde}, ${row.law}`,
                       colour: solvers.indexOf(row.solver), dash: grids.indexOf(grid), rows: [] });
    }
    found.get(key).rows.push(row);
  }
  const lines = [...found.values()];
  for (const line of lines) line.rows.sort((a, b) => a[state.x] - b[state.x]);
  return lines;
}

/** For each problem and each cost at which the best changes (or each budget), the best row. */
function bestAtEach(rows, y) {
  const found = [];
  const usable = rows.filter((row) => row.converged && row[y] !== null && row.nfe !== null);
  const cases = new Map();
  for (const row of usable) {
    const key = JSON.stringify([row.sde, row.law]);
    cases.set(key, [...(cases.get(key) ?? []), row]);
  }
  for (const own of cases.values()) {
    const budgets = [...new Set(own.map((row) => row.budget).filter((b) => b !== null))];
    const costs = budgets.length ? budgets : [...new Set(own.map((row) => row.nfe))];
    let last = null;
    for (const cost of costs.sort((a, b) => a - b)) {
      const ranked = own.filter((row) => row.nfe <= cost).sort((a, b) => a[y] - b[y]);
      if (!ranked.length || (!budgets.length && ranked[0] === last)) continue;
      last = ranked[0];
      const other = ranked.find((row) => row.solver !== last.solver) ?? null;
      found.push({ cost, row: last, other, ratio: other && last[y] > 0 ? other[y] / last[y] : null });
    }
  }
  return found;
}

/** The columns of the table of rows. */
function columns(data) {
  const texts = ["solver", ...GROUPS.slice(1, 4).filter((g) => choices(data, g).length > 1 || g === "grid")];
  const has = (key) => data.rows.some((row) => row[key] !== null && row[key] !== undefined);
  const uneven = data.rows.some((row) => row.nfe_max !== null && row.nfe_max !== row.nfe);
  const numbers = [["budget", "budget"], ["steps", "steps"], ["nfe", "NFE"], ["nfe_max", "NFE, worst"],
                   ["seconds", "seconds"], ...shownMeasures(data).map((m) => [m.key, m.name]),
                   ["vs_best", "vs best"]].filter(([key]) => has(key) && (key !== "nfe_max" || uneven));
  return [
    ...texts.map((key) => ({ key, name: TITLES[key], text: true })),
    ...numbers.map(([key, name]) => ({ key, name, text: false })),
    { key: "message", name: "Notes", text: true },
  ];
}

/** Rows in the order of a column, what is missing last either way. */
function sortRows(rows, key, down) {
  if (!key) return rows;
  const sign = down ? -1 : 1;
  return [...rows].sort((a, b) => {
    const [u, v] = [valueOf(a, key), valueOf(b, key)];
    if (u === null || v === null) return (u === null) - (v === null);
    return sign * (typeof u === "string" ? u.localeCompare(v) : u - v);
  });
}

/** A tick or a half width: its digits without the zeros that fill up. */
const tickOf = (value) => short(value).replace(/\.?0+e/, "e");

/** A section, a list or a number of the settings as a person writes it: "ddim(eta=0.5), heun". */
function plain(value) {
  if (Array.isArray(value)) return value.map(plain).join(", ");
  if (typeof value === "number") return String(Number.isInteger(value) ? value : Number(value.toPrecision(6)));
  if (value === null || typeof value !== "object") return String(value);
  const { name, ...fields } = value;
  const text = Object.entries(fields).map(([key, field]) => `${key}=${plain(field)}`).join(", ");
  return name === undefined ? text : text ? `${name}(${text})` : name;
}

/** The half width in "value ± half" that covers an interval, be it uneven or cut at zero. */
const spread = (value, [low, high]) => Math.max(high - value, value - low);

/** Three digits, as short as they can be read. */
function short(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}

if (typeof module !== "undefined") {
  module.exports = { bestAtEach, choices, columns, defaults, filterRows, formatState, parseState, plain,
                     seriesOf, short, sortRows, spread, tickOf };
}
