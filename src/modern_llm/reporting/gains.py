"""What each stage gained: before and after, by one protocol, with intervals."""

from modern_llm.reporting.measures import (
    change,
    column,
    of_measure,
    verdict,
    verdict_of_difference,
    written,
    written_point,
)
from modern_llm.reporting.tables import MISSING, escape
from modern_llm.reporting.values import Point, Reasoning, Run, Score

HEADS = ("stage", "measure", "before", "after", "change", "reading")
COMPARED = (  # stage, the stage before, measure
    ("sft", "pretrain", "strict"),
    ("sft", "pretrain", "perplexity"),
    ("dpo", "sft", "preference"),
    ("dpo", "sft", "strict"),
    ("dpo", "sft", "perplexity"),
)
LABELS = {
    "strict": "exact match (strict)",
    "perplexity": "token perplexity",
    "preference": "preference accuracy",
}


def stage_scores(run: Run, stage: str) -> list[Score]:
    """Scores of a stage's model: those of the eval stage, then the stage's own."""
    own = run.stages[stage].scores if stage in run.stages else ()
    return _first_of_each([*evaluated_scores(run, stage), *own])


def evaluated_scores(run: Run, stage: str) -> list[Score]:
    """Scores of a stage's model that the eval stage computed."""
    found = [s for model in run.evaluation.models if model.stage == stage for s in model.scores]
    return _first_of_each([*found, *_reasoning_scores(run.evaluation.reasoning, stage)])


def _first_of_each(scores: list[Score]) -> list[Score]:
    return list({(s.metric, s.key): s for s in reversed(scores)}.values())[::-1]


def _reasoning_scores(reasoning: Reasoning | None, stage: str) -> list[Score]:
    """What the samples say: of the verifier where it chose or scored, else of the policy."""
    if reasoning is None:
        return []
    scores = [*reasoning.scores, *(s for s in (reasoning.auroc, reasoning.ece) if s)]
    chosen = ("best_of", "auroc", "ece")
    return [
        score
        for score in scores
        if stage == ("verifier" if score.metric.startswith(chosen) else reasoning.policy)
    ]


def scored_stages(run: Run) -> list[str]:
    """Stages whose model has scores, trained stages first and in order."""
    names = dict.fromkeys([*run.stages, *(model.stage for model in run.evaluation.models)])
    return [name for name in names if stage_scores(run, name)]


def gains(run: Run) -> list[list[str]]:
    """Rows of the headline table (`HEADS`); what has no numbers has no row."""
    rows = _pretrain_rows(run)
    for stage, before, measure in COMPARED:
        old, new = column([stage_scores(run, before), stage_scores(run, stage)], measure)
        if old and new:
            changed = change(old, new), verdict(old, new)
            rows.append([stage, LABELS[measure], written(old), written(new), *changed])
    implicit = of_measure(stage_scores(run, "dpo"), "implicit")
    longer = of_measure(stage_scores(run, "dpo"), "longer")
    if implicit:
        old = longer[0] if longer else None
        paired = _difference(run, "implicit_reward_accuracy - longer")
        rows.append(
            ["dpo", "implicit-reward accuracy; before: the longer answer", written(old),
             written(implicit[0]), *_told(paired)]
        )  # fmt: skip
    return rows + (_verifier_rows(run, run.evaluation.reasoning))


def _pretrain_rows(run: Run) -> list[list[str]]:
    evals = [
        (row["step"], float(row["loss"]))
        for row in run.stages["pretrain"].rows("eval")
        if isinstance(row.get("loss"), int | float) and isinstance(row.get("step"), int)
    ]
    if len(evals) < 2:
        return []
    first, last = evals[0], evals[-1]  # the weights of the last step are handed on
    old, new = (Score("", "validation_loss", loss) for _, loss in (first, last))
    return [
        [
            "pretrain",
            "validation loss (nats per token)",
            f"{first[1]:.3f} at step {first[0]}",
            f"{last[1]:.3f} at step {last[0]}",
            change(old, new),
            verdict(old, new),
        ]
    ]


def _difference(run: Run, begins: str) -> Score | None:
    scores = [s for stage in scored_stages(run) for s in stage_scores(run, stage)]
    return next((s for s in scores if s.metric.startswith(begins)), None)


def _told(paired: Score | None) -> tuple[str, str]:
    if paired is None:
        return MISSING, MISSING
    return written(paired), f"{verdict_of_difference(paired)} (paired)"


def _verifier_rows(run: Run, reasoning: Reasoning | None) -> list[list[str]]:
    if reasoning is None or "verifier" not in reasoning.curves:
        return []
    n = reasoning.n[-1]
    best = reasoning.curves["verifier"][-1]
    others = {"majority": f"majority of {n}", "most_likely": f"the most likely of {n}"}
    rows = []
    for name, label in {"pass@1": "pass@1", **others}.items():
        point = reasoning.pass1 if name == "pass@1" else reasoning.curves.get(name, (None,))[-1]
        if point is None:
            continue
        told = _told(_difference(run, f"best_of_{n} - {name}"))
        if told[0] == MISSING:
            told = _unpaired(point, best)
        count = reasoning.n_problems
        measure = f"best of {n} by verifier; before: {label}"
        before, after = written_point(point, count), written_point(best, count)
        rows.append(["verifier", escape(measure), before, after, *told])
    return rows


def _unpaired(before: Point, after: Point) -> tuple[str, str]:
    old, new = (Score("", "accuracy", p.value, (p.lo, p.hi)) for p in (before, after))
    sign = "better" if after.value > before.value else "worse"
    overlap = before.lo <= after.hi and after.lo <= before.hi
    return change(old, new), "intervals overlap" if overlap else sign
