"""Typed values of mathematical answers, parsed by the rules in docs/eval.md. Imports no sympy and starts no process."""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise


def _first_names(table: str) -> dict[str, str]:
    """Return the first name of each entry by all its names. Semicolons and line ends separate entries."""
    return {name: names.split()[0] for names in re.split("[;\n]", table) for name in names.split()}


UNITS = _first_names("""cm centimeter centimeters; mm millimeter millimeters; km kilometer kilometers; m meter meters
in inch inches; ft foot feet; yd yard yards; mi mile miles; kg kilogram kilograms; g gram grams; lb lbs pound pounds £
s sec second seconds; min minute minutes; h hr hrs hour hours; day days; week weeks; month months; degree degrees; mph
year years yr old; dollar dollars USD $; cent cents; euro euros €; rad radians; percent; L liters; mL; J; kJ; N; V; W
Hz; Pa; mol; per""") | {"unit": "", "units": ""}
NUMBER_WORDS = {name: Fraction(value) for name, value in _first_names("""12 dozen; 1e2 hundred; 1e3 thousand
1e6 million; 1e9 billion; 1/2 half halves; 1/3 third thirds; 1/4 quarter quarters; 1/5 fifth fifths; 1/10 tenth tenths
1/100 hundredth hundredths""").items() if name.isalpha()}  # fmt: skip
BASES = _first_names("2 two; 3 three; 4 four; 5 five; 6 six; 7 seven; 8 eight; 9 nine; 10 ten")
COMMANDS = _first_names(r"""≤ le leq leqslant; ≥ ge geq geqslant; < lt; > gt; ( langle; ) rangle; ⦃ lbrace; ⦄ rbrace
⦃⦄ emptyset varnothing; \frac dfrac tfrac cfrac; \binom dbinom tbinom; ~ quad qquad
\text textbf textit textrm mbox mathrm operatorname
\! left right big Big bigg Bigg bigl bigr displaystyle large bf mathbf mathsf mathit bm boldsymbol underline boxed""")
SYMBOL_NAMES = r"- - \times \cdot / \pi \infty ≤ ≥ \ne \pm \cup ^\circ \theta \sqrt ( )"
SYMBOLS = dict(zip("−–×·÷π∞≤≥≠±∪°θ√⟨⟩", SYMBOL_NAMES.split(), strict=True))
FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp"
END = "(?![a-zA-Z])"
LINE_BREAK = r"\\\\(?:\s*\[[^\]]*\])?"
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"(?<![\d.,])\d{1,3}(?:(?:\\[ ,;]|~| )\d{3})+(?!\d)", lambda m: re.sub(r"\D", "", m[0])),
    (r"(?<!\\)\\([{}])", lambda m: "⦃⦄"["{}".index(m[1])]),
    (r"(?<!\\)\\([a-zA-Z]+)", lambda m: COMMANDS.get(m[1], m[0])),
    (r"(?<=\d)(?:,\s*\\!\s*|\{,\})(?=\d{3})|\\!|\\textcolor\s*\{\w+\}", ""),
    (r"\\mathbb\s*\{?R\}?", r"(-\\infty,\\infty)"),
    (r"(\\\$|€|£|^\$(?=[^$]*$))\s*([\d.,]*\d)", lambda m: rf"{m[2]}\text{{ {UNITS[m[1][-1]]}}}"),
    (r"\$|\\(?=%)", ""),
    (r"\\text\s*\{\s*([^a-zA-Z{}]*|[^\WmgshLJNVW\d_])\s*\}", r"\1"),  # a letter that is no unit is a variable
    (r"\\text\s*\{\s*(\d[\d.,]*)\s+([a-zA-Z ]+)\}", r"\1\\text{ \2}"),
    (rf"(?<![\\a-zA-Z])(?:np\.)?(sqrt|frac|{FUNCTIONS}){END}", r"\\\1"),
    (r"\\(sin|cos|tan|cot|sec|csc)\s*\(?(\d+)\)?\s*\^\s*\{?\s*\\circ\s*\}?", r"\\\1(\\frac{\2\\pi}{180})"),
    (rf"\^\s*(?:\\circ|\{{\s*\\circ\s*\}})\s*(?:C{END})?|\\degrees?{END}", r"\\text{ degrees}"),
    (r"%", r"\\text{ percent}"),
    (r",?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s*(?<![a-zA-Z])(?:and|or)(?! *[a-zA-Z]{4})(?![a-zA-Z])|,\s*,", ", "),
    (r"(?<!\\)\\[ ,;:]|~", " "),
    (r"\s*\(?(?:\\text\s*\{ *)?\(?\\?p?mod\W.*$", ""),
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}", lambda m: _repeating_decimal(*m.groups())),
    (r"(\d*)\.(\d*?)(\d+?)\3+(?:\.\.\.|\\l?dots)$", lambda m: _repeating_decimal(*m.groups())),
    (r"^[(\[]?\s*\\begin\s*\{([pb]?matrix|array)\}(?:\{[clr|]+\})?([^&]*)\\end\s*\{\1\}\s*[)\]]?$",
     lambda m: "(" + re.sub(LINE_BREAK, ",", m[2].strip().removesuffix(r"\\")) + ")"),
    (r"\s+", " "),
    (r"(?<!\.) ?[.:,] ?$", ""),  # three periods remain
)]  # fmt: skip
NAME = r"(?:\\?[a-zA-Z]+|\{\\?[a-zA-Z]+\})'*(?:_(?:\w|\{[^{}]*\}))?(?:\([a-z0-9]\))?"
NAMES_PATTERN = re.compile(rf"\s*(?:{NAME}|\(\s*{NAME}(?:\s*,\s*{NAME})+\s*\))\s*")
PREFIX_PATTERN = re.compile(  # "=", membership, or the name of a point
    rf"\s*(?:=|\\approx{END}|{NAMES_PATTERN.pattern}\\in{END}\s*(?=[(\[⦃\\])|[A-Z]\s*(?=\([^()]*,[^()]*\)$))"
)
GROUPED_DIGITS_PATTERN = re.compile(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])")
CHOICE_PATTERN = re.compile(r"(?:\\text\s*\{\s*)?(?:\(([A-Z])\)|([A-Z])\)).*|\\text\s*\{\s*([A-Z])\s*\}")
DIGITS_PATTERN = re.compile(r"\(?(\d[\dA-F]*)\)?\s*_\s*\{?\s*(?:\\text\s*\{\s*)?(?:base )?(\w+)\s*\}?\s*\}?")
TIME_OR_RATIO_PATTERN = re.compile(r"\d+ ?: ?\d+(?: ?[a-zA-Z.]+)?|\d+(?:'+|\^\{?\\prime\}?)|\d+ ?[ap]\.? ?m\.?")
WORDS_PATTERN = re.compile(r"(?:(?:an?|the) )?([a-zA-Z]{2,}(?:[ -][a-zA-Z]+)*)")
SET_BUILDER_PATTERN = re.compile(r"⦃\s*[a-z]\s*(?::|\||\\mid)(.+)⦄")
FLIPPED_SIGNS = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
DECIMAL = r"(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})"
FRACTION_PATTERN = re.compile(r"\s*\\frac\s*(?:\{\s*(-?[\d.]+)\s*\}|(\d))\s*(?:\{\s*([\d.]+)\s*\}|(\d))", re.ASCII)
NUMBER_PATTERN = re.compile(
    rf"([+-]?)\s*\(?(?:(\d{{1,400}})\s+(?=.*/))?(-?{DECIMAL})(?:(?:[eE]|\s*\\(?:cdot|times)\s*10\s*\^\s*\{{?)([+-]?\d{{1,3}})\}}?)?"
    rf"(?:\s*/\s*({DECIMAL}))?\)?", re.ASCII
)  # fmt: skip
UNIT_TEXT = r"(?:[a-zA-Z$€£]|/|\\cdot|\s|\^\s*\{?\s*-?\d\s*\}?)*"
UNIT_PATTERN = re.compile(
    rf"(.*?[\d.)}}a-zA-Z])((?:\s*(?:/|\\cdot)?\s*\\text\s*\{{{UNIT_TEXT}\}}(?:\^\s*\{{?-?\d\}}?)?)+|(?<=[\d}}])\s+{UNIT_TEXT})"
)


