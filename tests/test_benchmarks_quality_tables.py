"""The figures of `python benchmarks quality`, on records made up here, computed by hand. Protects:

- rates chosen on validation data, by the mean over the seeds; grids that were interrupted; the best of the tuned;
- the same for runs that are stopped early, of which older records say nothing;
- gaps paired by seed, their worst and mean; performance profiles; what the interval does; multiples of Adam's costs;
- diverged runs, missing rivals, tasks of one seed; the tables and plots that say all that.
"""

from __future__ import annotations

import math

import benchmarks_package
import pytest

benchmarks_package.load()

from benchmarks.experiments.quality import summary as figures  # noqa: E402
from benchmarks.experiments.quality import tables  # noqa: E402
from benchmarks.experiments.quality.summary import Row, Standing  # noqa: E402

MACHINE = {"gpu": None, "cpu": "a processor", "threads": 1, "torch": "2", "python": "3"}


def fake(task, method, lr, seed, valid, test, *, interval=None, step_ms=1.0, size=100, steps=10):
    case = {"task": task, "method": method, "lr": lr, "seed": seed, "interval": interval}
    return {
        "case": {**case, "steps": steps},
        "curve": [1.0],
        "valid_loss": valid,
        "test_loss": test,
        "diverged": test is None,
        "step_ms": step_ms,
        "bytes": size,
        "machine": {**MACHINE, "sources": "s", "commit": "c"},
    }


def some_records():
    return [
        # The better rate on validation data is the worse one on test data.
        *(fake("digits", "sgd", 0.1, seed, 0.5, 0.75 + seed / 4) for seed in (0, 1)),
        *(fake("digits", "sgd", 1.0, seed, 0.625, 0.125) for seed in (0, 1)),
        *(fake("digits", "sgd", 3.0, seed, None, None) for seed in (0, 1)),
        *(fake("digits", "adamw", 0.01, seed, 0.5625, 0.5) for seed in (0, 1)),
        *(fake("digits", "adam", None, seed, 1.0, 1.0, step_ms=2.0, size=80) for seed in (0, 1)),
        fake("digits", "alrao-adam-run", None, 0, 1.0, 0.875, step_ms=8.0, size=160),
        fake("digits", "alrao-adam-run", None, 1, 1.0, 0.875, step_ms=4.0, size=160),
        fake("digits", "alrao-adam-run", None, 0, 1.0, 1.75, interval=[1e-4, 1.0]),
        fake("text", "sgd", 0.1, 0, 4.0, 4.0),
        fake("text", "adamw", 0.01, 0, 2.0, 2.0),
        fake("text", "adam", None, 0, 4.0, 4.0, step_ms=10.0, size=800),
        fake("text", "alrao-adam-run", None, 0, 1.0, 1.5, step_ms=5.0, size=400),
        fake("text", "alrao-adam-run", None, 0, 1.0, 1.5, interval=[1e-4, 1.0]),
        fake("text", "alrao-adam-run", None, 0, None, None, interval=[1e-6, 1e3]),
        fake("text", "alrao", None, 0, None, None),
        {"case": {"method": "dog"}, "missing": "no dog"},
    ]


@pytest.fixture(scope="module")
def summary():
    return figures.summarise(some_records())


def test_a_rate_is_chosen_on_validation_data(summary):
    sgd, adamw = (summary["digits"][Row(name)] for name in ("sgd", "adamw"))
    assert sgd.lr == 0.1 and sgd.at_edge and sgd.losses == {0: 0.75, 1: 1.0} and sgd.loss == 0.875
    assert adamw.lr == 0.01 and not adamw.at_edge and adamw.valid == 0.5625
    assert figures.reference(summary["digits"]) is sgd
    assert figures.reference(summary["text"]) is summary["text"][Row("adamw")]


def test_an_interrupted_grid():
    records = [fake("digits", "sgd", 0.1, seed, 0.5, 0.5) for seed in (0, 1)]
    records += [fake("digits", "sgd", 0.3, 0, 0.25, 0.25)]
    cell = figures.summarise(records)["digits"][Row("sgd")]
    # The second seed may not be as easy.
    assert cell.lr == 0.1 and cell.losses == {0: 0.5, 1: 0.5}


