"""The speed benchmark, `python benchmarks speed`. Protects:

- the command from end to end: records with the fields that the report and gpu-check read, a second call measures
  nothing, missing peers are rows with the reason, and red tests stop it;
- every row of the figures to reach has a case and candidates of those names; all GPU cases are correct at tiny sizes;
- a wrong candidate is called wrong and not timed, and where it is ours the command fails;
- floors, ratios, verdicts, exponents and bytes on figures made up here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import benchmarks_package
import pytest
import torch

benchmarks_package.load()

CPU = torch.device("cpu")
ROWS = {*(f"A{k}" for k in range(1, 9)), *(f"B{k}" for k in range(1, 11)), "E1", "S1", "S2"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_rates(monkeypatch):
    """The machine's rates from small tensors: real ones take seconds."""
    from benchmarks import roofline

    monkeypatch.setitem(roofline.COPIED, "cpu", 2**20)
    monkeypatch.setitem(roofline.SIDE, "cpu", 64)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "speed.jsonl").read_text().splitlines()]


def run(folder: Path, *more: str) -> int:
    from benchmarks.speed.command import main

    return main(
        ["--rounds", "2", "--seconds", "0.1", "--no-memory", "--results", str(folder), *more]
    )


def test_the_command_measures_and_goes_on(tmp_path, small_rates, capsys):
    options = ("--preset", "quick", "--no-tests", "--only", "switch_update")
    assert run(tmp_path, *options) == 0
    first = records(tmp_path)
    assert [r["case"]["kind"] for r in first].count("rates") == 1
    rows = {r["case"]["candidate"]: r for r in first if r["case"]["kind"] == "candidate"}
    assert {"alrao", "alrao cpu", "alrao reference", "authors"} <= set(rows)
    assert "--authors PATH" in rows["authors"]["missing"]
    ours = rows["alrao"]
    assert ours["case"]["op"] == "switch_update" and ours["machine"]["sources"]
    times = ours["seconds"]["wall"]
    assert 0 < times["lower"] <= times["median"] <= times["upper"]
    assert ours["error"] < 1e-6 and ours["bytes"] == 8 * 72 and ours["copy_share"] > 0
    assert "not given" in capsys.readouterr().out
    # Again: the rates are measured, the case is found.
    assert run(tmp_path, *options) == 0
    again = records(tmp_path)[len(first) :]
    assert {r["case"]["kind"] for r in again} == {"rates"}
    assert run(tmp_path, *options, "--again") == 0
    assert len(records(tmp_path)) == len(first) + len(again) + len(first)


@pytest.mark.slow
def test_the_report_and_gpu_check_read_the_records(tmp_path, small_rates):
    from benchmarks.gpu import report as gpu_report
    from benchmarks.report import speed_section
    from benchmarks.speed.command import main

    main(["--dry-run", "--only", "log_prob, 10,000", "--results", str(tmp_path)])
    found = records(tmp_path)
    result = {"steps": [], "ceilings": {}, "errors": [], "speed": found}
    lines = "\n".join(table.markdown() for table in gpu_report.tables(result))
    assert "E1" in lines and "one by one" in lines
    # What a dry run measured is no result.
    assert speed_section.section(tmp_path)[1] == []
    for record in found:
        del record["case"]["dry_run"]
    (tmp_path / "speed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    section, used = speed_section.section(tmp_path)
    assert len(used) == len(found)
    text = json.dumps([table.rows for table in (*section.tables, *section.details)])
    assert "E1 log_prob, 10,000 words" in text and "alrao cpu" in text


def test_red_tests_stop_it(tmp_path, monkeypatch):
    from benchmarks.speed import command

    calls = []

    def red(arguments, **_):
        calls.append(arguments)
        return type("Done", (), {"returncode": 1})()

    monkeypatch.setattr(command.subprocess, "run", red)
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("measured all the same"))
    with pytest.raises(SystemExit, match="nothing is measured"):
        run(tmp_path, "--preset", "quick", "--only", "switch_update")
    assert any(str(part).endswith("test_switch_update.py") for part in calls[0])


@pytest.fixture(scope="module")
def tiny_cases():
    from benchmarks.speed import presets

    return list(presets.gpu(tiny=True))


def test_every_row_names_what_there_is(tiny_cases):
    rows = set()
    for case in tiny_cases:
        names = {candidate.name for candidate in case.candidates}
        for target in case.targets:
            rows.add(target.row)
            assert target.ours in names
            assert target.peer in {*names, None, "best"}, (case.name, target)
    assert rows == ROWS