@dataclass(frozen=True)
class MathValue:
    """A typed value.

    kind: "number", "expression", "equation", "words", "label" (a choice, digits with a base, a time, a ratio), "list",
    "set", "union", or the two brackets of a tuple or an interval. name: a unit, or the variables with these values.
    """

    kind: str
    content: "Fraction | str | tuple[MathValue, ...]"
    name: str = ""

    @property
    def latex(self) -> str:
        value = self.content
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}" if isinstance(value, Fraction) else str(value)


def clean(text: str) -> str:
    """Return the answer in one notation: Unicode as LaTeX, without spacing and font commands."""
    text = "".join(map(_latex_of_character, text))
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text.strip()


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


def parse_answer(text: str, *, is_grouped: bool = True) -> MathValue:
    """Parse a cleaned answer. is_grouped: 1,234 is one number and not a list of two."""
    if prefix := PREFIX_PATTERN.match(text):
        text = text[prefix.end() :].strip()
    if is_grouped and "," not in GROUPED_DIGITS_PATTERN.sub("", text):
        text = GROUPED_DIGITS_PATTERN.sub(lambda match: match[0].replace(",", ""), text)
    if (
        value := _parse_words(text) or _parse_inequality(text) or _parse_list(text) or _parse_bracketed(text)
    ) is not None:
        return value
    return MathValue("equation", text) if len(split_equation(text)) > 1 else _parse_quantity(text)


