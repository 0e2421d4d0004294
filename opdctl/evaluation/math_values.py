"""Typed values of mathematical answers, read by the rules in docs/eval.md. Imports no sympy and starts no process."""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

LATEX_SYMBOLS = r"- - \times \cdot / \pi \infty ≤ ≥ \ne \pm \cup ^\circ \theta \sqrt"
SYMBOLS = dict(zip("−–×·÷π∞≤≥≠±∪°θ√", LATEX_SYMBOLS.split(), strict=True))
UNIT_NAMES = """cm centimeter centimeters; mm millimeter millimeters; km kilometer kilometers; m meter meters
inch in inches; foot ft feet; yard yd yards; mile mi miles; kg kilogram kilograms; g gram grams; lb lbs pound pounds
s sec second seconds; min minute minutes; h hr hrs hour hours; day days; week weeks; month months; yr yrs year years
liter L liters litre; mL; dollar USD dollars; cent cents; euro EUR euros; degree degrees; celsius; rad radian radians
old; percent; mph; J; kJ; N; V; W; Hz; Pa; mol; per"""
UNITS = {name: names.split()[0] for names in re.split("[;\n]", UNIT_NAMES) for name in names.split()}
UNITS |= {"unit": "", "units": ""}
NUMBER_WORDS = {"hundred": Fraction(100), "thousand": Fraction(1000), "million": Fraction(10**6), "dozen": Fraction(12)}
NUMBER_WORDS |= {"billion": Fraction(10**9), "trillion": Fraction(10**12)}
NUMBER_WORDS |= {"half": Fraction(1, 2), "halves": Fraction(1, 2)} | {
    name + ending: Fraction(1, parts)
    for name, parts in {"third": 3, "quarter": 4, "fifth": 5, "tenth": 10, "hundredth": 100, "thousandth": 1000}.items()
    for ending in ("", "s")
}
BASE_NAMES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BASES = {name: str(base) for base, name in enumerate(BASE_NAMES, 2)}
FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp"
ONE_LETTER_UNITS = "".join(name for name in UNITS if len(name) == 1)

