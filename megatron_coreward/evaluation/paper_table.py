"""Results of `evaluate paper` as the paper's table: model x training set x method x benchmark, with intervals.

Beside each row of ours is the paper's, from `paper_numbers.csv`: every number of tables 1, 2, 7 and 8 of version 2
of the paper, each with its table. For other numbers a file of the same columns is given.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_coreward.errors import InputError
from megatron_coreward.evaluation.benchmarks import BENCHMARKS
from megatron_coreward.evaluation.paper import UNTRAINED, Measured, ModelLabels, PaperResult
from megatron_coreward.telemetry.files import replaced_whole

NUMBERS = Path(__file__).with_name("paper_numbers.csv")
COLUMNS = ("model", "data", "method", "benchmark", "percent", "source")
FILES = ("table.md", "table.csv", "table.tex")

# As the paper orders and calls them.
METHODS: Mapping[str, str] = {
    UNTRAINED: "before RL",
    "ground_truth": "GT-Reward",
    "self_certainty": "Self-Certainty",
    "entropy": "Entropy",
    "majority_voting": "Majority-Voting",
    "co_rewarding_i": "Co-rewarding-I",
    "co_rewarding_ii": "Co-rewarding-II",
    "co_rewarding_i+ii": "Co-rewarding-III",  # in the paper's later versions
}
DATA: Mapping[str, str] = {"": "", "math": "MATH", "dapo": "DAPO-14k", "open_rs": "Open-RS"}

PaperNumbers = Mapping[tuple[ModelLabels, str], float]  # by labels and benchmark, in percent


@dataclass(frozen=True, slots=True)
class _Row:
    labels: ModelLabels
    ours: Mapping[str, Measured]
    paper: Mapping[str, float]


def read_numbers(path: Path = NUMBERS) -> PaperNumbers:
    """The paper's numbers of a file. Raises InputError for one without the columns, or with a bad row."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise InputError(f"{path}: found columns {reader.fieldnames}; allowed: {', '.join(COLUMNS)}")
            numbers: dict[tuple[ModelLabels, str], float] = {}
            for row in reader:
                key = ModelLabels(row["model"], row["data"], row["method"]), row["benchmark"]
                if key[1] not in BENCHMARKS:
                    raise InputError(
                        f"{path}, line {reader.line_num}: benchmark {key[1]!r}; allowed: {', '.join(BENCHMARKS)}"
                    )
                numbers[key] = float(row["percent"])
            return numbers
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: {error}") from None


def write_tables(out: Path, results: Sequence[PaperResult], numbers: PaperNumbers) -> None:
    """Leaves the table in a folder as Markdown, CSV and LaTeX."""
    out.mkdir(parents=True, exist_ok=True)
    texts = (markdown(results, numbers), csv_text(results, numbers), latex(results, numbers))
    for name, text in zip(FILES, texts, strict=True):
        with replaced_whole(out / name) as temporary:
            temporary.write_text(text)


def markdown(results: Sequence[PaperResult], numbers: PaperNumbers) -> str:
    """A row a result, in percent with its interval; under it the paper's, if there is one."""
    rows, names = _rows(results, numbers), _benchmarks(results)
    head = ["model", "trained on", "method", *(BENCHMARKS[name].title for name in names)]
    lines = [_line(head), _line(["---", "---", "---", *("---:" for _ in names)])]
    for row in rows:
        lines.append(_line([*_names(row.labels), *(_ours(row.ours.get(name)) for name in names)]))
        if row.paper:
            lines.append(_line(["", "", "in the paper", *(_paper(row.paper.get(name)) for name in names)]))
    metrics = "; ".join(f"{BENCHMARKS[name].title}: {_metric(results, name)}" for name in names)
    note = f"Percent, with 95% bootstrap intervals over questions. {metrics}."
    return "\n".join([*lines, "", *_notes(results, note)]) + "\n"


