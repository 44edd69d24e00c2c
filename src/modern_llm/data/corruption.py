"""Plausible wrong solutions made from worked ones, in the synthetic and in GSM8K's format."""

import ast
import random
import re
from collections.abc import Callable
from fractions import Fraction

from modern_llm.data.draws import shuffle
from modern_llm.errors import DataError

_NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+)?"
_EQUATION = re.compile(
    r"(?P<lhs>\$?\d[\d,.]*%?(?:\s*[-+*/x]\s*\$?\d[\d,.]*)+)\s*=\s*(?P<rhs>-?\$?\d[\d,]*(?:\.\d+)?)"
)
_FINAL = re.compile(r"####\s*(-?\d[\d,]*(?:\.\d+)?)")
_TOKEN = re.compile(_NUMBER)
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
}
MAX_EXPRESSION_CHARS = 80


def solution_numbers(text: str) -> list[Fraction]:
    """All unsigned numbers of a text in order, commas stripped."""
    return [number for m in _TOKEN.finditer(text) if (number := _number(m.group())) is not None]


def has_final_number(answer: str) -> bool:
    """Whether a worked solution says its result in a line ``#### number``."""
    return _FINAL.search(answer) is not None


def corrupt_solution(answer: str, rng: random.Random) -> str:
    """A wrong worked solution: one step's result is off, and what follows builds on it.

    Args:
        answer: worked steps and a last line ``#### number``; GSM8K's ``<<a*b=c>>`` is understood.
        rng: only its ``getrandbits`` is used.

    Returns:
        Text of the same shape whose final number differs from the right one.

    Raises:
        DataError: there is no final ``#### number``.
    """
    final = _FINAL.search(answer)
    if final is None:
        raise DataError("a solution needs a last line '#### number' to be corrupted")
    right = _number(final.group(1))
    assert right is not None  # the pattern is a number
    steps = [m for m in _EQUATION.finditer(answer) if m.start() < final.start()]
    shuffle(rng, steps)
    for step in steps:
        start = step.start("rhs")
        shown = _number(step.group("rhs").replace("$", ""))
        if shown is None:
            continue
        for slip in _slips(shown, rng):
            # In <<a*b=c>>c the result follows at once and is replaced with the rest of the text.
            rest = _carry(answer[start:], {abs(shown): slip})
            changed = _FINAL.search(rest or "")
            if rest and changed is not None and _number(changed.group(1)) != right:
                return answer[:start] + rest
    # No step leads to the result: the last mention of it is wrong.
    wrong = {abs(right): _slips(right, rng)[0]}
    mentions = [m for m in _TOKEN.finditer(answer, 0, final.start()) if _number(m.group()) == right]
    start = mentions[-1].start() if mentions else final.start(1)
    return answer[:start] + _TOKEN.sub(lambda m: _substituted(m.group(), wrong), answer[start:])


def _slips(value: Fraction, rng: random.Random) -> list[Fraction]:
    """Numbers above 0 that slips would give: off by one, two or ten, or with digits swapped."""
    slips = [size + offset for offset in (1, 2, 10, -1, -2, -10) if (size := abs(value)) > -offset]
    digits = str(abs(value.numerator))
    if value.denominator == 1 and len(digits) > 1 and digits[-1] != digits[-2]:
        swapped = Fraction(int(digits[:-2] + digits[-1] + digits[-2]))
        slips += [swapped] * 2  # as often as being off by one
    shuffle(rng, slips)
    return slips


def _carry(text: str, wrong: dict[Fraction, Fraction]) -> str | None:
    """Rewrite ``text`` with the wrong numbers put in and later steps computed from them.

    Returns ``None`` when a step's result would fall below zero, which gives the slip away.
    """
    out, at = [], 0
    for match in re.finditer(f"{_EQUATION.pattern}|{_NUMBER}", text):
        out.append(text[at : match.start()])
        at = match.end()
        if match.group("lhs") is None:
            out.append(_substituted(match.group(), wrong))
            continue
        lhs = _TOKEN.sub(lambda m: _substituted(m.group(), wrong), match.group("lhs"))
        middle = text[match.end("lhs") : match.start("rhs")]
        rhs = match.group("rhs")
        before, after = _value(match.group("lhs")), _value(lhs)
        shown = _number(rhs.replace("$", ""))
        if after is not None and before is not None and before != after and before == shown:
            if after < 0 <= before:
                return None
            wrong[abs(before)] = abs(after)
            rhs = ("$" if "$" in rhs else "") + _written(after, like=rhs)
        out += [lhs, middle, rhs]
    return "".join([*out, text[at:]])


def _substituted(token: str, wrong: dict[Fraction, Fraction]) -> str:
    value = _number(token)
    if value is None or value not in wrong:
        return token
    return _written(wrong[value], like=token) + ("," if token.endswith(",") else "")


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", "").rstrip("."))
    except ValueError:
        return None


def _written(value: Fraction, *, like: str) -> str:
    """A number in digits: whole, with commas where ``like`` has them, or to two decimals."""
    if value.denominator == 1:
        return f"{int(value):,}" if "," in like.rstrip(",") else str(int(value))
    return f"{float(value):.2f}"


def _value(expression: str) -> Fraction | None:
    """Value of ``a op b ...`` with + - * /, or None when it is anything else."""
    plain = re.sub(r"[$,%]", "", expression).replace("x", "*").strip().rstrip(".")
    if len(plain) > MAX_EXPRESSION_CHARS or not re.fullmatch(r"[\d.\s+\-*/]+", plain):
        return None
    plain = re.sub(r"\b0+(?=\d)", "", plain)  # Python refuses leading zeros
    try:
        return _evaluate(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Div):
            return left / right
        if (operation := _OPERATIONS.get(type(node.op))) is not None:
            return operation(left, right)
    raise ValueError("not a sum, difference, product or quotient")
