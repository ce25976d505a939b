"""What this file protects: the frame of `make gpu-check`, tried without a GPU, and `make gpu-status`.

Steps are apart: one that fails, hangs or cannot start is recorded, and the next runs; results are there after each."""

import importlib
import json
import re
import sys
from pathlib import Path

import benchmarks_package
import pytest

benchmarks_package.load()


@pytest.fixture
def module():
    """A module of the room benchmarks/gpu."""
    return lambda name: importlib.import_module(f"benchmarks.gpu.{name}")


@pytest.fixture
def check(module, tmp_path, monkeypatch):
    gpu_check = module("check")
    (tmp_path / "root" / "alrao_fast").mkdir(parents=True)
    (tmp_path / "root" / "kernels").mkdir()
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path / "root")
    return gpu_check.Check(tmp_path / "out", 60, dry_run=True)


def run(check, module, code, **options):
    step = module("check").Step("one", [sys.executable, "-c", code], 30, **options)
    check.run(step)
    return check.result["steps"][-1]


def written(check):
    return json.loads((check.folder / f"{check.name}.json").read_text())


def test_a_step_that_passes(check, module):
    step = run(check, module, "print('hello')", after=str.strip)
    assert (step["verdict"], step["note"]) == ("passed", "hello")
    assert "tail" not in step
    assert written(check)["steps"] == [step]
    assert "hello" in (check.folder / f"{check.name}.log").read_text()
    assert "| one | passed |" in (check.folder / f"{check.name}.md").read_text()


def test_a_step_that_fails_and_the_next_one(check, module):
    step = run(check, module, "print('what happened'); raise SystemExit(3)")
    assert step["verdict"] == "failed"
    assert step["tail"] == ["what happened"]
    assert run(check, module, "")["verdict"] == "passed"
    assert [s["verdict"] for s in written(check)["steps"]] == ["failed", "passed"]


def test_a_step_that_hangs(check, module):
    gpu_check = module("check")
    code = "import time; print('before', flush=True); time.sleep(60)"
    check.run(gpu_check.Step("one", [sys.executable, "-c", code], 3))
    step = check.result["steps"][-1]
    assert step["verdict"] == "timeout"
    assert step["tail"] == ["before"]
    assert step["seconds"] < 30


def test_a_step_that_cannot_start(check, module):
    gpu_check = module("check")
    check.run(gpu_check.Step("one", ["/nowhere/at/all"], 30))
    assert check.result["steps"][-1]["verdict"] == "failed"
    assert "No such file" in check.result["steps"][-1]["tail"][0]


def test_a_result_that_cannot_be_read(check, module):
    step = run(check, module, "", after=lambda output: output[5])
    assert step["verdict"] == "failed"
    assert "its result cannot be read: IndexError" in step["note"]


def test_a_step_that_is_skipped(check, module):
    step = run(check, module, "raise SystemExit(1)", skip="no GPU")
    assert (step["verdict"], step["note"]) == ("skipped", "no GPU")


def test_steps_that_were_not_asked_for(check, module):
    check.only = ["another"]
    module("check").Check.run(
        check, module("check").Step("one", [sys.executable, "-c", "raise SystemExit(1)"], 30)
    )
    assert check.result["steps"] == []