def csv_text(results: Sequence[PaperResult], numbers: PaperNumbers) -> str:
    """A line a number: labels, benchmark, metric, value and interval in percent, questions, the paper's number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["model", "data", "method", "benchmark", "metric", "percent", "low", "high", "num_questions", "paper_percent"]
    )
    for row in _rows(results, numbers):
        for name, measured in row.ours.items():
            e = measured.estimate
            writer.writerow(
                [row.labels.model, row.labels.data, row.labels.method, name, measured.metric]
                + [f"{100 * value:.2f}" for value in (e.value, e.low, e.high)]
                + [measured.num_questions, _paper(row.paper.get(name))]
            )
    return text.getvalue()


def latex(results: Sequence[PaperResult], numbers: PaperNumbers) -> str:
    """A tabular of the booktabs package."""
    names = _benchmarks(results)
    head = ["Model", "Trained on", "Method", *(BENCHMARKS[name].title for name in names)]
    lines = [rf"\begin{{tabular}}{{lll{'r' * len(names)}}}", r"\toprule", _tex_line(head), r"\midrule"]
    for row in _rows(results, numbers):
        cells = [_tex_ours(row.ours.get(name)) for name in names]
        lines.append(_tex_line([*map(_escaped, _names(row.labels)), *cells]))
        if row.paper:
            lines.append(_tex_line(["", "", r"\emph{in the paper}", *(_paper(row.paper.get(name)) for name in names)]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _rows(results: Sequence[PaperResult], numbers: PaperNumbers) -> list[_Row]:
    """In the order of models, training sets and methods."""
    methods, data = list(METHODS), list(DATA)

    def place(result: PaperResult) -> tuple[str, int, int]:
        labels = result.labels
        return (
            labels.model,
            data.index(labels.data) if labels.data in data else len(data),
            methods.index(labels.method) if labels.method in methods else len(methods),
        )

    names = _benchmarks(results)
    return [
        _Row(
            result.labels,
            {name: result.measured[name] for name in names if name in result.measured},
            {name: numbers[result.labels, name] for name in names if (result.labels, name) in numbers},
        )
        for result in sorted(results, key=place)
    ]


def _benchmarks(results: Sequence[PaperResult]) -> list[str]:
    """Those that any result has, in the paper's order."""
    if not results:
        raise InputError("no result given; allowed: folders of `evaluate paper`")
    return [name for name in BENCHMARKS if any(name in result.measured for result in results)]


def _metric(results: Sequence[PaperResult], name: str) -> str:
    found = dict.fromkeys(result.measured[name].metric for result in results if name in result.measured)
    counts = sorted({result.measured[name].num_questions for result in results if name in result.measured})
    return f"{' or '.join(found)} of {' or '.join(map(str, counts))} questions"


def _notes(results: Sequence[PaperResult], note: str) -> list[str]:
    settings = {str({k: v for k, v in r.settings.items() if v is not None}) for r in results}
    return [note] if len(settings) == 1 else [note, "", "**Settings differ between rows**: see each paper.json."]


def _names(labels: ModelLabels) -> list[str]:
    return [labels.model, DATA.get(labels.data, labels.data), METHODS.get(labels.method, labels.method)]


def _ours(measured: Measured | None) -> str:
    if measured is None:
        return ""
    e = measured.estimate
    return f"{100 * e.value:.2f} ({100 * e.low:.1f} .. {100 * e.high:.1f})"


def _tex_ours(measured: Measured | None) -> str:
    if measured is None:
        return ""
    e = measured.estimate
    return rf"{100 * e.value:.2f} {{\scriptsize [{100 * e.low:.1f}, {100 * e.high:.1f}]}}"


def _paper(percent: float | None) -> str:
    return "" if percent is None else f"{percent:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _tex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escaped(text: str) -> str:
    for sign in "&%$#_{}":
        text = text.replace(sign, f"\\{sign}")
    return text
