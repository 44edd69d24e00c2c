"""Final answers of worked solutions: extraction, grading, and a calculator for their steps.

Nothing here executes text: numbers are parsed as decimals, and the calculator is a recursive
descent parser over ``+ - * / ( )`` with bounds on length and depth.
"""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from modern_llm.errors import DataError

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")  # Cobbe et al. 2021, arXiv:2110.14168
FLEXIBLE = re.compile(r"-?\.?[0-9][0-9.,]*")  # any number; the last one counts
STEP = re.compile(r"<<([^<>=]{1,200})=([^<>=]{1,100})>>")  # calculator annotation of a step

MAX_NUMBER_CHARS = 100
MAX_EXPRESSION_CHARS = 200
MAX_DEPTH = 20
_NUMBER = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")


def parse_number(text: str) -> Decimal | None:
    """Exact value of a number as answers write it: commas and a trailing dot are dropped.

    Returns:
        The value, or ``None`` when it is no number or longer than 100 characters.
    """
    plain = text.replace(",", "").rstrip(".")
    if not plain or len(plain) > MAX_NUMBER_CHARS:
        return None
    try:
        return Decimal(plain)
    except InvalidOperation:
        return None


def extract_answer(text: str, *, flexible: bool = False) -> Decimal | None:
    """The final answer of a solution, or ``None`` when it has none.

    Args:
        text: the solution.
        flexible: take the last number of the text; otherwise only the first ``#### number``.
    """
    if not flexible:
        match = STRICT.search(text)
        return parse_number(match.group(1)) if match else None
    numbers = FLEXIBLE.findall(text)
    return parse_number(numbers[-1]) if numbers else None


def gold_answer(reference: str) -> Decimal:
    """The right answer from a data set's ``... #### 42`` or from a bare number.

    Raises:
        DataError: there is no number in it.
    """
    value = extract_answer(reference)
    if value is None:
        value = extract_answer(reference, flexible=True)
    if value is None:
        raise DataError(f"reference answer without a number: {reference[:80]!r}")
    return value


def grade(text: str, gold: str | Decimal, *, flexible: bool = False) -> bool:
    """Whether the final answer of ``text`` equals the gold answer exactly, as decimals."""
    wanted = gold if isinstance(gold, Decimal) else gold_answer(gold)
    return extract_answer(text, flexible=flexible) == wanted


def calculate(expression: str) -> Fraction | None:
    """Exact value of an arithmetic expression over ``+ - * / ( )`` and decimal numbers.

    Returns:
        The value, or ``None`` for anything else: other characters, powers, division by zero, more
        than 200 characters, or parentheses and signs nested more than 20 deep.
    """
    plain = re.sub(r"[\s,$]", "", expression)
    if not plain or len(plain) > MAX_EXPRESSION_CHARS:
        return None
    try:
        parser = _Parser(plain)
        value = parser.sum(0)
        return value if parser.at == len(plain) else None
    except (ValueError, ZeroDivisionError):
        return None


@dataclass
class _Parser:
    """Recursive descent: sum -> product -> factor; ``at`` is the next character."""

    text: str
    at: int = 0

    def _take(self, symbols: str) -> str:
        symbol = self.text[self.at : self.at + 1]
        if symbol and symbol in symbols:
            self.at += 1
            return symbol
        return ""

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while sign := self._take("+-"):
            term = self.product(depth)
            value = value + term if sign == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while sign := self._take("*/"):
            term = self.factor(depth)
            value = value * term if sign == "*" else value / term
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise ValueError("nested too deep")
        if sign := self._take("+-"):
            value = self.factor(depth + 1)
            return value if sign == "+" else -value
        if self._take("("):
            value = self.sum(depth + 1)
            if not self._take(")"):
                raise ValueError("missing )")
            return value
        match = _NUMBER.match(self.text, self.at)
        if match is None:
            raise ValueError("number expected")
        self.at = match.end()
        return Fraction(match.group().rstrip("."))


def check_steps(text: str) -> tuple[int, int]:
    """How many of a solution's ``<<expression=value>>`` steps are right, and how many there are."""
    steps = STEP.findall(text)
    right = 0
    for expression, stated in steps:
        value, claimed = calculate(expression), calculate(stated)
        right += value is not None and value == claimed
    return right, len(steps)