def test_the_steps_are_those_that_the_status_asks_for(module, monkeypatch):
    gpu_check, met, verdicts = module("check"), [], {}

    class Check:
        def __init__(self):
            self.on_gpu, self.work = True, Path("/nowhere")
            device = {"capability": "9.0"}
            self.result = {"missing_modules": [], "devices": [device, device], "steps": []}

        def run(self, step):
            met.append(step.name)
            self.result["steps"].append({"verdict": verdicts.get(step.name, "passed")})
            if step.name == "build":
                asked = dict(step.env)
                assert asked.pop("NVCC_APPEND_FLAGS").split()[-1] == "-lineinfo"
                assert asked == {"ALRAO_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}

        def lay_out(self):
            pass

    gpu_check.steps(Check())
    assert met == list(module("status").STEPS)
    met.clear()
    verdicts["build"] = "failed"
    gpu_check.steps(Check())
    assert met[:3] == ["build", "build without CUDA", "doctor"]


def test_no_time_left(check, module):
    check.seconds = 6.0
    assert run(check, module, "")["note"] == "no time left"


def speed_lines(module, records):
    """The lines of the Markdown about these records."""
    result = {"steps": [], "ceilings": {}, "errors": [], "speed": records}
    tables = list(module("report").tables(result))[1:]
    return "\n".join(table.markdown() for table in tables).splitlines()


def test_the_table_of_speed(module):
    case = {"name": "head", "sizes": {"batch": 32}, "dtype": "float32"}
    target = {"kind": "target", "row": "B3", "metric": "gpu", "peer": "plain", "ours": "alrao"}
    seconds = {"graph": {"median": 12.5e-6}, "wall": {"median": 1e-4}}
    lines = speed_lines(
        module,
        [
            {
                "case": {**case, **target},
                "ratio": 1.7,
                "limit": 1.5,
                "met": False,
                "clock": "graph",
            },
            {
                "case": {**case, **target, "row": "A1", "peer": None},
                "ratio": None,
                "limit": 2.0,
                "met": None,
                "clock": None,
                "missing": "no peer",
            },
            {
                "case": {**case, "kind": "candidate", "candidate": "alrao"},
                "seconds": seconds,
                "bytes": 1e6,
                "copy_share": 0.5,
                "error": 1e-7,
            },
            {"case": {**case, "kind": "candidate", "candidate": "b|c"}, "missing": "out of memory"},
            {"case": {"kind": "rates"}, "copy": 1.0},
        ],
    )
    rows = [line for line in lines if "batch 32" in line]
    assert rows[0] == "| A1 | head (float32; batch 32) | gpu | floor |  | 2 | no peer |"
    assert rows[1] == "| B3 | head (float32; batch 32) | graph | plain | 1.7 | 1.5 | NOT met |"
    assert (
        rows[2]
        == "| head (float32; batch 32) | alrao | 12.5 |  | 100 |  | 1e+06 | 50 |  |  | 1e-07 |"
    )
    assert "| b/c |" in rows[3] and rows[3].endswith("| out of memory |")
    assert (
        len({line.count("|") for line in lines if "batch 32" in line or "candidate" in line}) == 2
    )


def test_last_lines_of_the_tools(module):
    gpu_check = module("check")
    assert (
        gpu_check._pytest_line("..\n3 passed, 1 skipped in 2.10s\n")
        == "3 passed, 1 skipped in 2.10s"
    )
    assert gpu_check._pytest_line("==== 1 failed in 2.10s (0:00:02) ====\n").startswith("1 failed")
    assert gpu_check._pytest_line("Killed") == "pytest did not finish"
    said = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_check._sanitizer_line(said) == "ERROR SUMMARY: 0 errors"
    said = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert "0 hazards" in gpu_check._sanitizer_line(said)


def test_the_exercise_on_the_cpu(module, tmp_path):
    exercise = module("exercise")
    out = tmp_path / "errors.jsonl"
    assert (
        exercise.main(["--backend", "reference", "--op", "switch_update", "--out", str(out)]) == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["dtype"] for row in rows} == {"float64", "float32"}
    assert all(row["cases"] == 4 and row["complaint"] is None for row in rows)


def test_the_exercise_reports_a_wrong_kernel(module, monkeypatch, capsys):
    exercise = module("exercise")

    def wrong(impl, dtype, device, clones):
        outputs = right(impl, dtype, device, clones)
        return (
            {k: v + (impl == "cpu") for k, v in outputs.items()} if dtype.itemsize == 4 else outputs
        )

    right = exercise.observations
    monkeypatch.setattr(exercise, "observations", wrong)
    monkeypatch.setattr(exercise.backends, "device_of", lambda backend: exercise.CPU)
    assert exercise.main(["--backend", "cpu", "--op", "switch_update"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["dtype"]: bool(row["complaint"]) for row in rows} == {
        "float64": False,
        "float32": True,
    }


# gpu_status.


@pytest.fixture
def status(module, tmp_path, monkeypatch, capsys):
    """Runs gpu_status over results made here; returns exit status and output."""
    gpu_status = module("status")
    now = {"csrc/a.h": "1", "kernels/b.py": "2"}
    monkeypatch.setattr(gpu_status, "source_hashes", lambda: now)

    def run(*results):
        for number, changes in enumerate(results):
            result = {
                "name": f"h100-{number}",
                "machine": {"gpu": "NVIDIA H100", "torch": "2.11.0"},
                "steps": [{"name": name, "verdict": "passed"} for name in gpu_status.STEPS],
                "source_hashes": dict(now),
            }
            result.update(changes)
            (tmp_path / f"{number}.json").write_text(json.dumps(result))
        return gpu_status.main(["--results", str(tmp_path)]), capsys.readouterr().out

    return run


def test_no_result(status):
    code, said = status()
    assert code == 1 and "make gpu-check" in said


def test_a_result_of_these_sources(status):
    code, said = status({})
    assert code == 0
    assert "exactly these sources" in said and "every step has passed" in said


def test_two_results_that_complete_each_other(status, module):
    steps = [{"name": name, "verdict": "passed"} for name in module("status").STEPS]
    assert status({"steps": steps[:4]}, {"steps": steps[3:]})[0] == 0
    code, said = status({"steps": steps[:4]}, {"steps": steps[5:]})
    assert code == 1 and "run `make gpu-check` for exercise triton." in said
    others = {"csrc/a.h": "0", "kernels/b.py": "2"}
    assert status({"steps": steps[:4], "source_hashes": others}, {"steps": steps[3:]})[0] == 1


def test_sources_that_changed(status):
    code, said = status({"source_hashes": {"csrc/a.h": "0", "csrc/old.h": "3"}})
    assert code == 1
    assert "3 files changed" in said
    for line in ("changed  csrc/a.h", "removed  csrc/old.h", "new      kernels/b.py"):
        assert line in said


def test_a_step_that_did_not_pass(status):
    code, said = status({"steps": [{"name": "speed", "verdict": "skipped"}]})
    assert code == 1 and "not passed: speed (skipped)" in said


def test_a_dry_run_verifies_nothing(status):
    code, said = status({"machine": {"gpu": None, "torch": "2.11.0"}})
    assert code == 1 and "verifies nothing" in said


def test_committed_results_can_be_read(module):
    gpu_status = module("status")
    for file in gpu_status.RESULTS.glob("*.json"):
        gpu_status.describe(json.loads(file.read_text()), gpu_status.source_hashes())


def test_shares_are_drawn_and_told(module, tmp_path):
    """The figure of docs/gpu.md, and that its shares are those of the page's tables."""
    plots = module("plots")
    assert plots.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")
    page = (plots.ROOT / "docs" / "gpu.md").read_text()
    with (plots.FOLDER / "shares.csv").open(newline="") as file:
        lines = list(plots.csv.DictReader(file))
    assert all(line["state"] in page for line in lines)
    for line in lines:
        share, over_bytes = int(line["share"]), f"{100 / int(line['share']):.2f}"
        assert re.search(rf"\b{share}\b( %|,)", page) or over_bytes in page, line
