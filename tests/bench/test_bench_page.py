"""The page holds the data, trusts none of their names, and filters them as the address says."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files

import pytest

import scoresde.bench
from scoresde.bench import Row
from scoresde.bench.files import dumps, record, write_csv
from scoresde.bench.page import SCRIPTS, page

TEMPLATES = files(scoresde.bench) / "templates"
EVIL = "</script><img src=x onerror=alert(1)><!-- {{data}} & \u2028"
node = shutil.which("node")


def row(solver, nfe, error, **more):
    return Row(
        solver, nfe - 1, **{"grid": "karras", "sde": "vp", "law": "a", "repeats": 1, **more},
        nfe=nfe, nfe_max=nfe, seconds=nfe / 100, endpoint_rms=error, sliced_w2=2 * error,
        converged=more.get("message", "") == "",
        intervals={"endpoint_rms": (error / 2, error * 2)},
    )  # fmt: skip


ROWS = [
    row("heun", 5, 0.5), row("heun", 9, 0.01), row("ddim", 5, 0.1), row("ddim", 9, 0.05),
    row("ddim", 9, 0.07, sde="ve"), row("heun", 9, 0.2, grid="logsnr", message="broke"),
    Row("bad", 3, grid="karras", sde="vp", law="a", message="failed"),
    Row("own", nfe=12.5, nfe_max=20, seconds=1.0, sde="vp", law="a", endpoint_rms=1e-3,
        sliced_w2=float("inf"), converged=True, reference_error=1e-3),
]  # fmt: skip
CONTENT = {
    "title": f"bench {EVIL}", "unit": "data units", "complete": True,
    "command": f"scoresde {EVIL}",
    "settings": {"seed": 0}, "versions": {"threads": 1},
}  # fmt: skip
FLOORS = {"a": {"sliced_w2": 0.3, "mmd2": 0.1}}
RECORD = record(ROWS, FLOORS, CONTENT)


class Reader(HTMLParser):
    """Elements with their attributes, and the texts of scripts."""

    def __init__(self):
        super().__init__()
        self.elements, self.scripts, self.texts, self.inside = [], [], {}, None

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), []))

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1][1].append(data)
        else:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data


def read(text):
    reader = Reader()
    reader.feed(text)
    return reader


def embedded(reader):
    (found,) = ["".join(parts) for attrs, parts in reader.scripts if attrs.get("id") == "data"]
    return json.loads(found)


def test_the_data_come_back_as_they_went_in():
    assert embedded(read(page(RECORD))) == json.loads(dumps(RECORD))
    assert json.loads(dumps(RECORD))["rows"][-1]["sliced_w2"] is None  # not Infinity


def test_no_name_can_break_out():
    evil = [row(EVIL, 5, 0.1, law=EVIL, grid=EVIL, sde=EVIL), *ROWS]
    reader = read(page(record(evil, {EVIL: {"sliced_w2": 1.0}}, CONTENT)))
    assert len(reader.scripts) == 2
    assert "img" not in [tag for tag, _ in reader.elements]
    assert embedded(reader)["rows"][0]["solver"] == EVIL
    assert reader.texts["title"] == CONTENT["title"]
    assert reader.texts["h1"] == CONTENT["title"]


def test_the_page_needs_nothing_else():
    text = page(RECORD)
    reader = read(text)
    assert {tag for tag, _ in reader.elements} & {"link", "img", "iframe", "object"} == set()
    assert all("src" not in attrs and "href" not in attrs for _, attrs in reader.elements)
    policy = next(a["content"] for t, a in reader.elements if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    outside = re.findall(r"https?://[^\s\"']+", text)
    assert set(outside) <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    scripts = "".join((TEMPLATES / name).read_text() for name in SCRIPTS)
    for way in ("innerHTML", "outerHTML", "document.write", "insertAdjacent", "fetch(", "eval("):
        assert way not in scripts


def test_every_control_has_a_name_and_every_id_is_there():
    reader = read(page(RECORD))
    ids = [attrs["id"] for _, attrs in reader.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    scripts = "".join((TEMPLATES / name).read_text() for name in SCRIPTS)
    assert set(re.findall(r'find\("(\w+)"\)', scripts)) <= set(ids)
    text = page(RECORD)
    for control in re.findall(r"<(?:select|input)[^>]*>", text):
        assert f"<label>{control}" in text or re.search(
            rf"<label>[\w ]*{re.escape(control)}", text
        )


def test_templates_are_part_of_the_package():
    from pathlib import Path

    setup = Path(scoresde.bench.__file__).parents[2] / "setup.cfg"
    assert "bench/templates/*" in setup.read_text()


def test_csv_has_a_line_a_row_with_intervals_and_floors(tmp_path):
    write_csv(tmp_path / "b.csv", ROWS, FLOORS)
    with open(tmp_path / "b.csv", newline="") as handle:
        first, *_, failed, own = csv.DictReader(handle)
    assert (first["endpoint_rms_low"], first["sliced_w2_floor"]) == ("0.25", "0.3")
    assert first["sliced_w2_low"] == failed["nfe"] == own["steps"] == ""


@pytest.mark.skipif(node is None, reason="needs node")
def test_filters_lines_and_best_rows(tmp_path):
    """The script's own functions, run on the data of the page."""
    (tmp_path / "data.json").write_text(dumps(RECORD))
    (tmp_path / "run.js").write_text(f"""
const m = require({str(TEMPLATES / "model.js")!r});
const data = JSON.parse(require("fs").readFileSync({str(tmp_path / "data.json")!r}));
const all = m.parseState("", data);
const some = m.parseState("#solver=heun&solver=own&sde=vp&y=sliced_w2&converged=yes&xlog=0", data);
const names = (rows) => rows.map((r) => [r.solver, r.nfe]);
const out = {{
  all: m.filterRows(data, all).length,
  some: names(m.filterRows(data, some)),
  y: [all.y, some.y], xlog: [all.xlog, some.xlog],
  back: m.parseState("#" + m.formatState(some, data), data), state: some,
  empty: m.formatState(all, data),
  nonsense: m.formatState(m.parseState("#solver=none&y=nothing&x=9&sort=no", data), data),
  lines: m.seriesOf(m.filterRows(data, all), data, all)
    .map((l) => [l.name, l.problem, l.rows.map((r) => r.nfe)]),
  best: m.bestAtEach(m.filterRows(data, all), "endpoint_rms")
    .map((b) => [b.row.sde, b.cost, b.row.solver, b.other && b.other.solver, b.ratio]),
  sorted: names(m.sortRows(data.rows, "endpoint_rms", true)),
  columns: m.columns(data).map((c) => c.key),
  counts: m.choices(data, "count"),
  four: names(m.filterRows(data, m.parseState("#count=8&solver=ddim", data))),
  none: m.formatState({{ ...all, solver: [] }}, data),
  still: m.parseState("#solver=", data).solver,
  plain: m.plain([{{ name: "ddim", eta: 0.5 }}, {{ name: "heun" }}]),
  exact: m.plain({{ seed: 12345678, scale: 1.9123456789, tolerance: 1e-9 }}),
  ticks: [1e-4, 5.3e-5, 0.01, 50].map(m.tickOf),
  spread: m.spread(1, [0, 3]),
  short: [0.000123456, 12.3456, 4, null, 1234567.8, -0.5].map(m.short),
}};
console.log(JSON.stringify(out));
""")
    done = subprocess.run([node, str(tmp_path / "run.js")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["counts"] == ["3", "4", "8", "own steps"]
    assert out["four"] == [["ddim", 9], ["ddim", 9]]
    assert (out["none"], out["still"]) == ("solver=", [])
    assert out["plain"] == "ddim(eta=0.5), heun"
    assert out["exact"] == "seed=12345678, scale=1.91235, tolerance=1e-9"
    assert out["ticks"] == ["1e-4", "5.3e-5", "0.01", "50"]
    assert out["spread"] == 2
    assert out["all"] == len(ROWS)
    assert out["some"] == [["heun", 5], ["heun", 9], ["own", 12.5]]
    assert out["y"] == ["endpoint_rms", "sliced_w2"]
    assert out["xlog"] == [True, False]
    assert out["back"] == out["state"]
    assert out["empty"] == out["nonsense"] == ""
    assert ["heun, karras", "vp, a", [5, 9]] in out["lines"]
    assert ["own, own steps", "vp, a", [12.5]] in out["lines"]
    assert all("bad" not in line[0] for line in out["lines"])
    assert out["best"] == [
        ["vp", 5, "ddim", "heun", 5], ["vp", 9, "heun", "ddim", 5],
        ["vp", 12.5, "own", "heun", 10], ["ve", 9, "ddim", None, None],
    ]  # fmt: skip
    assert out["sorted"][0] == ["heun", 5]
    assert out["sorted"][-1] == ["bad", None]  # what is missing comes last
    assert out["columns"][:4] == ["solver", "grid", "sde", "steps"]
    assert "mmd2" not in out["columns"]
    assert out["short"] == ["1.23e-4", "12.3", "4", "–", "1.23e6", "-0.5"]


@pytest.mark.skipif(node is None, reason="needs node")
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(name):
    done = subprocess.run([node, "--check", str(TEMPLATES / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