def test_the_last_record_and_the_longest_runs_count():
    records = [fake("digits", "alrao", None, 0, 1.0, loss) for loss in (0.5, 0.25)]
    records += [fake("digits", "adam", None, 0, 1.0, 0.125, steps=5)]
    cells = figures.summarise(records)["digits"]
    assert cells.keys() == {Row("alrao")} and cells[Row("alrao")].loss == 0.25


def test_gaps_are_paired_by_seed(summary):
    found = figures.gaps(summary)
    assert found[Row("alrao-adam-run")] == {"digits": [0.125, -0.125], "text": [-0.5]}
    assert found[Row("adamw")] == {"digits": [-0.25, -0.5], "text": [0.0]}
    assert found[Row("alrao")] == {"text": [math.inf]}
    # Of the first seed alone.
    assert found[Row("alrao-adam-run", (1e-4, 1.0))] == {"digits": [1.0], "text": [-0.5]}
    standings = figures.standings(found)
    assert standings[Row("alrao-adam-run")] == Standing(0.0, "digits", -0.25, -0.25, 2)
    assert standings[Row("sgd")] == Standing(2.0, "text", 1.0, 1.0, 2)
    assert standings[Row("alrao")] == Standing(math.inf, "text", math.inf, math.inf, 1)
    # All tasks first, the best worst case first, then the mean; what was given other intervals is not among them.
    names = [row.method for row in standings]
    assert names == ["alrao-adam-run", "adamw", "sgd", "adam", "alrao"]
    assert all(row.interval is None for row in standings)


def test_profiles(summary):
    nats = figures.behind(summary, relative=False)
    # The least mean losses are those of AdamW, 0.5, and of the recipe, 1.5.
    assert nats[Row("alrao-adam-run")] == [0.375, 0.0] and nats[Row("adam")] == [0.5, 2.5]
    assert figures.behind(summary, relative=True)[Row("adam")] == [100.0, pytest.approx(500 / 3)]
    assert figures.share_within(nats[Row("alrao-adam-run")], 0.2) == 50
    assert figures.share_within(nats[Row("alrao-adam-run")], 0.375) == 100
    assert figures.share_within(nats[Row("alrao")], 1e9) == 0


def test_sensitivity(summary):
    found = figures.sensitivity(summary)
    assert found.keys() == {"alrao-adam-run"}
    assert found["alrao-adam-run"] == {
        (1e-4, 1.0): {"digits": [1.0], "text": [0.0]},
        (1e-6, 1e3): {"text": [math.inf]},
    }


def test_costs(summary):
    found = figures.costs(summary)
    # A step is the shortest median of a method's runs: twice and half of Adam's; bytes twice and half as many.
    assert found[Row("alrao-adam-run")] == (pytest.approx(1), pytest.approx(1), 1)
    assert found[Row("sgd")].runs == 2 and found[Row("adam")] == (1, 1, 1)


def test_changes_have_a_standard_error():
    assert tables.change([0.5]) == "+50.0 %"
    assert tables.change([0.5, 0.25]) == "+37.5 +- 12.5 %"
    assert tables.change([0.5, math.inf]) == "diverged"


def test_times_are_compared_on_one_machine():
    records = some_records()
    for record in records:
        if record["case"]["method"] in ("sgd", "alrao-adam-run"):
            record["machine"] = record["machine"] | {"cpu": "another"}
    # Adam has run on the text there, too: the recipe takes half of its time.
    there = fake("text", "adam", None, 0, 4.0, 4.0, step_ms=10.0, size=800)
    there["case"]["seed"], there["machine"]["cpu"] = 1, "another"
    found = figures.costs(figures.summarise([*records, there]))
    assert found[Row("alrao-adam-run")] == (pytest.approx(0.5), pytest.approx(1), 1)
    untimed = [{k: v for k, v in r.items() if k != "step_ms"} for r in records]
    assert figures.costs(figures.summarise([*untimed, there]))[Row("alrao-adam-run")].step is None
    there["machine"]["cpu"] = "a third"
    summary = figures.summarise([*records, there])
    assert figures.costs(summary)[Row("alrao-adam-run")].step is None
    assert next(tables.main_tables(summary, {})).rows[0][-3:] == ["1", "", "1.00"]


