import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_run import dump, load

from modern_llm.config import config_sha256
from modern_llm.errors import DataError
from modern_llm.reporting.record import check_run
from modern_llm.training.run_file import write_run_file

Rows = list[dict[str, Any]]


def edit_rows(run: Path, change: Callable[[Rows], Any], stage: str = "sft") -> None:
    path = run / stage / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_result(run: Path, change: Callable[[Any], Any], stage: str = "sft") -> None:
    path = run / stage / "result.json"
    value = load(path)
    change(value)
    dump(path, value)


def edit_run_file(run: Path, change: Callable[[Any], Any], stage: str = "sft") -> None:
    """Write the stage's ``run.json`` as it should be, but for ``change``."""
    folder = run / stage
    summary = load(folder / "result.json")
    write_run_file(folder, config=load(run / "config.json"), summary=summary)
    value = load(folder / "run.json")
    change(value)
    dump(folder / "run.json", value)


def first(rows: Rows, kind: str) -> dict[str, Any]:
    return next(row for row in rows if row["kind"] == kind)


def test_a_good_run_passes(fake: Path) -> None:
    assert check_run(fake) == []


def test_a_good_run_passes_after_a_move_and_with_absolute_paths(fake: Path, tmp_path: Path) -> None:
    for stage in ("pretrain", "sft", "dpo", "verifier"):
        where = str(fake / stage / "final")
        edit_result(fake, lambda v, w=where: v["checkpoint"].update(path=w), stage)
    moved = tmp_path / "elsewhere" / fake.name
    moved.parent.mkdir()
    shutil.move(fake, moved)

    assert check_run(moved) == []


def test_a_run_of_a_version_with_fewer_fields_passes(fake: Path) -> None:
    """Its hash was made of the fields that there were."""
    path = fake / "config.json"
    config = json.loads(path.read_text())
    before = config_sha256(config)
    del config["plugins"]
    after = config_sha256(config)
    assert before != after
    path.write_text(json.dumps(config))
    for file in (*fake.glob("*/metrics.jsonl"), *fake.glob("*/result.json")):
        file.write_text(file.read_text().replace(before, after))
    assert check_run(fake) == []


def test_a_restarted_run_passes(fake: Path) -> None:
    def restart(rows: Rows) -> None:
        stop = {**rows[-1], "status": "signal:SIGTERM", "step": 100}
        rows[60:60] = [stop, {**rows[0], "step": 80, "resumed_from": "step-00000080"}]

    edit_rows(fake, restart)
    edit_result(fake, lambda v: v["provenance"].update(restarts=1))

    assert check_run(fake) == []


def test_a_good_run_file_passes(fake: Path) -> None:
    for stage in ("pretrain", "sft", "dpo", "verifier"):
        edit_run_file(fake, lambda value: None, stage)
    assert check_run(fake) == []


def test_stages_not_run_and_not_finished_are_told_apart(fake: Path) -> None:
    shutil.rmtree(fake / "verifier")
    (fake / "dpo" / "result.json").unlink()

    assert {(p.where, p.rule) for p in check_run(fake)} == {("dpo/result.json", "can be read")}


def drop_stop(run: Path) -> None:
    edit_rows(run, lambda rows: rows.pop())


def stop_by_signal(run: Path) -> None:
    edit_rows(run, lambda rows: rows[-1].update(status="signal:SIGTERM"))


def drop_start(run: Path) -> None:
    edit_rows(run, lambda rows: rows.pop(0))


def go_on_after_stop(run: Path) -> None:
    edit_rows(run, lambda rows: rows.insert(20, {**rows[-1], "step": 20}))


def repeat_step(run: Path) -> None:
    edit_rows(run, lambda rows: rows.insert(5, rows[5]))


def swap_steps(run: Path) -> None:
    def swap(rows: Rows) -> None:
        rows[5], rows[6] = rows[6], rows[5]

    edit_rows(run, swap)


def lose_tokens(run: Path) -> None:
    edit_rows(run, lambda rows: rows[10].update(tokens=1))


def no_step(run: Path) -> None:
    edit_rows(run, lambda rows: first(rows, "eval").pop("step"))


def other_config_in_start(run: Path) -> None:
    edit_rows(run, lambda rows: rows[0].update(config_sha256="e" * 64))


def other_config_in_result(run: Path) -> None:
    edit_result(run, lambda v: v["provenance"].update(config_sha256="e" * 64))


def edited_config(run: Path) -> None:
    value = load(run / "config.json")
    value["seed"] += 1
    dump(run / "config.json", value)


def invalid_config(run: Path) -> None:
    dump(run / "config.json", load(run / "config.json") | {"model": {}})


def no_versions(run: Path) -> None:
    edit_result(run, lambda v: v["provenance"].update(versions={}))


def no_seed(run: Path) -> None:
    edit_rows(run, lambda rows: rows[0].pop("seed"))


def no_data_hash_in_start(run: Path) -> None:
    edit_rows(run, lambda rows: rows[0].pop("data_fingerprint"))


def wrong_resume(run: Path) -> None:
    edit_rows(run, lambda rows: rows[0].update(resumed_from="step-00000004"))


def strange_kind(run: Path) -> None:
    edit_rows(run, lambda rows: rows[2].update(kind="note"))


def lost_loss(run: Path) -> None:
    edit_rows(run, lambda rows: first(rows, "train").update(loss=None))