END = "(?![a-zA-Z])"
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"(?<=\d)(?:,\s*\\!\s*|\{,\})(?=\d{3})", ""),
    (rf"\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle|large|bf){END}|\\textcolor\s*\{{\w+\}}", ""),
    (rf"\\lbrace{END}", r"\\{"),
    (rf"\\rbrace{END}", r"\\}"),
    (rf"\\langle{END}|⟨", "("),
    (rf"\\rangle{END}|⟩", ")"),
    (rf"\\l(?:eq?|eqslant){END}", "≤"),
    (rf"\\g(?:eq?|eqslant){END}", "≥"),
    (rf"\\(lt|gt){END}", lambda m: "<" if m[1] == "lt" else ">"),
    (rf"\\(?:emptyset|varnothing){END}", r"\\{\\}"),
    (r"\\mathbb\s*\{?R\}?", r"(-\\infty,\\infty)"),
    (rf"\\[dtc](frac|binom){END}", r"\\\1"),
    (r"\\(?:math(?:bf|sf|it)|bm|boldsymbol|underline|boxed)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1"),
    (rf"\\(?:operatorname|text|mathrm)\s*\{{\s*({FUNCTIONS})\s*\}}", r"\\\1"),
    (r"\\(?:text(?:bf|it|rm)?|mbox|mathrm|operatorname)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"\\text{\1}"),
    (rf"\\text\{{\s*([^a-zA-Z{{}}]*|[^\W{ONE_LETTER_UNITS}\d_])\s*\}}", r"\1"),
    (r"\\text\{\s*(\d[\d.,]*)\s+([a-zA-Z ]+)\}", r"\1\\text{ \2}"),
    (r"\\text\{\s*(squared|cubed|factorial)\s*\}", lambda m: {"s": "^2", "c": "^3", "f": "!"}[m[1][0]]),
    (r"\\\$|^\$(?=[^$]*$)", "¤"),
    (r"\$|\\(?=%)", ""),
    (r"\{\s*([^{}]+?)\s*\\over\s+([^{}]+?)\s*\}", r"\\frac{\1}{\2}"),
    (r"\{\s*([^{}]+?)\s*\\choose\s+([^{}]+?)\s*\}", r"\\binom{\1}{\2}"),
    (r"\\sqrt\s*(\w+)", r"\\sqrt{\1}"),
    (rf"(?<![\\a-zA-Z])(?:np\.)?(sqrt|frac|{FUNCTIONS}){END}", r"\\\1"),
    (rf"\^\s*(?:\\circ|\{{\s*\\circ\s*\}})\s*(?:\\text\{{\s*C\s*\}}|C{END})", r"\\text{ celsius}"),
    (r"\\(sin|cos|tan|cot|sec|csc)\s*\(?(\d+)\)?\s*\^\s*\{?\s*\\circ\s*\}?", r"\\\1(\\frac{\2\\pi}{180})"),
    (rf"\^\s*(?:\\circ{END}|\{{\s*\\circ\s*\}})|\\degrees?{END}", r"\\text{ degrees}"),
    (r"%", r"\\text{ percent}"),
    (r",?\s*\\text\{\s*,?\s*(?:and|or)\s*\}|,?\s*(?<![a-zA-Z])(?:and|or)(?! *[a-zA-Z]{4})(?![a-zA-Z])|,\s*,", ", "),
    (rf"\\q?quad{END}|(?<!\\)\\[ ,;:]|~", " "),
    (r"\s*(?:\\text\{ *)?\(?(?:approximately|prime|(?:\\text\{ *)?\\?p?mod\W.*)\)?\}?$", ""),
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}", lambda m: _repeating_decimal(*m.groups())),
    (r"(\d*)\.(\d*?)(\d+?)\3+(?:\.\.\.|\\l?dots)$", lambda m: _repeating_decimal(*m.groups())),
    (r"\s+", " "),
)]  # fmt: skip
SPACED_DIGITS_PATTERN = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[ ,;]|~| )\d{3})+(?!\d)")
GROUPED_DIGITS_PATTERN = re.compile(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])")
CHOICE_PATTERN = re.compile(r"(?:\\text\{\s*)?(?:\(([A-Z])\)|([A-Z])\))\s*\}?(?:\s*\S.*)?|(?:\\text\{)?([A-Z])\}?")
DIGITS_PATTERN = re.compile(r"\(?(\d[\dA-F]*)\)?\s*_\s*\{?\s*(?:\\text\{\s*)?(?:base )?(\w+)\s*\}?\s*\}?")
WORDS_PATTERN = re.compile(r"[a-zA-Z]{2,}(?:[ -][a-zA-Z]+)*")
TIME_OR_RATIO_PATTERN = re.compile(r"\d+ ?: ?\d+(?: ?[a-zA-Z.]+)?|\d+(?:'+|\^\{?\\prime\}?)|\d+ ?[ap]\.? ?m\.?")
NAME = r"\\?[a-zA-Z]+'*(?:_(?:\w|\{[^{}]*\}))?(?:\([a-z0-9]\))?"
NAMES_PATTERN = re.compile(rf"\s*(?:{NAME}|\(\s*{NAME}(?:\s*,\s*{NAME})+\s*\))\s*")
MEMBERSHIP = rf"{NAMES_PATTERN.pattern}\\in{END}\s*(?=[(\[\\])"
POINT = r"[A-Z]\s*(?=\([^()]*,[^()]*\)$)"
PREFIX_PATTERN = re.compile(rf"^\s*(?:=|\\approx{END}|{MEMBERSHIP}|{POINT})")
SET_BUILDER_PATTERN = re.compile(r"\\\{\s*[a-z]\s*(?::|\||\\mid)(.+)\\\}")
MATRIX_PATTERN = re.compile(
    r"[(\[]?\s*\\begin\s*\{([pbv]?matrix|array)\}(?:\{[clr|]+\})?(.*)\\end\s*\{\1\}\s*[)\]]?", re.DOTALL
)
BETWEEN_PATTERN = re.compile(r"([^<>≤≥=]+)([<≤])\s*([a-zA-Z])\s*([<≤])([^<>≤≥=]+)")
BOUND_PATTERN = re.compile(r"([^<>≤≥=,]+)([<>≤≥])([^<>≤≥=,]+)")
FLIPPED_SIGN = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
DECIMAL = r"(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})"
NUMBER_PATTERN = re.compile(
    rf"([+-]?)\s*\(?(?:({DECIMAL})(?:(?:[eE]|\s*\\(?:cdot|times)\s*10\s*\^\s*\{{?)([+-]?\d{{1,3}})\}}?)?"
    rf"|(?:(\d{{1,400}})(?:\s*(?=\\)|\s+))?(?:\\frac\s*(?:\{{\s*(-?{DECIMAL})\s*\}}|(\d))\s*(?:\{{\s*({DECIMAL})\s*\}}|(\d))"
    rf"|({DECIMAL})\s*/\s*({DECIMAL})))\)?",
    re.ASCII,
)  # fmt: skip
UNIT_TEXT = r"(?:[a-zA-Z]|/|\\cdot|\\,|~|\s|\^\s*\{?\s*-?\d\s*\}?)*"
UNIT_PATTERN = re.compile(
    rf"(.*[\d.)}}a-zA-Z])((?:\s*(?:/|\\cdot)?\s*\\text\s*\{{{UNIT_TEXT}\}}(?:\^\s*\{{?-?\d\}}?)?)+|(?<=[\d}}])\s+{UNIT_TEXT})"
)