# One of each kind; `python benchmarks speed --dry-run` runs all of them.
CHECKED = (
    "feature_sgd GPT 124M, momentum 0.9",
    "feature_sgd GPT 124M, momentum 0.9, GradScaler",
    "feature_adam GPT 124M",
    "gradient_clip GoogLeNet, with a copy before",
    "gradient_clip GPT 124M, nothing to clip",
    "switch_mixture, 10 classes",
    "switch_mixture, 50,304 tokens",
    "head step, 10 classes",
    "head step, 50,304 tokens",
    "log_prob, 10,000 words",
    "switch_update",
    "training step, MLP",
    "training step, LSTM, 50 characters",
    "training step, GPT 124M",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_gpu_cases_are_right_at_tiny_sizes(name, tiny_cases):
    from benchmarks.speed.measure import check

    case = next(case for case in tiny_cases if case.name == name)
    quick = replace(case, candidates=tuple(c for c in case.candidates if "compile" not in c.name))
    values, _ = check(quick, CPU)
    for candidate, row in values.items():
        assert "wrong" not in row.get("missing", ""), (candidate, row)
    assert "error" in values["alrao"], values["alrao"]


def test_a_wrong_candidate_is_not_timed(tmp_path, small_rates, monkeypatch, capsys):
    from benchmarks.speed import presets
    from benchmarks.speed.case import Call, Candidate
    from benchmarks.speed.switch import switch_case

    def wrong(given):
        return Call(lambda: None, lambda: {"log_posterior": given.log_posterior + 1})

    case = switch_case()
    own = Candidate("alrao", wrong, ("log_posterior",))
    bad = replace(case, candidates=(own, *case.candidates[1:2]))
    monkeypatch.setitem(presets.PRESETS, "quick", lambda: iter([bad]))
    assert run(tmp_path, "--preset", "quick", "--no-tests") == 1
    row = next(r for r in records(tmp_path) if r["case"].get("candidate") == "alrao")
    assert row["missing"].startswith("wrong: log_posterior") and "seconds" not in row
    assert "failed:" in capsys.readouterr().out


def seconds(**medians):
    return {
        "seconds": {clock: {"median": m, "lower": m, "upper": m} for clock, m in medians.items()}
    }


def test_targets_on_made_up_figures():
    from benchmarks.speed.case import Target
    from benchmarks.speed.judging import floor, judge, shares
    from benchmarks.speed.switch import switch_case

    case = replace(switch_case(), bytes=1000.0, flops=500.0)
    rates = {"copy": 1e6, "float32": 1e6}
    assert floor(case, rates) == pytest.approx(1e-3)
    assert shares(case, seconds(wall=4e-3), rates) == {
        "copy_share": pytest.approx(0.25),
        "matrix_share": pytest.approx(0.125),
    }
    values = {
        "alrao": seconds(graph=1.0, gpu=2.0, wall=3.0),
        "alrao cpu": seconds(gpu=0.1),
        "slow": seconds(gpu=4.0, wall=5.0),
        "fast": seconds(graph=0.5),
        "absent": {"missing": "not installed"},
    }

    def verdict(metric, peer, limit):
        return judge(case, Target("X", metric, "alrao", peer, limit), values, rates)

    # The clocks of both sides are the same: a graph's replay where both have one.
    assert verdict("gpu", "slow", 0.5) == {"ratio": 0.5, "limit": 0.5, "met": True, "clock": "gpu"}
    assert verdict("gpu", "fast", 1.9)["met"] is False
    assert verdict("wall", "slow", 0.5)["ratio"] == pytest.approx(0.6)
    assert verdict("gpu", "best", 3.0)["ratio"] == pytest.approx(2.0)
    assert verdict("gpu", None, 2000)["ratio"] == pytest.approx(1000)
    assert verdict("gpu", "absent", 1)["missing"] == "absent: not installed"
    assert verdict("memory", "slow", 1)["missing"] == "peak memory was not measured"


def test_exponents(tmp_path):
    from benchmarks.speed.sweeps import exponent, plot, summaries

    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    # A constant for small sizes does not hide the growth.
    assert exponent([1, 10, 100, 1000], [5, 5, 50, 500]) == pytest.approx(1)
    assert exponent([1, 2], [0, 3]) is None
    points = [(n, {"alrao": seconds(wall=float(n)), "late": {"missing": "x"}}) for n in (1, 2, 4)]
    found = summaries(points)
    assert set(found) == {"alrao"} and found["alrao"]["time_exponent"] == pytest.approx(1)
    assert found["alrao"]["memory_exponent"] is None
    plot("clones", found, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_says_what_the_tests_before_it_need(monkeypatch):
    from benchmarks.speed import command

    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pytest is not installed: pip install -e '\.\[bench\]'"):
        command.run_tests({"switch_update"}, quick=True)


def test_bytes_and_flops():
    from benchmarks.speed.heads import Head, mixture_case
    from benchmarks.speed.optimizers import optimizer_case
    from benchmarks.speed.steps import step_case

    case = optimizer_case("256 vectors of 64", momentum=0.9)
    entries = 256 * 64
    assert case.sizes["entries"] == entries and case.bytes == 5 * 4 * entries
    head = mixture_case(Head("x", 8, 16, 10, 3, "bfloat16"))
    assert head.flops == 6 * 8 * 16 * 10 * 3
    assert head.bytes == 2 * 2 * (8 * 16 + 3 * 10 * 17)
    mlp = step_case("MLP", 32)
    assert mlp.flops == 6 * 32 * (64 * 256 + 256 * 256 + 10 * 256 * 10)
    # 94 million multiplications and additions for a picture of 32 x 32: the groups count.
    mobile = step_case("MobileNetV2", 1)
    assert mobile.flops == pytest.approx(6 * 94e6, rel=0.05)
    assert not any(c.whole for c in mobile.candidates if c.name == "sgd")


@pytest.mark.slow
def test_memory_of_a_case(tmp_path):
    from benchmarks.speed.command import find
    from benchmarks.speed.heads import Head, mixture_case
    from benchmarks.speed.presets import cpu

    case = next(c for c in cpu() if c.memory)
    question = {"name": case.name, "sizes": dict(case.sizes), "dtype": case.dtype}
    assert find(question).name == case.name and find(question).small is not None
    swept = mixture_case(Head("4 clones", 256, 256, 1000, 4), memory=True)
    question = {"name": swept.name, "sizes": dict(swept.sizes), "dtype": "float32"}
    assert find(question).sizes == swept.sizes
    with pytest.raises(ValueError, match="no case"):
        find({**question, "dtype": "int8"})
