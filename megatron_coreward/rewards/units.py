r"""What may follow a value without changing it: units, plain nouns, ordinals. And what may not: every other word.

A unit is fixed by the question, so `12\text{ cm}` is 12; but two answers that both name a unit have the same one.
Letters are a unit only as words: in a text macro, or after a space with more than one letter (`3cm` and `3 m` are
products). Words that change a value (at most, below zero, tenths, north) are no units, because only the units of
`UNITS`, plural nouns and the words before them are.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

Dimension = tuple[tuple[str, int], ...]  # units with their powers, in alphabetical order; () for a noun


@dataclass(frozen=True, slots=True)
class Unit:
    dimension: Dimension = ()
    factor: Fraction = Fraction(1)  # "3 million dollars"

    def agrees(self, other: "Unit") -> bool:
        """Whether two values may be the same in these units: one unit at most is named, or both are the same."""
        return not self.dimension or not other.dimension or self.dimension == other.dimension


NO_UNIT = Unit()


def _spellings(*lines: str) -> dict[str, str]:
    """Every spelling of a unit to the first of its line."""
    return {spelling: line.split()[0] for line in lines for spelling in line.split()}


UNITS = _spellings(
    "m meter meters metre metres",
    "um micrometer micrometers micron microns",
    "mm millimeter millimeters millimetre millimetres",
    "cm centimeter centimeters centimetre centimetres",
    "dm decimeter decimeters decimetre decimetres",
    "km kilometer kilometers kilometre kilometres kms",
    "in inch inches",
    "ft foot feet",
    "yd yard yards yds",
    "mi mile miles",
    "g gram grams gm gms",
    "mg milligram milligrams",
    "kg kilogram kilograms kgs",
    "t ton tons tonne tonnes",
    "lb lbs pound pounds",
    "oz ounce ounces",
    "L l liter liters litre litres",
    "mL ml milliliter milliliters millilitre millilitres",
    "gal gallon gallons",
    "s sec secs second seconds",
    "ms millisecond milliseconds",
    "min mins minute minutes",
    "h hr hrs hour hours",
    "day days",
    "week weeks",
    "month months",
    "year years yr yrs",
    "N newton newtons",
    "J joule joules",
    "kJ",
    "W watt watts",
    "kW kilowatt kilowatts",
    "V volt volts",
    "A amp amps ampere amperes",
    "K kelvin kelvins",
    "Pa pascal pascals",
    "kPa",
    "Hz hertz",
    "kHz",
    "MHz",
    "eV",
    "mol mole moles",
    "ohm ohms",
    "kohm",
    "cal calorie calories",
    "kcal",
    "acre acres",
    "ha hectare hectares",
    "deg degree degrees",
    "degC celsius",
    "degF fahrenheit",
    "rad radian radians",
    "percent percents percentage %",
    "dollar dollars USD usd",
    "cent cents ¢",
    "euro euros EUR",
    "pound_sterling GBP",
    "rupee rupees Rs rs INR",
    "yuan RMB CNY",
    "yen JPY",
    "unit units",
    "point points pt pts",
    "kWh",
    "time times",
    "MW megawatt megawatts",
    "mA",
    "kV",
    "dB decibel decibels",
    "rpm",
    "bpm",
    "kB KB",
    "MB megabyte megabytes",
    "GB gigabyte gigabytes",
    "TB terabyte terabytes",
    "bit bits",
    "byte bytes",
)
_COMPOUND: dict[str, Dimension] = {
    **dict.fromkeys(("mph",), (("h", -1), ("mi", 1))),
    **dict.fromkeys(("kmh", "kph"), (("h", -1), ("km", 1))),
}
_ABSTRACT = frozenset({"unit"})  # names a size but no measure: "square units" agrees with cm^2
_SINGLE_LETTERS = frozenset("mgsLNJWV")  # in a text macro
_IRREGULAR = frozenset(
    [
        "people",
        "men",
        "women",
        "children",
        "feet",
        "teeth",
        "geese",
        "mice",
        "oxen",
        "sheep",
        "fish",
        "deer",
        "dice",
        "cattle",
    ]
)
_NUMERALS = (
    "half|halve|quarter|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|[a-z]+teenth|[a-z]+tieth|"
    "hundredth|thousandth|millionth|billionth|ten|hundred|thousand|million|billion|trillion|dozen|score|gross|lakh|"
    "crore|myriad|time"
)
# Words that look like nouns or stand before them and change what the number says.
_CHANGING = re.compile(
    rf"(?:{_NUMERALS})s?|more|less|fewer|most|least|greater|smaller|larger|at|or|and|above|below|under|over|before|after|"
    "late|early|later|earlier|left|right|up|down|north|south|east|west|[a-z]+wards?|ago|plus|minus|not|no|non|only|if|"
    "for|when|unless|except|without|mod|modulo|base|remainder|squared|cubed|factorial|negative|positive|clockwise|"
    "counterclockwise|anticlockwise|"
    "almost|about|approximately|than|every|each|all|some|any|zero|is|are|was|has|was|does|of|off|to|from|between|"
    "increase|decrease|loss|gain|profit|short|surplus|deficit|plays|wins|yes|always|this|thus|various|"
    "bc|ad|bce|ce|am|pm|noon|midnight|others|wrong|correct|incorrect|other|else|percent|odds|evens|cubes|negatives"
)
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_QUALIFIERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_SAYS_OF_WHAT = frozenset(
    ["old", "long", "tall", "high", "wide", "deep", "thick", "total", "altogether"]
)  # "12 years old"
_ORDINAL = re.compile(r"(?:st|nd|rd|th)(?: (?:place|term|grade|day|floor|row|position))?")
_TOKEN = re.compile(r"\^\{?\(?(-?\d)\)?\}?|\\circ|[A-Za-z]+|[/*().%]|[^\W\d_]+|.")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")


def read_unit(tail: str, plain: bool, value: int | None = None) -> Unit | None:
    r"""The unit that `tail` is, what follows a value in cleaned LaTeX; None if it is more or something else.

    `plain`: the letters are not in a text macro. `value`: the whole number before, for nouns in the singular after 1.
    """
    text = _TEXT.sub(r" \1 ", tail).replace(r"\cdot", " ").replace(r"\Omega", "ohm")
    text = re.sub(r"\\frac *\{([^{}]*)\} *\{([^{}]*)\}", r"\1/\2", text).replace(r"\mu ", "u").replace(r"\mu", "u")
    text = re.sub(r"\bk ohm\b", "kohm", " ".join(text.split())).strip().removesuffix(".")
    text = re.sub(r"^\^ ?\{? ?\\circ ?\}?", "°", text).replace(r"^\circ", "°")
    if (degrees := re.fullmatch(r"° ?([CF]?)", text)) is not None:
        return Unit(((f"deg{degrees[1]}", 1),))
    if _ORDINAL.fullmatch(text.strip("^{} ")) and value is not None:
        return Unit()
    words = re.sub(r"(?<=[A-Za-z])\.(?=\s|$)", "", text).split(" ")
    if len(words) > 1 and words[-1] in _SAYS_OF_WHAT:
        words.pop()
        words = words[:-1] if words[-1] == "in" and len(words) > 1 else words
    factor = Fraction(1)
    while words and words[0].lower() in _SCALES:
        factor *= _SCALES[words.pop(0).lower()]
    if factor != 1 and not words:
        return Unit((), factor)
    rest = " ".join(words)
    if (dimension := _measure(rest, plain)) is not None:
        return Unit(dimension, factor)
    return Unit((), factor) if _is_noun(words, value) else None


def _measure(text: str, plain: bool) -> Dimension | None:
    """Units of the table with powers, side by side or with a slash; None for anything else."""
    powers: dict[str, int] = {}
    sign, multiplier, last = 1, 1, ""
    compound = "/" in text or "per" in text.split()
    for token in _TOKEN.finditer(text):
        word = token[0]
        if token[1] is not None:
            if not last:
                return None
            powers[last] += sign * (int(token[1]) - 1)
            last = ""
        elif word in ("/", "per"):
            sign, last = -1, ""
        elif word in (" ", "*", "(", ")"):
            continue
        elif word in _COMPOUND:
            for name, power in _COMPOUND[word]:
                powers[name] = powers.get(name, 0) + sign * power
            last = ""
        elif word in _QUALIFIERS:
            multiplier = _QUALIFIERS[word]
        else:
            unit = UNITS.get(word) or (UNITS.get(word.lower()) if len(word) > 2 else None)
            single = len(word) == 1 and word.isalpha()
            if unit is None or (single and not (compound if plain else word in _SINGLE_LETTERS or compound)):
                return None
            powers[unit] = powers.get(unit, 0) + sign * multiplier
            last, multiplier = unit, 1
    if not powers or multiplier != 1:
        return None
    return tuple(sorted((name, power) for name, power in powers.items() if power and name not in _ABSTRACT))


def _is_noun(words: list[str], value: int | None) -> bool:
    """Whether words are a noun in the plural, or after 1 in the singular, with at most three plain words before it."""
    if not words or len(words) > 4 or not all(re.fullmatch(r"[a-z]+(?:-[a-z]+)*", word) for word in words):
        return False
    if any(_CHANGING.fullmatch(word) or len(word) < 3 for word in words):
        return False
    head = words[-1]
    plural = head in _IRREGULAR or (len(head) > 3 and head.endswith("s") and not head.endswith(("ss", "us", "is")))
    return plural or value == 1