@dataclass(frozen=True)
class Quantity:
    """A number or the LaTeX of an expression, with its unit ("" without one)."""

    value: Fraction | str
    unit: str = ""

    @property
    def latex(self) -> str:
        value = self.value
        return value if isinstance(value, str) else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


@dataclass(frozen=True)
class Words:
    """Words, a choice letter, a time, a ratio, digits with a base. is_certain: not a product of variables."""

    text: str
    is_certain: bool = True


@dataclass(frozen=True)
class Group:
    """Several values.

    kind: "" a list, "{}" a set, the two brackets of a tuple or an interval, "union", or "matrix" and its rows.
    name: the variable of an inequality, or the variables of a tuple's assignments.
    """

    items: "tuple[MathValue, ...]"
    kind: str = ""
    name: str = ""


@dataclass(frozen=True)
class Relation:
    """Sides joined by "=", and the LaTeX of the whole. name: the first side if it is a name, else ""."""

    sides: "tuple[MathValue, ...]"
    latex: str
    name: str


MathValue = Quantity | Words | Group | Relation


def clean(text: str) -> str:
    """Return the answer in one notation: Unicode as LaTeX, without spacing and font commands."""
    text = SPACED_DIGITS_PATTERN.sub(lambda match: re.sub(r"\D", "", match[0]), "".join(map(_latex_of_character, text)))
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return re.sub(r"(?<!\.) ?[.:,] ?$", "", text).strip()  # three periods remain


def _latex_of_character(char: str) -> str:
    """Return ½ as a fraction, ² as a power, ₈ as a subscript and a full-width character as its ASCII form."""
    if char in SYMBOLS:
        return SYMBOLS[char] + " " * SYMBOLS[char][-1].isalpha()
    tag, plain = unicodedata.decomposition(char).partition(" ")[0], unicodedata.normalize("NFKC", char)
    if tag == "<fraction>" and plain[-1] != "⁄":
        return r"\frac{{{}}}{{{}}}".format(*plain.split("⁄"))
    return {"<super>": f"^{{{plain}}}", "<sub>": f"_{{{plain}}}", "<wide>": plain}.get(tag, char)


def _repeating_decimal(integer: str, prefix: str, period: str) -> str:
    """Return a repeating decimal as a fraction: 0.1\\overline{6} is (16 - 1) / 90."""
    numerator = int(integer + prefix + period) - int((integer + prefix) or 0)
    return rf"\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(prefix)}}}"


