"""Reading a run folder, from its files alone.

Any stage may be missing, unfinished or damaged: that is a status and a fault, not an exception.
"""

from dataclasses import replace
from pathlib import Path

from modern_llm.config import STAGES, TRAINED_STAGES
from modern_llm.errors import DataError
from modern_llm.reporting.fields import Fields, read_json, read_rows
from modern_llm.reporting.values import (
    CHOICES,
    Bin,
    Checkpoint,
    DataRow,
    EvalRun,
    Inference,
    ModelEval,
    Point,
    Provenance,
    Reasoning,
    Run,
    Score,
    StageRun,
    Status,
    Training,
)

FORMAT = 1  # of every result.json
POLICIES = ("pretrain", "sft", "dpo")


def read_run(path: Path) -> Run:
    """Read every file of a run folder that a report can use.

    Raises:
        DataError: ``path`` is no folder, or holds neither a config.json nor any stage.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such run folder; give one below experiments/runs")
    if not (path / "config.json").exists() and not any((path / s).is_dir() for s in STAGES):
        raise DataError(
            f"{path} is no run folder: it has neither config.json nor a stage ({', '.join(STAGES)})"
        )
    faults: list[str] = []
    config = read_json(path / "config.json", "config.json", faults)
    environment = read_json(path / "environment.json", "environment.json", faults)
    for fields, name in ((config, "config.json"), (environment, "environment.json")):
        if fields is None:
            faults.append(f"{name} is missing")
    stages = {name: _read_stage(path / name, faults) for name in TRAINED_STAGES}
    evaluation = _of_this_run(_read_eval(path / "eval", faults), stages)
    return Run(
        path=path,
        name=path.resolve().name,
        config=config.raw if config else {},
        environment=environment.raw if environment else {},
        stages=stages,
        evaluation=evaluation,
        faults=tuple(faults),
    )


def _status(result: Fields | None, folder: Path, faults: list[str]) -> Status:
    where = f"{folder.name}/result.json"
    if result is None:
        if not folder.is_dir():
            return "not run"
        faults.append(f"{where} is missing: the {folder.name} stage has not finished")
        return "unfinished"
    if not result:
        if not any(where in fault for fault in faults):
            faults.append(f"{where} is damaged: it is empty")
        return "damaged"
    version = result.raw.get("format")
    if version != FORMAT:
        faults.append(f"{where} is of format {version!r}; this version reads {FORMAT}")
    return "finished" if result.raw.get("status", "finished") == "finished" else "unfinished"


def _read_stage(folder: Path, faults: list[str]) -> StageRun:
    name = folder.name
    result = read_json(folder / "result.json", f"{name}/result.json", faults)
    status = _status(result, folder, faults)
    if status == "not run":
        return StageRun(name, status)
    result = result or Fields({}, f"{name}/result.json: ", faults)
    training, best, model = (
        result.fields("training"),
        result.fields("training").fields("best"),
        result.fields("model"),
    )
    return StageRun(
        name=name,
        status=status,
        training=Training(
            steps=training.integer("steps"),
            tokens=training.integer("tokens"),
            seconds=training.number("seconds"),
            tokens_per_s=training.number("tokens_per_s"),
            mfu=training.number("mfu"),
            epoch_s=training.number("epoch_s"),
            peak_memory_gb=training.number("peak_memory_gb"),
            final_loss=training.number("final_loss"),
            best_step=best.integer("step"),
            best_loss=best.number("loss"),
        ),
        data=tuple(_data_row(row) for row in result.items("data")),
        parent=_checkpoint(result.fields("parent")),
        checkpoint=_checkpoint(result.fields("checkpoint")),
        scores=_scores(result),
        inference=_inference(result.fields("inference")),
        audit=result.fields("audit").raw,
        not_evaluated=_not_evaluated(result),
        params=model.integer("params"),
        active_params=model.integer("active_params"),
        model_bytes=model.integer("bytes"),
        flops_per_token=model.number("flops_per_token"),
        summary=model.text("summary"),
        provenance=_provenance(result.fields("provenance")),
        metrics=tuple(read_rows(folder / "metrics.jsonl", f"{name}/metrics.jsonl", faults)),
        mask_audit=_read_text(folder / "mask_audit.txt", faults),
    )


def _read_text(path: Path, faults: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        faults.append(f"{path.parent.name}/{path.name} cannot be read: {error}")
        return ""


def _read_eval(folder: Path, faults: list[str]) -> EvalRun:
    result = read_json(folder / "result.json", "eval/result.json", faults)
    status = _status(result, folder, faults)
    if result is None or status in ("not run", "damaged"):
        return EvalRun(status)
    return EvalRun(
        status=status,
        models=tuple(
            ModelEval(
                stage=model.text("stage"),
                checkpoint=_checkpoint(model.fields("checkpoint")),
                scores=_scores(model),
                samples=tuple(
                    (s.text("task"), s.text("prompt"), s.text("text"))
                    for s in model.items("samples")
                ),
            )
            for model in result.items("models")
        ),
        reasoning=_reasoning(result.fields("reasoning")),
        baselines=tuple((b.text("name"), _scores(b)) for b in result.items("baselines")),
        not_evaluated=_not_evaluated(result),
        provenance=_provenance(result.fields("provenance")),
    )


def _of_this_run(found: EvalRun, stages: dict[str, StageRun]) -> EvalRun:
    """Leave out the scores of other checkpoints than a run's own, and say what is not scored."""
    if found.status != "finished":
        return found
    foreign = [
        name
        for name, stage in stages.items()
        if stage.checkpoint and found.sha256(name) not in ("", stage.checkpoint.sha256)
    ]
    scored = {model.stage for model in found.models}
    late = [n for n in POLICIES if stages[n].status == "finished" and n not in scored]
    reasons = {
        **dict.fromkeys(foreign, "eval scored another checkpoint than the run has now"),
        **dict.fromkeys(late, "is not among those that eval scored"),
    }
    missing = [
        (f"the {name} checkpoint", f"{why}; run eval again") for name, why in reasons.items()
    ]
    samples = found.reasoning
    return replace(
        found,
        models=tuple(model for model in found.models if model.stage not in foreign),
        reasoning=None if samples and {samples.policy, "verifier"} & set(foreign) else samples,
        not_evaluated=(*found.not_evaluated, *missing),
        foreign=tuple(foreign),
    )


