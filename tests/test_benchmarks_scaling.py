"""`python benchmarks scaling`. Protects:

- the command from end to end on two ranks, its records and that it takes them up again; the figures, by hand;
- the arithmetic of large models: one sum by hand, and that docs/distributed.md has the table that it makes.
"""

import json
from pathlib import Path

import benchmarks_package
import pytest
import torch.distributed as dist

benchmarks_package.load()

DOCS = Path(__file__).parent.parent / "docs" / "distributed.md"


def test_figures():
    from benchmarks.scaling.cases import CASES
    from benchmarks.scaling.command import table, values, verdict

    found = {
        ("torch, DDP", 1): [1.0, 2.0, 4.0],
        ("Alrao, DDP", 1): [1.1, 2.0, 4.4],
        ("torch, DDP", 2): [2.0, 2.0, 2.0],
        ("Alrao, DDP", 2): [2.0, 2.02, 2.2],
        ("Alrao, clones over ranks", 1): [1.0, 1.0, 1.0],
        ("Alrao, clones over ranks", 2): [0.5, 0.5, 1.0],
    }
    records = values(found, CASES["tiny"])
    assert records["Alrao, DDP", 1]["overhead"] == pytest.approx(0.1)
    assert records["Alrao, DDP", 2]["overhead"] == pytest.approx(0.01)
    # Of as many samples a rank; clones over ranks see one batch.
    assert records["torch, DDP", 2]["efficiency"] == 1.0
    assert records["torch, DDP", 2]["sequences"] == 4
    assert records["Alrao, clones over ranks", 2]["efficiency"] == 1.0
    assert records["Alrao, clones over ranks", 2]["sequences"] == 2
    lines = verdict("tiny", records)
    assert "on 1: +10.0% of torch's step, above" in lines[0] and "within" in lines[1]
    assert len(lines) == 2 and len(table("tiny", 10, records).rows) == 6


def test_command(tmp_path, monkeypatch, capsys):
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    from benchmarks.scaling import command
    from benchmarks.scaling.cases import SCHEMES

    arguments = ["--networks", "tiny", "--ranks", "1", "2", "--rounds", "3", "--clones", "3"]
    arguments += ["--block", "0.01", "--results", str(tmp_path)]
    command.main(arguments)
    records = [json.loads(line) for line in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert [(r["case"]["scheme"], r["case"]["ranks"]) for r in records] == [
        (scheme, ranks) for ranks in (1, 2) for scheme in SCHEMES
    ]
    for record in records:
        seconds = record["seconds"]
        assert 0 < seconds["lower"] <= seconds["median"] <= seconds["upper"]
        assert record["rounds"] == 3 and record["efficiency"] > 0 and record["overhead"] > -1
    first = capsys.readouterr().out
    monkeypatch.setattr(command, "measure", None)
    command.main(arguments)
    assert capsys.readouterr().out == first


def test_arithmetic():
    from benchmarks.scaling.arithmetic import Model, ddp, fastest, fsdp

    # 12 * 2 * 10^6 parameters and 10 clones of 50,000 classes by 1,000 features: 524 million.
    model = Model(layers=2, features=1000)
    cost = ddp(model, 64)
    activations, rates = 2 * 8192 * 1000 * 2, 4 * (24_000 + 10)
    assert cost.memory == 12 * 524e6 + activations + rates
    assert cost.between == 2 * 2 * 524e6 * 63 / 64 and cost.within == 0
    assert cost.operations == 8 * 524e6 * 8192
    assert cost.seconds == cost.between / 50e9 + cost.operations / 400e12
    # Sharded: a 64th of it, and the head as a whole with its gradient while it is computed.
    assert fsdp(model, 64).memory == 12 * 524e6 / 64 + 4 * 500e6 + activations + rates
    assert fsdp(model, 64).between == 3 * 2 * 524e6 * 63 / 64
    # 10^11 parameters do not fit into eight times 80 GB.
    assert fastest(Model(layers=80, features=10240), 8) is None


def test_docs_have_the_table():
    from benchmarks.scaling.arithmetic import table

    assert table().markdown().split("\n\n", 1)[1] in DOCS.read_text()
