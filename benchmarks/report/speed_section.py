"""What Alrao costs: the records of `python benchmarks speed` (their fields are described there)."""

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report.page import Picture, Section, picture
from benchmarks.results import Record, grouped, read
from benchmarks.show import Table, pyplot
from benchmarks.speed import sweeps
from benchmarks.speed.judging import figures
from benchmarks.timing import Timing, device_seconds

COMMAND = "python benchmarks speed"
INTRO = (
    "Every op and whole training steps, side by side with what else does the same. Ratios are to the first "
    "candidate of the case, medians over interleaved rounds; the range is that of the quartiles. Copy and matrix "
    "are the shares of the machine's measured copy bandwidth and matrix rate that the case's least bytes and "
    "flops make in that time."
)
TITLES = {
    "feature_sgd": "SGD with a rate per feature",
    "feature_adam": "Adam with a rate per feature",
    "gradient_clip": "Clipping by a norm per clone",
    "switch_mixture": "The clones and their mixture",
    "switch_update": "The switch",
    "training_step": "Whole training steps",
}


def section(folder: Path) -> tuple[Section, list[Record]]:
    """The section, and the records that it is made from: the last of every case, dry runs left out."""
    latest: dict[str, Record] = {}
    for record in read(folder / "speed.jsonl"):
        if not record["case"].get("dry_run"):
            latest[repr(sorted(record["case"].items(), key=str))] = record
    kinds = grouped(latest.values(), lambda record: record["case"]["kind"])
    candidates, swept = kinds.get("candidate", []), kinds.get("sweep", [])
    if not candidates and not swept:
        return Section("Speed", INTRO, missing=COMMAND), []
    tables, details = [], []
    targets = kinds.get("target", [])
    by_op = grouped(candidates, lambda record: record["case"]["op"])
    for op in sorted(by_op, key=list(TITLES).index):
        (tables if op == "training_step" else details).append(op_table(op, by_op[op]))
    if targets:
        tables.append(targets_table(targets))
    rates = kinds.get("rates", [])
    pictures = [roofline(candidates, rates)] if any(map(intensity, candidates)) and rates else []
    for name, own in grouped(swept, lambda record: record["case"]["sweep"]).items():
        caption = f"Time by the number of {name}, log-log; powers are fitted to the upper half"
        pictures.append(picture(f"speed-{name}", caption, partial(scaling, name, own)))
    notes = [rates_note(rates[-1])] if rates else []
    return Section("Speed", INTRO, tables, pictures, details, notes), list(latest.values())


def op_table(op: str, records: list[Record]) -> Table:
    rows = []
    by_case = grouped(records, lambda record: "{name} ({dtype})".format(**record["case"]))
    for name, own in by_case.items():
        first = next((time for record in own if (time := device_seconds(record))), None)
        for k, record in enumerate(own):
            label = name if k == 0 else ""
            rows.append([label, record["case"]["candidate"], *cells(record, first)])
    columns = "case|candidate|ratio|range|time, us|copy %|matrix %|MB|error"
    return Table(TITLES[op], columns.split("|"), rows)


def cells(record: Record, first: Timing | None) -> list[str]:
    """What was measured of a candidate, or why it was not."""
    if "missing" in record:
        return [record["missing"], *[""] * 6]
    time = device_seconds(record)
    if time is None or first is None:
        return [""] * 7
    ratio, spread, *rest = figures(record, first, first, "")
    return [ratio, spread, f"{time.median * 1e6:,.0f}", *rest]


def targets_table(records: list[Record]) -> Table:
    rows = []
    for record in records:
        case = record["case"]
        what = f"{case['ours']} / {case['peer'] or 'floor'}, {case['metric']}"
        if "ratio" in record and record["ratio"] is not None:
            met = "met" if record["met"] else "not met"
            result = [f"{record['ratio']:.2f}", f"{record['limit']:.2f}", met]
        else:
            result = ["", "", record.get("missing", "not measured")]
        rows.append([f"{case['row']} {case['name']}", what, *result])
    return Table("Figures to reach", ["target", "ratio of", "ratio", "at most", ""], rows)


def rates_note(record: Record) -> str:
    rates = {k: v for k, v in record.items() if isinstance(v, float)}
    named = [f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in rates.items() if name != "copy"]
    copy = f"copy {rates['copy'] / 1e9:.1f} GB/s"
    return f"The machine's rates, measured: {', '.join([copy, *named])}"


def intensity(record: Record) -> float | None:
    """Least flops per least byte, or None where they or the time are not known."""
    if not record.get("bytes") or not record.get("flops") or device_seconds(record) is None:
        return None
    return record["flops"] / record["bytes"]


def roofline(candidates: list[Record], rates: list[Record]) -> Picture:
    caption = (
        "Roofline: flops per second by flops per byte, the least that the case needs; lines are the machine's copy "
        "bandwidth and matrix rates. Filled: ours; hollow: others"
    )
    return picture("speed-roofline", caption, partial(draw_roofline, candidates, rates[-1]))


def draw_roofline(candidates: list[Record], rates: Record) -> Any:
    figure, axes = pyplot().subplots(figsize=(7, 4.6))
    points = [record for record in candidates if intensity(record) is not None]
    xs = [x for record in points if (x := intensity(record)) is not None]
    low, high = min(xs) / 3, max(xs) * 3
    matrix = {k: v for k, v in rates.items() if isinstance(v, float) and k != "copy"}
    for name, rate in matrix.items():
        knee = rate / rates["copy"]
        line = sorted({low, min(max(knee, low), high), high})
        axes.plot(line, [min(x * rates["copy"], rate) for x in line], color="0.5", linewidth=1)
        beside = {"xytext": (-4, 4), "textcoords": "offset points", "ha": "right"}
        axes.annotate(name, (high, min(high * rates["copy"], rate)), fontsize=8, **beside)
    for k, (op, own) in enumerate(grouped(points, lambda r: r["case"]["op"]).items()):
        for ours in (True, False):
            group = [r for r in own if r["case"]["candidate"].startswith("alrao") == ours]
            times = [device_seconds(record).median for record in group]
            rates_of = [record["flops"] / time for record, time in zip(group, times)]
            filled, alpha, label = ("full", 0.9, TITLES[op]) if ours else ("none", 0.6, None)
            look = {"color": f"C{k}", "fillstyle": filled, "alpha": alpha, "label": label}
            axes.plot([intensity(record) for record in group], rates_of, "o", **look)
    axes.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="flops per second")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def scaling(name: str, records: list[Record]) -> Any:
    """Seconds of each candidate by the size, and peak memory where it was measured."""
    figure, panels = pyplot().subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    rows = {record["case"]["candidate"]: record for record in records}
    labels = ("seconds", "peak memory beyond the inputs, bytes")
    for axes, (key, power, _), label in zip(panels, sweeps.KINDS, labels):
        sweeps.lines(axes, rows, key, power)
        axes.set(xlabel=name, ylabel=label)
        for line in axes.lines:
            if line.get_label().partition(":")[0] == "alrao":
                line.set_linewidth(2.5)
        if axes.lines:
            axes.legend(fontsize=8)
        else:
            axes.set_visible(False)
    return figure
