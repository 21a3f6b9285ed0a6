"""`rephrase`: every question of a prepared file rewritten by a model, checked, and written as the second view.

OUT.parquet              the rewritings that passed, in the order of the source, with the same extra_info.index
OUT.originals.parquet    the questions that they belong to: the pair to train on, for every question must be paired
OUT.journal.jsonl        every reply; a job that was killed goes on from it and asks nothing twice
OUT.report.{json,html}   rates and examples

Invariants (tests/trainer/test_rephrase.py): a kill at any point loses at most the batch under way; what is drawn for a
row depends on the seed, the row and the attempt alone; a row is written at most once and never without all verdicts.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from megatron_coreward.data.parquet import SCHEMA, Message, Row, read_rows
from megatron_coreward.data.prompts import Tokenizer, build_prompts, with_system_prompt
from megatron_coreward.data.rephrasing import PROMPT_HASH, check, parse_reply, rewriting_prompt
from megatron_coreward.errors import InputError
from megatron_coreward.rewards.answer import extract_answer
from megatron_coreward.rewards.equivalence import Judge
from megatron_coreward.rewards.voting import majority_vote
from megatron_coreward.rollout.engine import SamplingRequest
from megatron_coreward.telemetry.files import replaced_whole
from megatron_coreward.telemetry.journal import Item, Journal
from megatron_coreward.trainer.evaluation import VERSION, Engines, Sampling, model_fingerprint, running_engines
from megatron_coreward.trainer.sampling import SamplingEngines, request_seed

SHOWN = 30  # examples of each kind on the report's page
OUTPUT_SCHEMA = pa.schema(
    [
        *SCHEMA,
        (
            "rephrase",
            pa.struct(
                [
                    ("model", pa.string()),
                    ("prompt_hash", pa.string()),
                    ("seed", pa.int64()),
                    ("attempt", pa.int64()),
                    ("similarity", pa.float64()),
                    ("verdicts", pa.string()),  # JSON: check -> passed
                    ("original_majority", pa.string()),  # the solver's; null without one
                    ("rewriting_majority", pa.string()),
                ]
            ),
        ),
    ]
)


@dataclass(frozen=True, slots=True)
class Rewriting:
    """How rewritings are drawn and what they have to pass."""

    attempts: int = 3  # for a row that was refused
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 1024
    seed: int = 0
    solver_samples: int = 0  # answers to both versions, whose majorities must agree; 0: no solver
    solver_max_tokens: int = 3072
    batch_rows: int = 64  # rows between two entries in the journal: what a kill can lose


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the rows."""

    rows: int
    written: int
    replies: int
    refused_replies: dict[str, int]  # why a reply could not be read -> replies
    failed_checks: dict[str, int]  # check -> replies
    mean_similarity: float  # of what was written
    left_out: list[str]  # uids