def parse_answer(text: str, *, grouped: bool = True) -> MathValue:
    """Parse a cleaned answer. grouped: 1,234 is one number and not a list of two."""
    text = PREFIX_PATTERN.sub("", text, count=1).strip()
    if grouped and "," not in GROUPED_DIGITS_PATTERN.sub("", text):
        text = GROUPED_DIGITS_PATTERN.sub(lambda match: match[0].replace(",", ""), text)
    if (value := _parse_words(text) or _parse_matrix(text) or _parse_inequality(text)) is not None:
        return value
    if len(members := _split(text, rf"\\cup{END}")) > 1:
        return Group(tuple(map(parse_answer, members)), "union")
    if len(parts := _split_list(text)) > 1:
        return _list_of([parse_answer(part) for part in parts])
    if (bracketed := _parse_bracketed(text)) is not None:
        return bracketed
    exact, _, approximation = text.partition(r"\approx")
    text = exact.strip() if approximation and not NAMES_PATTERN.fullmatch(exact) else text
    if len(sides := _split(text, rf"=|\\approx{END}")) > 1:
        if NAMES_PATTERN.fullmatch(sides[-1]) and not re.search("[a-zA-Z]", sides[0]):  # 5 = x
            sides = sides[::-1]
        name = sides[0].strip() if NAMES_PATTERN.fullmatch(sides[0]) else ""
        return Relation(tuple(map(parse_answer, sides)), text, name)
    return _parse_quantity(text)


def _parse_words(text: str) -> Words | None:
    if choice := CHOICE_PATTERN.fullmatch(text):
        return Words(choice[1] or choice[2] or choice[3], is_certain=not choice[3] or "text" in text)
    if digits := DIGITS_PATTERN.fullmatch(text):
        return Words(f"{digits[1]}_{BASES.get(digits[2], digits[2])}")
    plain = re.sub(r"^(?:an?|the) |\s+$", "", re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip())
    if WORDS_PATTERN.fullmatch(plain):
        return Words(plain, is_certain="text" in text or " " in plain or len(plain) > 4)
    return Words(plain.replace(" ", "")) if TIME_OR_RATIO_PATTERN.fullmatch(plain) else None


def _parse_matrix(text: str) -> Group | None:
    """Return a row or a column as a tuple, another matrix with the number of its rows."""
    if not (match := MATRIX_PATTERN.fullmatch(text)):
        return None
    lines = [line for line in re.split(r"\\\\(?:\s*\[[^\]]*\])?", match[2]) if line.strip()]
    rows = [[parse_answer(cell) for cell in line.split("&")] for line in lines]
    is_vector = len(rows) == 1 or all(len(row) == 1 for row in rows)
    return Group(tuple(cell for row in rows for cell in row), "()" if is_vector else f"matrix {len(rows)}")


def _parse_inequality(text: str) -> Group | None:
    """Return the interval that an inequality in one variable describes, or None."""
    if builder := SET_BUILDER_PATTERN.fullmatch(text):
        return _parse_inequality(builder[1].strip())
    if match := BETWEEN_PATTERN.fullmatch(text):
        low, first, name, second, high = match.groups()
        return Group((parse_answer(low), parse_answer(high)), "(["[first == "≤"] + ")]"[second == "≤"], name)
    if not (match := BOUND_PATTERN.fullmatch(text)):
        return None
    name, sign, bound = (part.strip() for part in match.groups())
    if re.fullmatch("[a-zA-Z]", bound) and not re.fullmatch("[a-zA-Z]", name):
        name, sign, bound = bound, FLIPPED_SIGN[sign], name
    is_closed, infinity = sign in "≤≥", r"\infty"
    if absolute := re.fullmatch(r"\|([a-zA-Z])\|", name):
        items = (parse_answer(f"-({bound})"), parse_answer(bound))
        return Group(items, ("()", "[]")[is_closed], absolute[1]) if sign in "<≤" else None
    if not re.fullmatch("[a-zA-Z]", name):
        return None
    if sign in "<≤":
        return Group((Quantity("-" + infinity), parse_answer(bound)), "(" + ")]"[is_closed], name)
    return Group((parse_answer(bound), Quantity(infinity)), "(["[is_closed] + ")", name)


def _parse_bracketed(text: str) -> MathValue | None:
    for opening, closing in ((r"\{", r"\}"), ("{", "}"), *((a, b) for a in "([" for b in ")]")):
        start, end, depths = len(opening), len(text) - len(closing), _depths(text)
        if (
            not (text.startswith(opening) and text.endswith(closing))
            or min(depths[start : end + 1], default=0) < 1
            or depths[-1]
        ):
            continue
        parts = _split_list(text[start:end])
        if "{" in opening:
            return Group(tuple(parse_answer(part) for part in parts if part), "{}")
        if len(parts) > 1:
            return Group(tuple(map(parse_answer, parts)), opening + closing)
        return parse_answer(parts[0]) if opening + closing == "()" else None
    return None