def no_norm(run: Path) -> None:
    edit_rows(run, lambda rows: first(rows, "train").pop("grad_norm"))


def no_fingerprint(run: Path) -> None:
    edit_result(run, lambda v: v["data"][0].update(fingerprint=""))


def other_steps(run: Path) -> None:
    edit_result(run, lambda v: v["training"].update(steps=201))


def other_tokens(run: Path) -> None:
    edit_result(run, lambda v: v["training"].update(tokens=1))


def restarts_not_in_the_record(run: Path) -> None:
    edit_result(run, lambda v: v["provenance"].update(restarts=3))


def no_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "sft" / "final")


def unnamed_checkpoint(run: Path) -> None:
    edit_result(run, lambda v: v.pop("checkpoint"))


def altered_manifest(run: Path) -> None:
    path = run / "sft" / "final" / "manifest.json"
    path.write_text(path.read_text() + " ")


def broken_manifest(run: Path) -> None:
    (run / "sft" / "final" / "manifest.json").write_text("[]")


def torn_weights(run: Path) -> None:
    (run / "sft" / "final" / "model.safetensors").write_bytes(b"\0" * 63)


def lost_weights(run: Path) -> None:
    (run / "sft" / "final" / "model.safetensors").unlink()


def torn_metrics(run: Path) -> None:
    path = run / "sft" / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])


def no_metrics(run: Path) -> None:
    (run / "sft" / "metrics.jsonl").unlink()


def damaged_result(run: Path) -> None:
    (run / "sft" / "result.json").write_text("{")


def shorter_run_file(run: Path) -> None:
    edit_run_file(run, lambda v: v["iterations"].pop())


def altered_run_file(run: Path) -> None:
    edit_run_file(run, lambda v: v["evaluations"][0].update(loss=0.5))


def run_file_of_another_checkpoint(run: Path) -> None:
    edit_run_file(run, lambda v: v["summary"]["checkpoint"].update(sha256="e" * 64))


def damaged_run_file(run: Path) -> None:
    (run / "sft" / "run.json").write_text("{")


def other_parent(run: Path) -> None:
    edit_result(run, lambda v: v["parent"].update(sha256="e" * 64))


def other_model_evaluated(run: Path) -> None:
    edit_result(run, lambda v: v["models"][1]["checkpoint"].update(sha256="e" * 64), "eval")


@pytest.mark.parametrize(
    ("defect", "rule"),
    [
        (drop_stop, "ends with a stop row"),
        (stop_by_signal, "the last stop is of the finish"),
        (drop_start, "begins with a start row"),
        (go_on_after_stop, "a stop is followed by a start"),
        (repeat_step, "no step twice"),
        (swap_steps, "steps rise"),
        (lose_tokens, "tokens never fall"),
        (no_step, "every row has a step"),
        (other_config_in_start, "the config recorded is that of config.json"),
        (other_config_in_result, "the config recorded is that of config.json"),
        (edited_config, "the config recorded is that of config.json"),
        (invalid_config, "is a config of this version"),
        (no_versions, "provenance is complete"),
        (no_seed, "start rows have seed"),
        (no_data_hash_in_start, "start rows have data_fingerprint"),
        (wrong_resume, "a restart begins at its checkpoint's step"),
        (strange_kind, "rows are of known kinds"),
        (lost_loss, "the loss is a number"),
        (no_norm, "train rows are complete"),
        (no_fingerprint, "every source has a fingerprint"),
        (other_steps, "step equals the last stop row"),
        (other_tokens, "tokens equals the last stop row"),
        (restarts_not_in_the_record, "restarts are in the record"),
        (no_checkpoint, "the checkpoint exists"),
        (unnamed_checkpoint, "names a checkpoint"),
        (altered_manifest, "the checkpoint's manifest has the recorded hash"),
        (broken_manifest, "the manifest lists files"),
        (torn_weights, "has 64 bytes"),
        (lost_weights, "has 64 bytes"),
        (torn_metrics, "can be read"),
        (no_metrics, "holds rows"),
        (damaged_result, "can be read"),
        (shorter_run_file, "has the rows of metrics.jsonl"),
        (altered_run_file, "has the rows of metrics.jsonl"),
        (run_file_of_another_checkpoint, "is of the checkpoint of result.json"),
        (damaged_run_file, "can be read"),
        (other_parent, "starts from this run's pretrain checkpoint"),
        (other_model_evaluated, "evaluates this run's sft checkpoint"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_seeded_defect_is_found(fake: Path, defect: Callable[[Path], None], rule: str) -> None:
    defect(fake)

    problems = check_run(fake)

    assert rule in {p.rule for p in problems}, [str(p) for p in problems]
    assert all(p.where and p.found for p in problems)


@pytest.mark.parametrize(
    ("field", "rule"),
    [
        ("config_sha256", "one config over all restarts"),
        ("data_fingerprint", "one data set over all restarts"),
    ],
)
def test_another_config_or_data_set_after_a_restart(fake: Path, field: str, rule: str) -> None:
    def second_start(rows: Rows) -> None:
        rows.insert(20, {**rows[0], "step": 18, field: "e" * 64})

    edit_rows(fake, second_start)

    assert rule in {p.rule for p in check_run(fake)}


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        check_run(tmp_path)
