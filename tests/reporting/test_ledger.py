import json
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from fake_run import COMMIT, dump, load
from rich.console import Console

from modern_llm.errors import ConfigError
from modern_llm.reporting import ledger as module
from modern_llm.reporting.console import print_summary, summary_table
from modern_llm.reporting.ledger import record_scores
from modern_llm.runtime.files import locked


def rows_of(ledger: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in ledger.read_text().splitlines()]


def test_every_score_has_its_row_and_origin(fake: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "results" / "ledger.jsonl"

    assert record_scores(fake, ledger) == 26  # 3 models of 6 scores, 7 of the samples, ECE

    rows = rows_of(ledger)
    row = next(r for r in rows if (r["stage"], r["metric"]) == ("sft", "exact_match"))
    result = load(fake / "sft" / "result.json")
    assert row["value"] == 0.62 and row["n"] == 200 and row["ci95"] == pytest.approx([0.601, 0.639])
    assert row["protocol"] == "synthetic.test/greedy" and row["run"] == "made-up"
    assert row["git_commit"] == row["evaluated_with"] == COMMIT and row["seed"] == 0
    assert row["config_sha256"] == result["provenance"]["config_sha256"]
    assert row["checkpoint_sha256"] == result["checkpoint"]["sha256"]
    assert row["versions"]["torch"] == "2.10.0"  # type: ignore[index]
    assert len(str(row["data_sha256"])) == 64
    assert {r["metric"] for r in rows if r["stage"] == "verifier"} == {
        "auroc", "ece", "best_of_8",
        "best_of_8 - majority", "best_of_8 - most_likely", "best_of_8 - pass@1",
    }  # fmt: skip


def test_rows_are_added_once_and_old_ones_stay(fake: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    record_scores(fake, ledger)
    before = ledger.read_bytes()
    assert record_scores(fake, ledger) == 0
    assert ledger.read_bytes() == before

    value = load(fake / "eval" / "result.json")
    value["models"][0]["scores"][0]["value"] = 4.0
    value["baselines"] = [{"name": "gpt2", "scores": [{"key": "k", "metric": "m", "value": 1}]}]
    dump(fake / "eval" / "result.json", value)

    assert record_scores(fake, ledger) == 2
    assert ledger.read_bytes().startswith(before)
    assert rows_of(ledger)[-1]["stage"] == "baseline:gpt2"


def test_the_scores_of_a_stage_count_without_an_evaluation(fake: Path, tmp_path: Path) -> None:
    (fake / "eval" / "result.json").unlink()
    value = load(fake / "dpo" / "result.json")
    value["scores"] = [{"key": "k", "metric": "preference_accuracy", "value": 0.9, "n": 10}]
    dump(fake / "dpo" / "result.json", value)

    assert record_scores(fake, tmp_path / "ledger.jsonl") == 1


def test_a_number_keeps_the_origin_that_computed_it(fake: Path, tmp_path: Path) -> None:
    """Stage by stage: a stage's own score has its row before eval, and no second one after it."""
    ledger, evaluated = tmp_path / "ledger.jsonl", load(fake / "eval" / "result.json")
    (fake / "eval" / "result.json").unlink()
    own = load(fake / "dpo" / "result.json")
    own["scores"] = [{"key": "k", "metric": "kl", "value": 0.9, "n": 10}]
    own["provenance"] |= {"ended": "2025-06-01T11:00:00+00:00"}
    dump(fake / "dpo" / "result.json", own)
    record_scores(fake, ledger)
    later = {
        "git_commit": "f" * 40, "dirty": True, "seed": 7, "versions": {"torch": "3.0"},
        "ended": "2025-06-02T11:00:00+00:00",
    }  # fmt: skip
    evaluated["provenance"] |= later
    verifier = load(fake / "verifier" / "result.json")["checkpoint"]
    evaluated["reasoning"]["verifier_sha256"] = verifier["sha256"]
    dump(fake / "eval" / "result.json", evaluated)
    record_scores(fake, ledger)

    rows = rows_of(ledger)
    assert len(rows) == 1 + 26
    made = own["checkpoint"]["sha256"]
    (kl,) = (row for row in rows if row["metric"] == "kl")
    assert kl["ended"] == own["provenance"]["ended"] and kl["versions"]["torch"] == "2.10.0"  # type: ignore[index]
    assert kl["evaluated_with"] == kl["git_commit"] == COMMIT and kl["checkpoint_sha256"] == made
    for row in rows:
        if row is not kl:
            assert {key: row[key] for key in later} == {**later, "git_commit": COMMIT}
            assert row["evaluated_with"] == later["git_commit"]
            final = load(fake / str(row["stage"]) / "result.json")["checkpoint"]
            assert row["checkpoint_sha256"] == final["sha256"]


def test_scores_of_a_checkpoint_that_is_no_more_are_left_out(fake: Path, tmp_path: Path) -> None:
    value = load(fake / "eval" / "result.json")
    value["models"][1]["checkpoint"]["sha256"] = "e" * 64
    dump(fake / "eval" / "result.json", value)
    assert record_scores(fake, tmp_path / "one.jsonl") == 20
    assert "sft" not in {row["stage"] for row in rows_of(tmp_path / "one.jsonl")}

    value["reasoning"]["verifier_sha256"] = "d" * 64
    dump(fake / "eval" / "result.json", value)
    assert record_scores(fake, tmp_path / "two.jsonl") == 12  # two models, nothing of the samples


def test_a_checkpoint_from_elsewhere_has_its_own_hash(fake: Path, tmp_path: Path) -> None:
    """``eval --checkpoint`` in a folder without the stage."""
    made = load(fake / "sft" / "result.json")["checkpoint"]["sha256"]
    shutil.rmtree(fake / "sft")
    record_scores(fake, tmp_path / "ledger.jsonl")
    found = {
        r["checkpoint_sha256"] for r in rows_of(tmp_path / "ledger.jsonl") if r["stage"] == "sft"
    }
    assert found == {made}


def test_processes_at_once_lose_no_row(fake: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    runs = [fake]
    for name in ("second", "third"):
        runs.append(Path(shutil.copytree(fake, fake.with_name(name))))
    code = (
        "import sys; from pathlib import Path\n"
        "from modern_llm.reporting.ledger import record_scores\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "record_scores(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code, str(run), str(ledger)],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for run in runs
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout and racer.stdout.readline()
    for racer in racers:
        racer.communicate("go\n", timeout=60)

    assert [racer.returncode for racer in racers] == [0, 0, 0]
    rows = rows_of(ledger)
    assert len(rows) == 78
    assert {r["run"] for r in rows} == {"made-up", "second", "third"}


def test_a_ledger_that_is_held_for_ever(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.1)
    with locked(tmp_path / "l"), pytest.raises(ConfigError, match="in use"):
        record_scores(fake, tmp_path / "l" / "ledger.jsonl")


def shown(run: Path) -> str:
    text = StringIO()
    Console(file=text, width=160).print(summary_table(run))
    return text.getvalue()


def test_the_summary_of_a_run(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(fake)

    assert "run made-up: what each stage gained" in text
    line = next(x for x in text.splitlines() if "exact match" in x and "sft" in x)
    assert "2.0 %" in line and "62.0 %" in line and "+60.0 points" in line and "better" in line
    assert "(n=" not in text
    assert "pretrain: finished in 1 min 20 s, 1.64 M tokens" in text
    print_summary(fake)
    assert capsys.readouterr().out == ""  # results' paths alone go to standard output


def test_the_summary_of_an_unfinished_run(fake: Path) -> None:
    (fake / "eval" / "result.json").unlink()
    (fake / "verifier" / "result.json").unlink()

    text = shown(fake)

    assert "verifier: unfinished, at step 160" in text and "eval: unfinished" in text