def test_tables(summary):
    missing = [record for record in some_records() if "missing" in record]
    shown = [*tables.main_tables(summary, {}), *tables.detail_tables(summary, {}, missing)]
    standings, gaps, profile, interval, losses, grid, absent = shown
    recipe = "Alrao-Adam, total_steps"
    first = "+0.000 digits -0.250 -0.250 2 1 1.00 1.00"
    assert standings.rows[0] == [recipe, *first.split()]
    assert standings.rows[-1][:6] == ["Alrao", "diverged", "text", "diverged", "diverged", "1"]
    assert gaps.rows[0] == [recipe, "+0.000 +- 0.177", "-0.500"] and gaps.rows[-1][1] == ""
    best = ["AdamW, best of grid", *["50"] * 5, "100", *["50"] * 5, "100"]
    assert profile.rows[:2] == [best, [recipe, *["50"] * 5, "100", *["50"] * 6]]
    assert interval.rows == [
        ["(0.0001, 1)", "+100.0 %", "+100.0 %", "+0.0 %"],
        ["(1e-06, 1000)", "diverged", "", "diverged"],
    ]
    by_label = {row[0]: row[1:] for row in losses.rows}
    assert by_label["SGD, best of grid"][0] == "0.875 +- 0.177 (0.1, the edge)"
    assert by_label["Alrao"] == ["", "diverged (1 of 1)"]
    text = "0.1: 0.875 *; 1: 0.125; 3: diverged"
    assert grid.rows[0] == ["SGD, best of grid", "digits", text]
    assert absent.rows == [["DoG, averaged", "no dog"]]


def test_early_stopping():
    def run(method, lr, valid, test, least):
        early = least and {"steps": 5, "valid_loss": least[0], "test_loss": least[1]}
        return {**fake("graph", method, lr, 0, valid, test), "guess": 1.0, "stopped": early}

    records = [
        # Stopped early the higher rate is the better one.
        run("sgd", 0.1, 0.5, 0.75, (0.5, 0.75)),
        run("sgd", 1.0, 2.0, 2.5, (0.25, 0.375)),
        # A run that diverged late, one that did so at once, and one that is no better than guessing anywhere.
        run("alrao", None, None, None, (0.25, 0.5)),
        run("alrao-momentum", None, None, None, None),
        run("adam", None, 9.0, 9.0, (3.0, 2.5)),
        # Of an older run nothing is known.
        fake("graph", "prodigy", None, 0, 0.5, 0.5),
        {"case": {"method": "dog"}, "missing": "no dog"},
    ]
    summary = figures.summarise(records)
    stopped = figures.summarise(figures.stopped_early(records))
    assert summary["graph"][Row("sgd")].lr == 0.1 and stopped["graph"][Row("sgd")].lr == 1.0
    assert summary["graph"][Row("alrao")].diverged and Row("prodigy") not in stopped["graph"]
    _, _, table = tables.main_tables(summary, stopped)
    assert table.rows == [
        ["SGD, best of grid", "+0.000", "graph", "+0.000", "1", "+0.000"],
        ["Alrao", "+0.125", "graph", "+0.125", "1", "+0.125"],
        *(
            [name, "diverged", "graph", "diverged", "1", "diverged"]
            for name in ("Alrao, momentum 0.9", "Adam 0.001")
        ),
    ]
    losses = {t.title: t for t in tables.detail_tables(summary, stopped)}
    by_label = {row[0]: row[1] for row in losses["the same with early stopping"].rows}
    assert by_label == {
        "SGD, best of grid": "0.375 (1, the edge)",
        "Alrao": "0.500",
        "Alrao, momentum 0.9": "diverged (1 of 1)",
        "Adam 0.001": "diverged (1 of 1)",
    }


def test_plots(summary, tmp_path):
    from benchmarks.experiments.quality.plots import plot

    paths = plot(summary, tmp_path)
    assert [path.stem for path in paths] == ["gaps", "profiles", "interval-alrao-adam-run"]
    assert all(path.stat().st_size > 5000 for path in paths)


def test_nothing_to_compare_with():
    summary = figures.summarise([fake("digits", "alrao", None, 0, 1.0, 0.5)])
    assert list(tables.main_tables(summary, {})) == []
    (losses,) = tables.detail_tables(summary, {})
    assert losses.rows == [["Alrao", "0.500"]]