def _data_row(row: Fields) -> DataRow:
    dropped = row.fields("dropped")
    counts = {reason: dropped.integer(reason) or 0 for reason in sorted(dropped.raw)}
    return DataRow(
        source=row.text("source"),
        split=row.text("split"),
        kind=row.text("kind"),
        rows=row.integer("rows"),
        tokens=row.integer("tokens"),
        dropped=counts,
        fingerprint=row.text("fingerprint"),
    )


def _checkpoint(fields: Fields) -> Checkpoint | None:
    if not fields:
        return None
    return Checkpoint(fields.text("path"), fields.text("sha256"), fields.text("stage"))


def _score(fields: Fields) -> Score | None:
    if not fields:
        return None
    return Score(
        key=fields.text("key"),
        metric=fields.text("metric"),
        value=fields.number("value"),
        ci95=fields.interval("ci95"),
        n=fields.integer("n"),
        note=fields.text("note"),
    )


def _scores(fields: Fields) -> tuple[Score, ...]:
    return tuple(score for item in fields.items("scores") if (score := _score(item)))


def _not_evaluated(fields: Fields) -> tuple[tuple[str, str], ...]:
    return tuple((i.text("what"), i.text("why")) for i in fields.items("not_evaluated"))


def _provenance(fields: Fields) -> Provenance:
    return Provenance(
        git_commit=fields.text("git_commit"),
        dirty=fields.flag("dirty"),
        config_sha256=fields.text("config_sha256"),
        seed=fields.integer("seed"),
        versions=fields.fields("versions").raw,
        hardware=fields.fields("hardware").raw,
        started=fields.text("started"),
        ended=fields.text("ended"),
        restarts=fields.integer("restarts"),
    )


def _inference(fields: Fields) -> Inference | None:
    if not fields:
        return None
    return Inference(
        batch_size=fields.integer("batch_size"),
        prompt_tokens=fields.integer("prompt_tokens"),
        new_tokens=fields.integer("new_tokens"),
        precision=fields.text("precision"),
        device=fields.text("device"),
        threads=fields.integer("threads"),
        prefill_tokens_per_s=fields.number("prefill_tokens_per_s"),
        decode_tokens_per_s=fields.number("decode_tokens_per_s"),
        first_token_s=fields.number("first_token_s"),
        token_s=fields.number("token_s"),
    )


def _point(fields: Fields) -> Point | None:
    value, lo, hi = (fields.number(key) for key in ("value", "lo", "hi"))
    if value is None:
        return None
    return Point(value, value if lo is None else lo, value if hi is None else hi)


def _reasoning(fields: Fields) -> Reasoning | None:
    if not fields:
        return None
    curves = fields.fields("curves")
    n = tuple(v for v in curves.list("n") if isinstance(v, int) and not isinstance(v, bool))
    found: dict[str, tuple[Point, ...]] = {}
    for name in CHOICES:
        points = tuple(p for item in curves.items(name) if (p := _point(item)))
        if points and len(points) == len(n):
            found[name] = points
        elif curves.list(name):
            curves.faults.append(f"{curves.where}.{name} does not have one point for each n")
    bins = []
    for item in fields.items("reliability"):
        ends = [item.number(key) for key in ("lo", "hi", "mean_score", "accuracy")]
        lo, hi, mean_score, accuracy = ends
        n_bin = item.integer("n") or 0
        if lo is None or hi is None or mean_score is None or accuracy is None or not n_bin:
            continue  # an empty bin has no mean
        bins.append(Bin(lo, hi, mean_score, accuracy, n_bin, item.interval("ci95")))
    return Reasoning(
        policy=fields.text("policy"),
        n_problems=fields.integer("n_problems"),
        temperature=fields.number("temperature"),
        n=n,
        pass1=_point(curves.fields("pass1")),
        curves=found,
        auroc=_score(fields.fields("auroc")),
        ece=_score(fields.fields("ece")),
        bins=tuple(bins),
        base_rate=fields.number("base_rate"),
        scores=_scores(fields),
        verifier_sha256=fields.text("verifier_sha256"),
    )
