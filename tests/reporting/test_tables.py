import pytest
from fake_run import HOSTILE
from markdown_it import MarkdownIt

from modern_llm.reporting.measures import (
    change,
    column,
    measure_of,
    verdict,
    verdict_of_difference,
    written,
)
from modern_llm.reporting.tables import (
    code,
    duration,
    escape,
    fence,
    percent,
    plain,
    short,
    table,
    whole,
)
from modern_llm.reporting.values import Score

GFM = MarkdownIt("gfm-like", {"linkify": False, "html": True})
NASTY = [
    HOSTILE,
    "<img src=x onerror=alert(1)>",
    "</td></table><b>",
    "| | |\n| --- |\n```\nopen fence",
    "**bold** _it_ ~~no~~ $x^2$ \\| \\\\",
    "[a]: http://evil.example\n\n[a] ![p](http://evil.example/p.png) <http://evil.example>",
    "&lt;b&gt; &#124; &amp;",
    "bell \x07 esc \x1b[31m zero\x00 rtl \u202e end",
    "",
]


def inline(text: str, kind: str = "text") -> str:
    tokens = [t for block in GFM.parse(text) for t in block.children or []]
    return "".join(t.content for t in tokens if t.type == kind)


@pytest.mark.parametrize("text", NASTY)
def test_escaped_text_stays_one_literal_cell(text: str) -> None:
    source = table(["a", "b"], [[escape(text), "end"]])

    blocks = GFM.parse(source)

    types = [block.type for block in blocks]
    assert types.count("td_open") == 2 and types.count("tr_open") == 2
    assert "html_block" not in types and "fence" not in types
    cells = [b.children or [] for b in blocks if b.type == "inline"][2]
    markup = {c.type for c in cells} - {"text", "text_special", "html_inline"}
    assert not markup, markup
    html = [c.content for c in cells if c.type == "html_inline"]
    assert set(html) <= {"<br>"} and len(html) == text.count("\n")
    shown = "".join(c.content for c in cells if c.type.startswith("text"))
    wanted = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text if c != "\n")
    assert shown == wanted


def test_escape_cuts_and_says_so() -> None:
    assert escape("abcdef", limit=3) == "abc [...]"
    assert escape("abc", limit=3) == "abc"
    assert plain(escape("a | b\n<c>")) == "a | b <c>"


@pytest.mark.parametrize("text", [*NASTY, "`````", "~~~\n```python"])
def test_a_fence_is_one_block_whatever_it_holds(text: str) -> None:
    blocks = GFM.parse(f"before\n\n{fence(text)}\n\nafter")

    assert [b.type for b in blocks if b.type != "inline"] == [
        "paragraph_open", "paragraph_close", "fence", "paragraph_open", "paragraph_close",
    ]  # fmt: skip


def test_code_never_leaves_its_span() -> None:
    assert code("a`b|c\nd") == "`a b c d`"
    assert code("") == "n/a"


def test_columns_line_up() -> None:
    lines = table(["name", "n"], [["a", "1"], ["longer", "1,000"]], right="lr").splitlines()

    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| ------ | ----: |"
    assert lines[2] == "| a      |     1 |"


def test_numbers_as_people_read_them() -> None:
    assert [short(v) for v in (999, 999_999, 1_234_567, 2.5e9, None)] == [
        "999", "1 M", "1.23 M", "2.5 G", "n/a",
    ]  # fmt: skip
    assert [duration(v) for v in (0.25, 59.6, 185, 7800, None)] == [
        "0.2 s", "1 min 0 s", "3 min 5 s", "2 h 10 min", "n/a",
    ]  # fmt: skip
    assert (whole(1234567), percent(0.6204), percent(None)) == ("1,234,567", "62.0 %", "n/a")


def test_scores_are_written_with_interval_and_count() -> None:
    exact = Score("k", "exact_match", 0.62, (0.551, 0.684), 200)
    assert written(exact) == "62.0 % [55.1, 68.4] (n=200)"
    assert written(Score("k", "token_perplexity", 29.412, None, 51200)) == "29.41 (n=51,200)"
    assert written(Score("k", "bits_per_byte", 0.9123, (0.9, 0.92))) == "0.912 [0.900, 0.920]"
    gain = Score("k", "best_of_8 - majority", 0.11, (0.04, 0.18), 200)
    assert written(gain) == "+11.0 points [+4.0, +18.0] (n=200)"
    assert written(Score("k", "exact_match", None)) == "n/a" == written(None)


@pytest.mark.parametrize(
    ("metric", "key", "name"),
    [
        ("exact_match", "gsm8k.test/greedy", "strict"),
        ("exact_match_flexible", "gsm8k.test/greedy", "flexible"),
        ("exact_match", "gsm8k.test/flexible", "flexible"),
        ("bits_per_byte", "gsm8k.test/gold", "gold_bits"),
        ("bits_per_byte", "wikitext2.test/ctx256", "bits"),
        ("word_perplexity", "w", "word_perplexity"),
        ("token_perplexity", "w", "perplexity"),
        ("preference_accuracy", "p", "preference"),
        ("preference_accuracy_per_token", "p", "per_token"),
        ("implicit_reward_accuracy", "p", "implicit"),
        ("implicit_reward_accuracy - longer_answer_baseline", "p", "difference"),
        ("longer_answer_baseline", "p", "longer"),
        ("pass@8", "p", "fraction"),
        ("rouge1", "r", "other"),
    ],
)
def test_families_of_metrics(metric: str, key: str, name: str) -> None:
    assert measure_of(Score(key, metric, 0.5)).name == name


def test_a_column_keeps_to_one_protocol() -> None:
    a256, a512 = (Score(k, "token_perplexity", v) for k, v in (("w/256", 4.0), ("w/512", 3.0)))
    b512 = Score("w/512", "token_perplexity", 2.5)

    assert column([[a256, a512], [b512]], "perplexity") == [a512, b512]
    assert column([[a256], []], "strict") == [None, None]


def test_change_and_verdict() -> None:
    low = Score("k", "exact_match", 0.1, (0.05, 0.2), 100)
    high = Score("k", "exact_match", 0.5, (0.4, 0.6), 100)
    assert change(low, high) == "+40.0 points"
    assert (verdict(low, high), verdict(high, low)) == ("better", "worse")
    assert verdict(low, Score("k", "exact_match", 0.15, (0.1, 0.3))) == "intervals overlap"
    ppl = [Score("k", "token_perplexity", v, (v - 0.1, v + 0.1)) for v in (4.0, 5.0)]
    assert (change(*ppl), verdict(*ppl)) == ("+1.00 (+25.0 %)", "worse")
    assert verdict(Score("k", "loss", 2.0), Score("k", "loss", 1.0)) == "better, no interval"
    assert verdict(Score("k", "loss", 1.0), Score("k", "loss", 1.0)) == "not better, no interval"
    assert change(Score("k", "loss", None), ppl[0]) == "n/a" == verdict(ppl[0], Score("k", "x", 1))
    paired = [Score("k", "a - b", 0.1, ci) for ci in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), None)]
    assert [verdict_of_difference(s) for s in paired] == [
        "better", "worse", "not distinguishable", "n/a",
    ]  # fmt: skip