def _list_of(values: list[MathValue]) -> Group:
    """Return a list; inequalities are a union, and values of different variables are a tuple in alphabetical order."""
    names = [value.name if isinstance(value, Relation | Group) else "" for value in values]
    if all(isinstance(value, Group) and value.name for value in values) and len({*names}) == 1:
        return Group(tuple(values), "union")
    assigned = [value.sides[-1] if isinstance(value, Relation) and value.name else value for value in values]
    if all(names) and len({*names}) == len(names):
        by_name = dict(zip(names, assigned, strict=True))
        return Group(tuple(by_name[name] for name in sorted(names)), "()", ",".join(sorted(names)))
    return Group(tuple(assigned))


def _parse_quantity(text: str) -> Quantity:
    if currency := re.match(r"([+-]?)\s*([¤€£])\s*", text):
        value = _parse_quantity(currency[1] + text[currency.end() :])
        return Quantity(value.value, value.unit or {"¤": "dollar", "€": "euro", "£": "lb"}[currency[2]])
    if match := UNIT_PATTERN.fullmatch(text):
        words = re.sub(r"\\(?:text|,|cdot)|[{}~]", " ", match[2])
        words = re.sub(r"\b(square|cubic) (\w+)", lambda m: f"{m[2]}^{2 if m[1] == 'square' else 3}", words)
        tokens = re.findall(r"/|[a-zA-Z]+|\^ *-?\d", words)
        scales = [NUMBER_WORDS[token] for token in tokens if token in NUMBER_WORDS]
        units = [token for token in tokens if token not in NUMBER_WORDS]
        number = _parse_number(match[1])
        if all(token in UNITS for token in units if token.isalpha()) and (not scales or number is not None):
            unit = " ".join(UNITS.get(token, token.replace(" ", "")) for token in units)
            scaled = match[1].strip() if number is None else number * (scales[0] if scales else 1)
            return Quantity(scaled, unit if any(map(UNITS.get, units)) else "")
    number = _parse_number(text)
    return Quantity(text if number is None else number)


def _parse_number(text: str) -> Fraction | None:
    """Return the exact value of an integer, decimal, ratio or mixed number of up to 400 digits, or None."""
    if not (match := NUMBER_PATTERN.fullmatch(text.strip())) or text.count("(") != text.count(")"):
        return None
    sign, decimal, power, whole, *ratio = match.groups()
    if decimal:
        value = Fraction(decimal) * Fraction(10) ** int(power or 0)
    else:
        numerator, denominator = (Fraction(part) for part in ratio if part is not None)
        if not denominator or (whole and numerator < 0):
            return None
        value = numerator / denominator + int(whole or 0)
    return -value if sign == "-" else value


def _depths(text: str) -> list[int]:
    """Return the number of open brackets before each character and at the end. `\\{` is a bracket like the others."""
    depths = [0]
    for char in text:
        depths.append(depths[-1] + (char in "([{") - (char in ")]}"))
    return depths


def _split(text: str, pattern: str) -> list[str]:
    """Split at the matches of the pattern outside brackets."""
    depths = _depths(text)
    cuts = [(0, 0), *((m.start(), m.end()) for m in re.finditer(pattern, text) if depths[m.start()] == 0)]
    return [text[a[1] : b[0]].strip() for a, b in pairwise([*cuts, (len(text), len(text))])]


def _split_list(text: str) -> list[str]:
    """Split at commas and semicolons; `a \\pm b` is two values."""
    values = []
    for part in _split(text, "[,;]"):
        signs = [*re.finditer(rf"\\pm{END}", part)] if not part.startswith((r"\{", "(", "[")) else []
        start, end = signs[0].span() if len(signs) == 1 else (len(part), len(part))
        values += [part[:start] + sign + part[end:] for sign in "+-"] if start < end else [part]
    return values
