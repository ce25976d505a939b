"""The report, `python benchmarks report`. Protects:

- the page from the results of all commands: every figure and number is in it, ids are unique, tags close, nothing is
  loaded from elsewhere, text from result files is escaped; the same results give the same page;
- the Markdown form, whose figures exist; what was not run says so with its command; no results at all are an error;
- of records for the same case the last counts, dry runs do not; full runs of a task hide quick ones.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import benchmarks_package
import pytest

benchmarks_package.load()

MACHINE = {
    "cpu": "a processor <x>",
    "gpu": None,
    "cores": 2,
    "threads": 1,
    "torch": "2.13",
    "cuda": None,
    "python": "3.12",
    "sources": "feedfacefeedface",
    "commit": "abc1234",
}


def write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**record, "machine": MACHINE}) for record in records]
    path.write_text("\n".join(lines) + "\n")


def candidate(name: str, median: float, **values) -> dict:
    case = {"benchmark": "speed", "kind": "candidate", "name": "VGG19", "op": "feature_sgd"}
    case |= {"sizes": {"entries": 8}, "dtype": "float32", "device": "cpu", "candidate": name}
    time = {"median": median, "lower": median * 0.9, "upper": median * 1.1}
    found = {"seconds": {"wall": time}, "error": 1e-7, "bytes": 8e6, "flops": 2e6, "rounds": 7}
    return {"case": case, **found, "copy_share": 0.77, "peak_memory": 3_000_000, **values}


def speed_records() -> list[dict]:
    dry = candidate("alrao", 55.0)
    dry["case"]["dry_run"] = True
    missing = {**candidate("apex <b>FusedSGD</b>", 1.0), "missing": "apex is not installed"}
    missing.pop("seconds")
    step = candidate("alrao", 3e-3)
    step["case"] |= {"op": "training_step", "name": "MLP"}
    sweep = {"benchmark": "speed", "kind": "sweep", "sweep": "clones", "device": "cpu"}
    target = {**candidate("alrao", 1.0)["case"], "kind": "target", "row": "A1", "metric": "wall"}
    target |= {"ours": "alrao", "peer": "sgd"}
    return [
        {
            "case": {"benchmark": "speed", "kind": "rates", "device": "cpu"},
            "copy": 2e10,
            "float32": 1e12,
        },
        candidate("alrao", 9.0),
        candidate("alrao", 1e-3),
        candidate("torch.optim.SGD, fused", 1.25e-3),
        dry,
        missing,
        step,
        {"case": target, "ratio": 0.8, "limit": 1.0, "met": True, "clock": "wall"},
        {"case": {**target, "row": "A2"}, "missing": "no such peer"},
        {
            "case": {**sweep, "candidate": "alrao"},
            "at": [1, 2, 4],
            "seconds": [1e-3, 1.5e-3, 2.5e-3],
            "peak_memory": [0, 0, 0],
            "time_exponent": 0.73,
            "memory_exponent": None,
        },
    ]


def paper_records() -> list[dict]:
    records = []
    for method, extra in (
        ("alrao", {"lr_range": [1e-3, 100.0], "clones": 2}),
        ("adam", {}),
        ("sgd", {"lr": 1.0}),
        ("fraction", {"lr": 1.0, "p": 0.5}),
    ):
        case = {"network": "lstm-chars", "method": method, "data": "text 123", "train": 900}
        case |= {"valid": 90, "test": 90, "epochs": 2, "patience": 20, "seed": 0, **extra}
        record = {"case": case, "train_loss": [3.0, 2.0], "valid_loss": [2.5, 2.25]}
        record |= {"valid_accuracy": [30.0, 35.0], "best_epoch": 2, "test_loss": 2.0}
        record |= {"test_accuracy": 37.5}
        if method == "alrao":
            record |= {"posterior_epochs": [0.0, 1.0, 2.0], "posterior": [[0.5, 0.5]] * 3}
        records.append(record)
    return records


def quality_record(method: str, lr: float | None, loss: float, **case) -> dict:
    case = {"task": "digits", "method": method, "lr": lr, "seed": 0, "interval": None, **case}
    record = {"case": {**case, "steps": 10}, "curve": [2.0, loss], "valid_loss": loss}
    record |= {"test_loss": loss, "diverged": False, "step_ms": 1.5, "bytes": 100}
    return record


def ranking_records() -> list[dict]:
    records = []
    for model, losses in (("small", (0.5, 0.4)), ("large", (0.25, 0.2)), ("deep", (0.3, 0.45))):
        for lr, loss in ((None, losses[0]), (0.1, losses[1]), (1.0, 9.0)):
            case = {"model": model, "lr": lr, "seed": 0, "epochs": 2}
            records.append({"case": case, "loss": loss, "suggested_lr": lr or 0.2})
    return records


@pytest.fixture
def results(tmp_path) -> Path:
    write(tmp_path / "speed" / "speed.jsonl", speed_records())
    write(tmp_path / "paper" / "runs.jsonl", paper_records())
    write(tmp_path / "ranking" / "ranking.jsonl", ranking_records())
    quality = [quality_record("alrao", None, 0.375), quality_record("sgd", 0.1, 0.4375)]
    quality += [quality_record("sgd", 1.0, 0.5)]
    quality += [quality_record("alrao", None, 0.75, task="graph")]
    quality += [quality_record("alrao", None, 0.625, interval=[1e-4, 1.0])]
    quality += [{"case": {"method": "dog"}, "missing": "dog is not installed"}]
    write(tmp_path / "quality" / "quality.jsonl", quality)
    write(tmp_path / "quality" / "quick.jsonl", [quality_record("alrao", None, 1.625)])
    return tmp_path


def report(results: Path) -> str:
    from benchmarks.report.command import main

    main(["--results", str(results)])
    return (results / "report" / "report.html").read_text()


class Strict(HTMLParser):
    """Collects ids and text; every tag must be closed in order."""

    VOID = {"meta", "br", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def test_page(results):
    page = report(results)
    parsed = Strict()
    parsed.feed(page)
    assert parsed.open == [] and len(parsed.ids) == len(set(parsed.ids))
    assert not parsed.tags & {"script", "link", "img", "iframe", "b", "x"}
    references = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert references and all(reference.startswith("#") for reference in references)
    assert {reference[1:] for reference in references} <= set(parsed.ids)
    assert not re.search(r"url\((?!#)", page) and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "#010101" not in page
    for text in (
        "apex <b>FusedSGD</b>",
        "apex is not installed",
        "a processor <x>",
        "1.25",
        "0.73",
        "A1 VGG19",
        "no such peer",
        "0.375",
        "0.438 (0.1, the edge)",
        "dog is not installed",
        "Spearman's correlation of the two orders: 0.50",
        "6,258,500",
        "2.885",
        "feedfacefeedface",
    ):
        assert text in parsed.text, text
    # The dry run's, the older record's and the quick run's figures.
    for text in ("55,000,000", "9,000,000", "1.625"):
        assert text not in parsed.text, text
    names = {path.stem for path in (results / "report" / "figures").iterdir()}
    assert names >= {"speed-roofline", "speed-clones", "quality-gaps", "ranking"}
    assert names >= {"quality-profiles", "quality-interval-alrao", "paper-0-curves"}
    assert names >= {"paper-0-posterior", "paper-0-fractions"}
    assert page.count("<svg") == len(names)
    assert report(results) == page


@pytest.mark.slow
def test_markdown(results):
    report(results)
    text = (results / "report" / "report.md").read_text()
    figures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert len(figures) > 6 and all((results / "report" / figure).exists() for figure in figures)
    assert "| Alrao | -0.062 | digits | -0.062 | -0.062 | 1 |" in text


def test_what_was_not_run(tmp_path):
    write(tmp_path / "quality" / "quick.jsonl", [quality_record("alrao", None, 0.375)])
    page = report(tmp_path)
    for command in (
        "python benchmarks speed",
        "python benchmarks ranking",
        "python benchmarks paper",
    ):
        assert f"Not measured: <code>{command}" in page
    write(tmp_path / "speed" / "speed.jsonl", speed_records()[:1])
    assert "Not measured: <code>python benchmarks speed" in report(tmp_path)


def test_no_results(tmp_path, capsys):
    from benchmarks.report.command import main

    with pytest.raises(SystemExit) as ended:
        main(["--results", str(tmp_path)])
    assert ended.value.code == 2 and "no results under" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_ranking(results):
    records = ranking_records()
    write(results / "ranking" / "ranking.jsonl", records[:-2])
    assert "deep" not in report(results)


def test_ranking_by_hand():
    from benchmarks.experiments.ranking import Comparison

    comparison = Comparison([{**record, "machine": MACHINE} for record in ranking_records()])
    # Orders large, deep, small and large, small, deep: Spearman is 1 - 6 (1 + 1) / (3 * 8).
    assert comparison.agreement() == pytest.approx(0.5)
    assert [row[0] for row in comparison.table().rows] == ["large", "small", "deep"]
    assert "factor of 2.0 (median)" in comparison.verdict()[-1]


def test_ranking_end_to_end(tmp_path):
    from benchmarks.experiments.ranking import main

    options = [
        "--epochs",
        "1",
        "--seeds",
        "2",
        "--models",
        "linear",
        "mlp 8",
        "--results",
        str(tmp_path),
    ]
    main(options)
    lines = (tmp_path / "ranking.jsonl").read_text()
    assert lines.count("\n") == 2 * 2 * 8
    main(options)
    assert (tmp_path / "ranking.jsonl").read_text() == lines
    assert (tmp_path / "ranking.png").stat().st_size > 5000
