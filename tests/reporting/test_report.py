import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_run import COMMIT, HOSTILE, STEPS, dump, load
from markdown_it import MarkdownIt

from modern_llm.errors import DataError, ProtectedPathError
from modern_llm.reporting import report as report_module
from modern_llm.reporting.plots import figures
from modern_llm.reporting.report import (
    assets_folder,
    is_current,
    newest_report,
    report_path,
    write_report,
)
from modern_llm.reporting.values import Run

DRAWN: dict[str, dict[str, bytes]] = {}
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the figures of the same numbers once for all tests here."""

    def remembered(run: Run) -> dict[str, bytes]:
        key = repr(([stage.metrics for stage in run.stages.values()], run.evaluation))
        return DRAWN[key] if key in DRAWN else DRAWN.setdefault(key, figures(run))

    monkeypatch.setattr(report_module, "figures", remembered)


def written(run: Path, folder: Path, **options: str) -> tuple[Path, str]:
    path = write_report(run, folder, **options)  # type: ignore[arg-type]
    assert path is not None
    return path, path.read_text()


def section(text: str, title: str) -> str:
    after = text.split(f"\n{title}\n", 1)[1]
    return re.split(r"\n#{2,3} ", after)[0]


def check_links(path: Path) -> int:
    links = IMAGE.findall(path.read_text())
    for link in links:
        assert not link.startswith(("/", "http")), link
        assert (path.parent / link).read_bytes().startswith(b"\x89PNG"), link
    return len(links)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {str(f): (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


def test_numbers_stand_with_interval_and_count(fake: Path, tmp_path: Path) -> None:
    path, text = written(fake, tmp_path / "report")

    assert path == report_path(fake, tmp_path / "report") == tmp_path / "report/made-up_report.md"
    head = section(text, "## What each stage gained")
    row = next(r for r in head.splitlines() if r.startswith("| sft") and "exact match" in r)
    assert [cell.strip() for cell in row.split("|")[3:7]] == [
        "2.0 % [0.1, 3.9] (n=200)", "62.0 % [60.1, 63.9] (n=200)", "+60.0 points", "better",
    ]  # fmt: skip
    assert "90.5 % [86.5, 94.5] (n=400)" in head and "+35.5 points" in head
    assert "79.0 % [73.0, 85.0] (n=200)" in head and "intervals overlap" in head
    table = section(text, "### Every score by its protocol")
    assert re.search(r"`best_of_8 - majority` +\| +\| +\| +\| \+11.0 points \[\+5.0,", table)
    stages = section(text, "## All stages")
    assert "1,130,000" in stages and "4.40 [4.34, 4.46] (n=51,200)" in stages
    assert "`synthetic.test/ctx128/stride128`" in stages
    assert "AUROC 0.910 [0.898, 0.922] (n=1,600)" in text
    assert check_links(path) == 6


def test_what_was_run_is_told(fake: Path, tmp_path: Path) -> None:
    _, text = written(fake, tmp_path)

    data = section(text, "### Data")
    assert "equal answers: 7, too long: 2" in data and "12,000" in data and "1,234,567" in data
    assert re.search(r"`[0-9a-f]{12}`", data)
    training = section(text, "### Training")
    assert "1.64 M" in training and "1 min 20 s" in training and "20,800" in training
    machine = section(text, "### Hardware and versions")
    assert "Made-up CPU" in machine and "torch 2.10.0" in machine and COMMIT in machine
    assert "numbers &#124; drawn" in text  # the description of the config
    lineage = section(text, "## Lineage of checkpoints")
    for stage in STEPS:
        assert load(fake / stage / "result.json")["checkpoint"]["sha256"] in lineage
    assert lineage.count("| yes ") == 3 and "from nothing" in lineage
    assert "2 + 3 ```<|assistant|>" in section(text, "## Mask audit") or "### sft" in text
    missing = section(text, "## What could not be evaluated, and why")
    assert "gpt2 baseline" in missing and "metric is on the hub: no network" in missing
    how = section(text, "## How to reproduce")
    assert f"git checkout {COMMIT}" in how
    assert "--config experiments/runs/made-up/config.json" in how
    assert "modern-llm report experiments/runs/made-up" in how
    assert "The chosen reward may fall" in text


def test_a_config_is_compared_with_the_preset_of_its_name(fake: Path, tmp_path: Path) -> None:
    from modern_llm.config import get_pipeline_preset, load_config

    same = get_pipeline_preset("local-smoke").model_dump(mode="json")
    dump(fake / "config.json", same)
    assert "Exactly the preset `local-smoke`." in written(fake, tmp_path)[1]
    other = load_config("local-smoke", ["model.n_layers=9", "seed=3", "paths.output=elsewhere"])
    dump(fake / "config.json", other.model_dump(mode="json"))
    told = section(written(fake, tmp_path / "b")[1], "### Configuration")
    assert re.search(rf"`model.n_layers` +\| `{same['model']['n_layers']}` +\| `9`", told)
    assert "`seed`" in told and "paths.output" not in told


def test_samples_cannot_break_the_page(fake: Path, tmp_path: Path) -> None:
    text = written(fake, tmp_path)[1]

    blocks = MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(text)

    html = [b.content for b in blocks if b.type == "html_block"]
    html += [t.content for b in blocks for t in b.children or [] if t.type == "html_inline"]
    assert set(html) <= {"<br>"}
    headings = [blocks[i + 1].content for i, b in enumerate(blocks) if b.type == "heading_open"]
    assert not any("not a heading" in h for h in headings) and "Samples" in headings
    links = [t for b in blocks for t in b.children or [] if t.type == "link_open"]
    assert not links
    samples = section(text, "## Samples")
    assert "<script>" not in samples and "&#60;script&#62;" in samples
    assert f"dpo {HOSTILE[:2]}&#124; b &#96;code&#96;" in samples


def test_missing_pieces_are_named(fake: Path, tmp_path: Path) -> None:
    for name in ("verifier/result.json", "eval/result.json", "environment.json"):
        (fake / name).unlink()
    for file in sorted((fake / "dpo").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (fake / "dpo").rmdir()
    (fake / "sft" / "result.json").write_text('{"format": 1, "stage"')

    path, text = written(fake, tmp_path)

    assert "Finished: pretrain." in text
    assert "verifier (unfinished, at step 160 (finished))" in text
    assert "sft (damaged)" in text and "dpo (not run)" in text
    missing = section(text, "## What could not be evaluated, and why")
    assert "sft/result.json is damaged: not JSON" in missing
    assert "eval/result.json is missing" in missing and "environment.json is missing" in missing
    assert re.search(r"\| dpo +\| the whole stage +\| was not run", missing)
    assert "## Best of n" not in text and "## Samples" not in text
    assert check_links(path) == 2


def test_an_evaluation_of_other_checkpoints_is_told_and_left_out(
    fake: Path, tmp_path: Path
) -> None:
    value = load(fake / "eval" / "result.json")
    value["models"][1]["checkpoint"]["sha256"] = "e" * 64
    del value["models"][0]
    dump(fake / "eval" / "result.json", value)

    path, text = written(fake, tmp_path)

    assert "> **`eval/result.json` is of other checkpoints of sft than this run has now:**" in text
    missing = section(text, "## What could not be evaluated, and why")
    assert "the sft checkpoint | eval scored another checkpoint" in re.sub(" +", " ", missing)
    assert "the pretrain checkpoint | is not among those that eval scored" in re.sub(
        " +", " ", missing
    )
    assert set(load(assets_folder(path) / "scores.json")) == {"dpo", "verifier"}
    assert "62.0 % [60.1" not in text and "sft said so." not in text
    assert "dpo said so." in text


def test_pretraining_is_told_by_the_weights_that_are_handed_on(fake: Path, tmp_path: Path) -> None:
    """Those of the last step, not of the lowest validation loss."""
    log = fake / "pretrain" / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    last["loss"] = 3.125
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))

    head = section(written(fake, tmp_path)[1], "## What each stage gained")

    row = next(r for r in head.splitlines() if r.startswith("| pretrain"))
    assert f"3.125 at step {STEPS['pretrain']}" in row


def test_the_newest_report_is_found_and_known_to_be_current(fake: Path, tmp_path: Path) -> None:
    assert newest_report(fake, tmp_path) is None
    first, _ = written(fake, tmp_path)
    os.utime(first, (1, 1))
    assert newest_report(fake, tmp_path) == first and is_current(first, fake)
    value = load(fake / "eval" / "result.json")
    value["models"][0]["scores"][0]["value"] = 4.0
    dump(fake / "eval" / "result.json", value)
    assert not is_current(first, fake)
    second, _ = written(fake, tmp_path)
    assert newest_report(fake, tmp_path) == second != first and is_current(second, fake)
    (assets_folder(second) / "scores.json").unlink()
    assert not is_current(second, fake)


def test_a_run_that_has_only_a_config(fake: Path, tmp_path: Path) -> None:
    run = tmp_path / "early"
    dump(run / "config.json", load(fake / "config.json"))

    path, text = written(run, tmp_path / "report")

    assert "Finished: nothing." in text and "No stage has two comparable numbers yet" in text
    assert check_links(path) == 0
    assert assets_folder(path).is_dir()


def test_nothing_is_evaluable_when_no_sample_is_right(fake: Path, tmp_path: Path) -> None:
    value = load(fake / "eval" / "result.json")
    value["reasoning"] |= {"curves": None, "base_rate": 0.0}
    dump(fake / "eval" / "result.json", value)

    assert "not evaluable: no sample of any problem is right" in written(fake, tmp_path)[1]


def test_one_right_sample_a_problem_is_no_lack_of_right_ones(fake: Path, tmp_path: Path) -> None:
    value = load(fake / "eval" / "result.json")
    value["reasoning"] |= {"curves": None, "base_rate": 0.42}
    dump(fake / "eval" / "result.json", value)

    text = written(fake, tmp_path)[1]

    assert "42.0 % of all samples are right" in text
    assert "no sample of any problem is right" not in text
    assert "no problem has more than one sample" in text


def test_a_parent_that_is_another_checkpoint_is_shouted(fake: Path, tmp_path: Path) -> None:
    value = load(fake / "dpo" / "result.json")
    value["parent"]["sha256"] = "f" * 64
    dump(fake / "dpo" / "result.json", value)

    assert "**NO: another checkpoint**" in written(fake, tmp_path)[1]


def test_paired_differences_decide_where_there_are_some(fake: Path, tmp_path: Path) -> None:
    head = section(written(fake, tmp_path)[1], "## What each stage gained")

    assert "+11.0 points [+5.0, +17.0] (n=200)" in head and "better (paired)" in head

    value = load(fake / "eval" / "result.json")
    value["reasoning"]["scores"] = []
    dump(fake / "eval" / "result.json", value)
    head = section(written(fake, tmp_path)[1], "## What each stage gained")
    row = next(r for r in head.splitlines() if "before: majority of 8" in r)
    assert "+11.0 points  " in row and "intervals overlap" in row


def test_rebuilding_gives_the_same_bytes(fake: Path, tmp_path: Path) -> None:
    first, text = written(fake, tmp_path / "a")
    second, again = written(fake, tmp_path / "b")

    assert text == again
    files = {f.name: f.read_bytes() for f in assets_folder(first).iterdir()}
    assert files == {f.name: f.read_bytes() for f in assets_folder(second).iterdir()}
    scores = json.loads(files["scores.json"])
    assert scores["sft"][0]["value"] == 4.32


def test_an_existing_report_is_never_touched(fake: Path, tmp_path: Path) -> None:
    first, _ = written(fake, tmp_path)
    before = snapshot(tmp_path)

    second, text = written(fake, tmp_path)
    assert write_report(fake, tmp_path, on_exists="skip") is None

    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
    assert second != first and assets_folder(second) != assets_folder(first)
    assert check_links(second) == 6
    assert all(link.startswith(assets_folder(second).name) for link in IMAGE.findall(text))


def test_skip_writes_where_nothing_stands(fake: Path, tmp_path: Path) -> None:
    path, _ = written(fake, tmp_path, on_exists="skip")

    assert path == report_path(fake, tmp_path) and check_links(path) == 6


def test_replace_keeps_a_backup_of_both(fake: Path, tmp_path: Path) -> None:
    path, old = written(fake, tmp_path / "r")
    value = load(fake / "sft" / "result.json")
    value["not_evaluated"] = []
    dump(fake / "sft" / "result.json", value)

    again, new = written(fake, tmp_path / "r", on_exists="replace")

    assert again == path and new != old and check_links(again) == 6
    backups = sorted(p.name.split(".bak-")[0] for p in (tmp_path / "r").glob("*.bak-*"))
    assert backups == ["made-up_assets", "made-up_report.md"]
    assert next((tmp_path / "r").glob("*.md.bak-*")).read_text() == old


def test_a_replacement_that_fails_leaves_the_old_report(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, old = written(fake, tmp_path / "r")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report_module, "write_bytes", full)
    with pytest.raises(ProtectedPathError, match="No space left"):
        write_report(fake, tmp_path / "r", on_exists="replace")

    assert path.read_text() == old and check_links(path) == 6
    assert not list((tmp_path / "r").glob("*.bak-*"))


def test_a_report_without_its_figures_is_left_alone(fake: Path, tmp_path: Path) -> None:
    report_path(fake, tmp_path / "r").parent.mkdir()
    report_path(fake, tmp_path / "r").write_text("mine")

    path, _ = written(fake, tmp_path / "r")

    assert report_path(fake, tmp_path / "r").read_text() == "mine"
    assert check_links(path) == 6


@pytest.mark.parametrize("policy", ["timestamp", "skip"])
def test_two_processes_at_once(fake: Path, tmp_path: Path, policy: str) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from modern_llm.reporting import report\n"
        "report.figures = lambda run: {'loss.png': b'\\x89PNG', 'dpo.png': b'\\x89PNG'}\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"print(report.write_report(Path({str(fake)!r}), Path({str(tmp_path / 'r')!r}), "
        f"on_exists={policy!r}))"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    outputs = [racer.communicate(timeout=60)[0].strip() for racer in racers]

    assert [racer.returncode for racer in racers] == [0, 0]
    names = {name for name in outputs if name != "None"}
    assert len(names) == (2 if policy == "timestamp" else 1)
    reports = sorted((tmp_path / "r").glob("*_report*.md"))
    assert {str(r) for r in reports} == names
    assert len({assets_folder(r) for r in reports}) == len(reports)
    for report in reports:
        assert check_links(report) == 2
        links = IMAGE.findall(report.read_text())
        assert all(link.startswith(assets_folder(report).name) for link in links)
    assert not list((tmp_path / "r").glob(".tmp-*"))


def test_errors(fake: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder"):
        write_report(tmp_path / "none", tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ProtectedPathError, match="cannot write"):
        write_report(fake, blocked / "report")
    assert os.listdir(tmp_path) and blocked.read_text() == ""