def rephrase_file(
    model: Path,
    source: Path,
    target: Path,
    settings: Rewriting,
    engines: Engines,
    *,
    dtype: Any = "bfloat16",
    system_prompt: str | None = None,
    equivalence: Any = "math",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Rewrites every question of a prepared file with the model in an HF directory.

    Args:
        system_prompt: of the solver; None keeps the file's own.

    Raises:
        InputError: bad files, or a journal of another job, before an engine starts.
    """
    if target.suffix != ".parquet":
        raise InputError(f"{target}: the file of rewritings must end with .parquet")
    rows = read_rows(source)
    if any(not isinstance(row.index, int) for row in rows):
        raise InputError(f"{source}, column extra_info.index: allowed: integers")
    tokenizer = AutoTokenizer.from_pretrained(model)
    identity = {
        "model": model_fingerprint(model),
        "source": {"file": source.name, "rows": len(rows)},
        "prompt": PROMPT_HASH,
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("attempts", "batch_rows")},
    }
    with Journal(_beside(target, "journal.jsonl"), identity) as journal, Judge(equivalence) as judge:
        job = Job(rows, journal, tokenizer, settings, judge, system_prompt)
        if job.pending():
            prompts = build_prompts(tokenizer, [rewriting_prompt(_question(row)) for row in rows])
            longest = max(len(prompt.token_ids) for prompt in prompts)
            limit = max(settings.max_tokens, settings.solver_max_tokens if settings.solver_samples else 0)
            length = 2 * longest + limit + 64  # a rewriting may be longer than its original
            with running_engines(model, engines, Sampling(seed=settings.seed, dtype=dtype), length) as group:
                job.run(group, on_progress)
        report = job.report()
        _write(source, target, rows, job, str(model.name))
    _write_report(target, report, rows, job)
    return report


class Job:
    """The rows, what is known of them, and what is still to be asked."""

    def __init__(
        self,
        rows: Sequence[Row],
        journal: Journal,
        tokenizer: Tokenizer,
        settings: Rewriting,
        judge: Judge,
        system_prompt: str | None,
    ) -> None:
        self.rows, self.journal, self.settings = rows, journal, settings
        self._tokenizer, self._judge, self._system_prompt = tokenizer, judge, system_prompt

    def replies(self, row: Row) -> list[Item]:
        """What the journal has of a row, attempt by attempt."""
        keys = (f"{row.uid}#{attempt}" for attempt in range(self.settings.attempts))
        return [self.journal[key] for key in keys if key in self.journal]

    def accepted(self, row: Row) -> Item | None:
        return next((item for item in self.replies(row) if item["passed"]), None)

    def pending(self) -> list[tuple[Row, int]]:
        """Rows that need another attempt, with its number."""
        waiting = []
        for row in self.rows:
            replies = self.replies(row)
            if len(replies) < self.settings.attempts and not any(item["passed"] for item in replies):
                waiting.append((row, len(replies)))
        return waiting

    def run(self, engines: SamplingEngines, on_progress: Callable[[int, int], None]) -> None:
        """Asks until every row has passed or has had its attempts; each batch is in the journal before the next."""
        while waiting := self.pending():
            for start in range(0, len(waiting), self.settings.batch_rows):
                batch = waiting[start : start + self.settings.batch_rows]
                self.journal.append(dict(self._attempt(engines, batch)))
                on_progress(sum(self.accepted(row) is not None for row in self.rows), len(self.rows))

    def _attempt(self, engines: SamplingEngines, batch: Sequence[tuple[Row, int]]) -> Iterator[tuple[str, Item]]:
        s = self.settings
        seeds = [request_seed(s.seed, attempt, row.uid, "original", "policy") for row, attempt in batch]
        prompts = build_prompts(self._tokenizer, [rewriting_prompt(_question(row)) for row, _ in batch])
        requests = [
            SamplingRequest(prompt.token_ids, 1, seed, s.temperature, s.top_p, s.max_tokens)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        items: list[Item] = []
        for (row, attempt), seed, (sample,) in zip(batch, seeds, engines.sample(requests, VERSION), strict=True):
            text, refusal = parse_reply(sample.text)
            if sample.finish_reason != "stop":
                text, refusal = None, "the reply was cut off"
            item: Item = {"attempt": attempt, "seed": seed, "text": text, "refusal": refusal, "passed": False}
            if text is not None:
                verdicts = check(_question(row), text)
                item |= {"checks": dict(verdicts.checks), "similarity": verdicts.similarity, "passed": verdicts.passed}
            items.append(item)
        if s.solver_samples:
            self._solve(engines, [row for row, _ in batch], items)
        for (row, attempt), item in zip(batch, items, strict=True):
            yield f"{row.uid}#{attempt}", item

    def _solve(self, engines: SamplingEngines, rows: Sequence[Row], items: Sequence[Item]) -> None:
        """The last check, for rewritings that pass the others: do majorities of answers to both versions agree?"""
        s = self.settings
        asked = [(row, item) for row, item in zip(rows, items, strict=True) if item["passed"]]
        conversations = []
        for row, item in asked:
            rewritten = (*row.messages[:-1], Message(role="user", content=item["text"]))
            conversations += [with_system_prompt(m, self._system_prompt) for m in (row.messages, rewritten)]
        requests = [
            SamplingRequest(
                prompt.token_ids,
                s.solver_samples,
                request_seed(s.seed, number % 2, asked[number // 2][0].uid, "rephrased", "teacher"),
                1.0,
                1.0,
                s.solver_max_tokens,
            )
            for number, prompt in enumerate(build_prompts(self._tokenizer, conversations) if conversations else [])
        ]
        answers = [[extract_answer(sample.text) for sample in group] for group in engines.sample(requests, VERSION)]
        for (_, item), original, rewriting in zip(asked, answers[::2], answers[1::2], strict=True):
            labels = [majority_vote(a, self._judge).label for a in (original, rewriting)]
            agree = None not in labels and self._judge.equivalent(labels[0], labels[1])
            item["majorities"] = labels
            item["checks"]["solver"] = agree
            item["passed"] = agree

    def report(self) -> Report:
        every = [item for row in self.rows for item in self.replies(row)]
        written = [item for item in map(self.accepted, self.rows) if item is not None]
        failures: Counter[str] = Counter()
        for item in every:
            failures.update(name for name, passed in item.get("checks", {}).items() if not passed)
        return Report(
            rows=len(self.rows),
            written=len(written),
            replies=len(every),
            refused_replies=dict(Counter(item["refusal"] for item in every if item["refusal"]).most_common()),
            failed_checks=dict(failures.most_common()),
            mean_similarity=sum(item["similarity"] for item in written) / max(1, len(written)),
            left_out=[row.uid for row in self.rows if self.accepted(row) is None],
        )


def _question(row: Row) -> str:
    return row.messages[-1]["content"]


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f"{target.stem}.{ending}")


def _write(source: Path, target: Path, rows: Sequence[Row], job: Job, model: str) -> None:
    kept = [(row, item) for row in rows if (item := job.accepted(row)) is not None]
    if not kept:
        return
    records = [
        {
            **_record(row, item["text"]),
            "rephrase": {
                "model": model,
                "prompt_hash": PROMPT_HASH,
                "seed": item["seed"],
                "attempt": item["attempt"],
                "similarity": item["similarity"],
                "verdicts": json.dumps(item["checks"]),
                "original_majority": item.get("majorities", [None, None])[0],
                "rewriting_majority": item.get("majorities", [None, None])[1],
            },
        }
        for row, item in kept
    ]
    with replaced_whole(target) as temporary:
        pq.write_table(pa.Table.from_pylist(records, schema=OUTPUT_SCHEMA), temporary)
    with replaced_whole(_beside(target, "originals.parquet")) as temporary:
        originals = [_record(row, _question(row)) for row, _ in kept]
        pq.write_table(pa.Table.from_pylist(originals, schema=SCHEMA), temporary)


def _record(row: Row, question: str) -> dict[str, Any]:
    return {
        "data_source": row.source,
        "prompt": [*row.messages[:-1], {"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"ground_truth": row.ground_truth, "style": "rule"},
        "extra_info": {"index": row.index, "split": "train"},
    }


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}
table{border-collapse:collapse;width:100%;table-layout:fixed}td,th{padding:.4rem .6rem;border-bottom:1px solid #ddd;
text-align:left;vertical-align:top;overflow-wrap:anywhere;white-space:pre-wrap}
"""


def _write_report(target: Path, report: Report, rows: Sequence[Row], job: Job) -> None:
    with replaced_whole(_beside(target, "report.json")) as temporary:
        temporary.write_text(json.dumps(asdict(report), indent=2) + "\n")
    passed = [(row, item) for row in rows if (item := job.accepted(row)) is not None]
    failed = [(row, item) for row in rows for item in job.replies(row) if not item["passed"]]
    parts = [f"<p>{report.written} of {report.rows} questions rewritten with {report.replies} replies.</p>"]
    for title, counts in (("Replies refused", report.refused_replies), ("Checks failed", report.failed_checks)):
        lines = [(name, str(count)) for name, count in counts.items()] or [("none", "")]
        parts.append(f"<h2>{title}</h2>{_table(('why', 'replies'), lines)}")
    for title, items in (("Accepted", passed), ("Refused", failed)):
        lines = [(_question(row), str(item["text"] or ""), _why(item)) for row, item in _spread(items)]
        parts.append(f"<h2>{title}: {len(lines)} of {len(items)}</h2>{_table(('question', 'rewriting', ''), lines)}")
    with replaced_whole(_beside(target, "report.html")) as temporary:
        head = f"<!doctype html><meta charset='utf-8'><title>Rewritings</title><style>{_STYLE}</style>"
        temporary.write_text(f"{head}<h1>Rewritings of {escape(target.name)}</h1>{''.join(parts)}")


def _spread(items: Sequence[tuple[Row, Item]]) -> Sequence[tuple[Row, Item]]:
    return items[:: max(1, -(-len(items) // SHOWN))]


def _why(item: Item) -> str:
    if item["refusal"]:
        return str(item["refusal"])
    failures = [name for name, passed in item["checks"].items() if not passed]
    return f"similarity {item['similarity']:.2f}" + (f"; failed: {', '.join(failures)}" if failures else "")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    rows += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines]
    return f"<table>{''.join(rows)}</table>"
