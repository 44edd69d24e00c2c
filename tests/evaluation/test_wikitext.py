import hashlib
import os
from pathlib import Path

import pytest

from modern_llm.data.sources.corpora import wikitext_pages
from modern_llm.evaluation.wikitext import count_words, detokenize

DATA = Path(
    os.environ.get("MODERN_LLM_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
)


def test_detokenize() -> None:
    # lm-evaluation-harness 0.4.13, lm_eval/tasks/wikitext/preprocess_wikitext.py, gave:
    page = (
        " = Robert <unk> = \n \n He 's the dogs ' 3 @,@ 000 , ( see [ it ] ) . "
        '" Hi " ; x : y @-@ z 5 @.@ 2 ! N ? \n = = A = = \n'
    )
    assert detokenize(page) == (
        " = Robert <unk> =\n\nHe's the dogs' 3,000, (see [it]). \"Hi\"; x: y-z 5.2! N?\n== A ==\n"
    )


@pytest.mark.parametrize(
    ("name", "n_pages", "n_words", "n_bytes", "digest"),
    [
        # Counts and the sha256 of the detokenized pages joined by NUL, computed with
        # lm-evaluation-harness 0.4.13's own preprocess_wikitext on these files.
        ("wiki.test.raw", 62, 241335, 1290527, "b0ae50e166add209"),
        ("wiki.valid.raw", 60, 214006, 1146785, "d5bd98ccac4d0ffc"),
        ("wiki.test.tokens", 62, 241335, 1256386, "d3a9f56365df82b5"),
    ],
)
def test_wikitext2(name: str, n_pages: int, n_words: int, n_bytes: int, digest: str) -> None:
    file = DATA / "wikitext2" / name
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    with file.open(encoding="utf-8", newline="\n") as lines:
        found = list(wikitext_pages(lines))
    assert len(found) == n_pages
    assert sum(map(count_words, found)) == n_words
    assert sum(len(page.encode()) for page in found) == n_bytes
    joined = "\0".join(map(detokenize, found)).encode()
    assert hashlib.sha256(joined).hexdigest().startswith(digest)