def split_equation(text: str) -> list[str]:
    """Return the sides of an equation, with a name first. An approximation after an exact value is left out."""
    exact, _, approximation = text.partition(r"\approx")
    text = exact.strip() if approximation and not NAMES_PATTERN.fullmatch(exact) else text
    sides = _split(text, rf"=|\\approx{END}")
    is_name_last = NAMES_PATTERN.fullmatch(sides[-1]) and not re.search("[a-zA-Z]", sides[0])  # 5 = x
    return sides[::-1] if is_name_last else sides


def _parse_words(text: str) -> MathValue | None:
    if choice := CHOICE_PATTERN.fullmatch(text):
        return MathValue("label", choice[1] or choice[2] or choice[3])
    if digits := DIGITS_PATTERN.fullmatch(text):
        return MathValue("label", f"{digits[1]}_{BASES.get(digits[2], digits[2])}")
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
    if TIME_OR_RATIO_PATTERN.fullmatch(plain):
        return MathValue("label", plain.replace(" ", ""))
    is_product = "text" not in text and " " not in plain and len(plain) <= 4
    words = None if is_product else WORDS_PATTERN.fullmatch(plain)
    return MathValue("words", words[1].casefold()) if words else None


def _parse_inequality(text: str) -> MathValue | None:
    """Return the interval that an inequality in one variable describes, or None."""
    builder = SET_BUILDER_PATTERN.fullmatch(text)
    terms = [term.strip() for term in re.split("([<>≤≥])", builder[1] if builder else text)]
    if len(terms) == 3 and re.fullmatch("[a-zA-Z]", terms[2]):
        terms = [terms[2], FLIPPED_SIGNS[terms[1]], terms[0]]
    if len(terms) == 3 and terms[1] in "<≤":
        absolute = re.fullmatch(r"\|(.)\|", terms[0])
        low, name = (f"-({terms[2]})", absolute[1]) if absolute else (r"-\infty", terms[0])
        terms = [low, terms[1] if absolute else "<", name, terms[1], terms[2]]
    elif len(terms) == 3:
        terms = [terms[2], FLIPPED_SIGNS[terms[1]], terms[0], "<", r"\infty"]
    if len(terms) != 5 or not {terms[1], terms[3]} <= {*"<≤"} or not re.fullmatch("[a-zA-Z]", terms[2]):
        return None
    brackets = "(["[terms[1] == "≤"] + ")]"[terms[3] == "≤"]
    return MathValue(brackets, (parse_answer(terms[0]), parse_answer(terms[4])), terms[2])


