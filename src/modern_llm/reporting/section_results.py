"""Sections of the report that say what came out: gains, scores, curves, samples."""

from collections.abc import Collection

from modern_llm.reporting.gains import HEADS, gains, scored_stages, stage_scores
from modern_llm.reporting.measures import column, written, written_point
from modern_llm.reporting.plots import DPO_CAPTION
from modern_llm.reporting.tables import MISSING, code, escape, fixed, percent, table, whole
from modern_llm.reporting.values import CHOICES, Reasoning, Run, Score

SAMPLE_CHARACTERS = 700  # of one text in the table of samples
STAGE_COLUMNS = (
    ("perplexity", "held-out perplexity"),
    ("bits", "bits per byte"),
    ("strict", "exact match (strict)"),
    ("flexible", "exact match (flexible)"),
    ("preference", "preference accuracy"),
)
ALT = {
    "stages.png": "Scores of every stage with 95 % intervals",
    "loss.png": "Training and validation loss of every stage",
    "training.png": "Learning rate, gradient norm and tokens per second",
    "dpo.png": "Reward margin, pair accuracy and rewards of DPO",
    "best_of_n.png": "Right answers over the samples a problem",
    "calibration.png": "Reliability diagram of the verifier",
}


class Pictures:
    """Links to the figures that there are."""

    def __init__(self, assets: str, names: Collection[str]) -> None:
        self.assets, self.names = assets, names

    def link(self, name: str) -> list[str]:
        """The image as a paragraph; nothing when there is no such figure."""
        return [f"![{ALT[name]}]({self.assets}/{name})"] if name in self.names else []


def headline(run: Run, pictures: Pictures) -> list[str]:
    """What each stage gained, in one table."""
    rows = gains(run)
    if not rows:
        text = "No stage has two comparable numbers yet; see what could not be evaluated."
        return ["## What each stage gained", text]
    note = (
        "Values with their 95 % interval and the count behind it. *Better* and *worse*: the two "
        "intervals lie apart, or that of the paired difference leaves out zero."
    )
    return ["## What each stage gained", table(HEADS, rows), note, *pictures.link("stages.png")]


def stages_table(run: Run) -> list[str]:
    """One row a model: parameters and the main scores, each column by one protocol."""
    names = scored_stages(run)
    baselines = list(run.evaluation.baselines)
    models = [stage_scores(run, name) for name in names] + [list(s) for _, s in baselines]
    if not models:
        return []
    columns = [column(models, measure) for measure, _ in STAGE_COLUMNS]
    rows = []
    for index, name in enumerate([*names, *(name for name, _ in baselines)]):
        params = run.stages[name].params if name in run.stages else None
        cells = [written(cells[index]) for cells in columns]
        rows.append([escape(name), whole(params), *cells])
    protocols = [
        f"{label}: {code(next(c.key for c in cells if c))}"
        for (_, label), cells in zip(STAGE_COLUMNS, columns, strict=True)
        if any(cells)
    ]
    heads = ["model", "parameters", *(label for _, label in STAGE_COLUMNS)]
    return [
        "## All stages",
        table(heads, rows, right="lr"),
        *(["Protocols: " + "; ".join(protocols) + "."] if protocols else []),
    ]


def scores_table(run: Run) -> list[str]:
    """Every score of every model, one row a metric and protocol."""
    names = scored_stages(run)
    models = [stage_scores(run, name) for name in names]
    models += [list(scores) for _, scores in run.evaluation.baselines]
    heads = ["protocol", "metric", *names, *(escape(n) for n, _ in run.evaluation.baselines)]
    found: dict[tuple[str, str], list[Score | None]] = {}
    for index, scores in enumerate(models):
        for score in scores:
            cells = found.setdefault((score.key, score.metric), [None] * len(models))
            cells[index] = score
    if not found:
        return []
    rows = [
        [code(key), code(metric), *(written(cell) if cell else "" for cell in cells)]
        for (key, metric), cells in found.items()
    ]
    notes = {
        f"- {code(s.key)} {code(s.metric)}: {escape(s.note)}"
        for scores in models
        for s in scores
        if s.note
    }
    folded = "<details><summary>How each was measured</summary>"
    detail = [folded, "\n".join(sorted(notes)), "</details>"] if notes else []
    return ["### Every score by its protocol", table(heads, rows), *detail]


def curves(run: Run, pictures: Pictures) -> list[str]:
    """Loss curves, speed, and the panel of DPO."""
    images = [*pictures.link("loss.png"), *pictures.link("training.png")]
    parts = ["## Curves", *images] if images else []
    if pictures.link("dpo.png"):
        parts += ["### DPO", *pictures.link("dpo.png"), DPO_CAPTION]
    return parts


def best_of_n_section(run: Run, pictures: Pictures) -> list[str]:
    """Chart and table of best-of-n, then the calibration of the verifier."""
    reasoning = run.evaluation.reasoning
    if reasoning is None:
        return []
    heat = "" if reasoning.temperature is None else f" at temperature {reasoning.temperature:g}"
    told = (
        f"Policy {code(reasoning.policy)}, {whole(reasoning.n_problems)} problems, samples drawn"
        f"{heat}; {percent(reasoning.base_rate)} of all samples are right (the base rate)."
    )
    return [
        "## Best of n",
        told,
        *pictures.link("best_of_n.png"),
        _curve_table(reasoning),
        "## Calibration of the verifier",
        f"AUROC {written(reasoning.auroc)}; expected calibration error {written(reasoning.ece)}.",
        *pictures.link("calibration.png"),
        *_bin_table(reasoning),
    ]


def _curve_table(reasoning: Reasoning) -> str:
    if reasoning.base_rate == 0:
        return "Best of n is not evaluable: no sample of any problem is right."
    if not reasoning.curves:
        return "There is nothing to choose among: no problem has more than one sample."
    names = [name for name in CHOICES if name in reasoning.curves]
    first = written_point(reasoning.pass1, reasoning.n_problems)
    rows = [
        [str(n), first if n == 1 else "",
         *(written_point(reasoning.curves[name][i], reasoning.n_problems) for name in names)]
        for i, n in enumerate(reasoning.n)
    ]  # fmt: skip
    return table(["n", "pass@1", *(CHOICES[name] for name in names)], rows, right="r")


def _bin_table(reasoning: Reasoning) -> list[str]:
    if not reasoning.bins:
        return ["No reliability bins were recorded."]
    rows = [
        [f"{b.lo:.1f} to {b.hi:.1f}", fixed(b.mean_score), percent(b.accuracy), whole(b.n)]
        for b in reasoning.bins
    ]
    return [table(["score", "mean score", "share right", "samples"], rows, right="lrrr")]


def samples(run: Run) -> list[str]:
    """What every stage answers to the same prompts, side by side, as literal text."""
    models = [model for model in run.evaluation.models if model.samples]
    if not models:
        return []
    prompts = list(dict.fromkeys((s[0], s[1]) for model in models for s in model.samples))
    answers = [{(task, prompt): text for task, prompt, text in m.samples} for m in models]
    rows = [
        [
            escape(task),
            escape(prompt, limit=SAMPLE_CHARACTERS),
            *(
                escape(a[task, prompt], limit=SAMPLE_CHARACTERS) if (task, prompt) in a else MISSING
                for a in answers
            ),
        ]
        for task, prompt in prompts
    ]
    heads = ["task", "prompt", *(escape(model.stage) for model in models)]
    return ["## Samples", "Not chosen: the prompts of the config, in order.", table(heads, rows)]