def _parse_list(text: str) -> MathValue | None:
    """Return a union or a list; assignments to different names are a tuple in the order of the names."""
    if len(members := _split(text, rf"\\cup{END}")) > 1:
        return MathValue("union", tuple(map(parse_answer, members)))
    if len(parts := _split_list(text)) < 2:
        return None
    sides = [split_equation(part) for part in parts]
    names = [first.strip() if rest and NAMES_PATTERN.fullmatch(first) else "" for first, *rest in sides]
    values = [parse_answer(side[-1] if name else part) for side, name, part in zip(sides, names, parts, strict=True)]
    if not all(names) or len({*names}) < len(names):
        return MathValue("list", tuple(values))
    by_name = dict(sorted(zip(names, values, strict=True)))
    return MathValue("()", tuple(by_name.values()), ",".join(by_name))


def _parse_bracketed(text: str) -> MathValue | None:
    depths = _depths(text)
    if not re.fullmatch(r"[⦃{(\[].*[⦄})\]]", text) or depths[-1] or 0 in depths[1:-1]:
        return None
    parts, brackets = _split_list(text[1:-1]), text[0] + text[-1]
    if len(parts) == 1 and brackets in ("()", "{}"):
        return parse_answer(parts[0])
    if brackets in ("⦃⦄", "{}"):
        return MathValue("set", tuple(parse_answer(part) for part in parts if part))
    return MathValue(brackets, tuple(map(parse_answer, parts))) if len(parts) > 1 else None


def _parse_quantity(text: str) -> MathValue:
    """Return a number or an expression with its unit, or the whole text as an expression if it has unknown words."""
    match, (unit, scale) = UNIT_PATTERN.fullmatch(text), ("", Fraction(1))
    for token in _unit_tokens(match[2]) if match else []:
        if token in NUMBER_WORDS:
            scale *= NUMBER_WORDS[token]
        elif token in UNITS or token[0] in "/^":
            unit += " " + UNITS.get(token, token)
        else:
            match, unit, scale = None, "", Fraction(1)
            break
    latex = match[1].strip() if match else text
    number = _parse_number(latex)
    if number is None:
        return MathValue("expression", text if scale != 1 else latex, unit.strip())
    return MathValue("number", number * scale, unit.strip())


def _unit_tokens(text: str) -> list[str]:
    text = re.sub(r"\\(?:text|cdot)|[{}]", " ", text)
    text = re.sub(r"\b(square|cubic) (\w+)", lambda m: f"{m[2]}^{2 if m[1] == 'square' else 3}", text)
    return [token.replace(" ", "") for token in re.findall(r"[/$€£]|[a-zA-Z]+|\^ *-?\d", text)]


def _parse_number(text: str) -> Fraction | None:
    """Return the exact value of an integer, decimal, ratio or mixed number of up to 400 digits, or None."""
    text = FRACTION_PATTERN.sub(r" \1\2/\3\4", text).strip()
    if not (match := NUMBER_PATTERN.fullmatch(text)) or text.count("(") != text.count(")"):
        return None
    sign, whole, numerator, power, denominator = match.groups()
    if (whole and numerator.startswith("-")) or not Fraction(denominator or 1):
        return None
    value = Fraction(numerator) * Fraction(10) ** int(power or 0) / Fraction(denominator or 1) + int(whole or 0)
    return -value if sign == "-" else value


def _depths(text: str) -> list[int]:
    """Return the number of open brackets before each character and at the end."""
    depths = [0]
    for char in text:
        depths.append(depths[-1] + (char in "([{⦃") - (char in ")]}⦄"))
    return depths


def _split(text: str, pattern: str) -> list[str]:
    """Split at the matches of the pattern outside brackets."""
    depths = _depths(text)
    cuts = [(0, 0), *((m.start(), m.end()) for m in re.finditer(pattern, text) if depths[m.start()] == 0)]
    return [text[a[1] : b[0]].strip() for a, b in pairwise([*cuts, (len(text), len(text))])]


def _split_list(text: str) -> list[str]:
    """Split at commas and semicolons; `a \\pm b` is two values."""
    values: list[str] = []
    for part in _split(text, "[,;]"):
        before, *after = re.split(rf"\\pm{END}", part)
        is_pair = len(after) == 1 and part[:1] not in "⦃(["
        values += [before + sign + after[0] for sign in "+-"] if is_pair else [part]
    return values
