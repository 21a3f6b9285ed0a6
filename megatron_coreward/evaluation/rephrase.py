"""`rephrase`: every question of a prepared file rewritten by a model, checked, and written as the second view.

OUT.parquet              the rewritings that passed, in the order of the source, with its other columns
OUT.originals.parquet    the rows that they belong to: the pair to train on, for every question must be paired
OUT.replies.jsonl        every reply; a job that was killed goes on from it and asks nothing twice
OUT.report.{json,html}   rates and examples

Invariants (tests/evaluation/test_rephrase.py): a kill at any point loses at most the batch in flight; what is drawn
for a row depends on the seed, the row and the attempt alone; a row is written at most once and never without all
checks; a job log is continued only with the questions, the model and the settings that it was started with.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from megatron_coreward.data.parquet import Message, Row, holds_pairs, read_rows
from megatron_coreward.data.prompts import Tokenizer, build_prompts, with_system_prompt
from megatron_coreward.data.rephrasing import check, parse_reply, rewriting_prompt
from megatron_coreward.data.rewriting_prompts import PROMPTS, PromptName
from megatron_coreward.errors import InputError
from megatron_coreward.evaluation.evaluate import (
    VERSION,
    Engines,
    Sampling,
    hf_model_dir,
    model_fingerprint,
    running_engines,
)
from megatron_coreward.rewards.answer import extract_answer
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.voting import majority_vote
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.telemetry.files import replaced_whole
from megatron_coreward.telemetry.job_log import Item, JobLog, refuse_former_name
from megatron_coreward.trainer.sampling import SamplingEngines, request_seed

SHOWN = 30  # examples of each kind on the report's page
SHOWN_REPLY = 2000  # characters of a reply that could not be read, kept for the page
PROVENANCE = pa.struct(  # column `rephrase`
    [
        ("model", pa.string()),
        ("prompt_hash", pa.string()),
        ("seed", pa.int64()),  # as this and the next four: null if no rewriting passed and the original is kept
        ("attempt", pa.int64()),
        ("similarity", pa.float64()),
        ("checks", pa.string()),  # JSON: check -> passed
        ("original_majority", pa.string()),  # the solver's; null without one
        ("rewriting_majority", pa.string()),
        ("kept_original", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True)
class Rewriting:
    """How rewritings are drawn and what they have to pass."""

    prompt: PromptName = "own"
    filter: bool = True  # whether a rewriting must pass the checks; without it, one that can be read is taken
    attempts: int = 3  # for a row that was refused
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 1024
    seed: int = 0
    solver_samples: int = 0  # answers to both versions, whose majorities must agree; 0: no solver
    solver_max_tokens: int = 3072
    batch_rows: int = 64  # rows between two entries in the log: what a kill can lose
    refused: Literal["leave_out", "keep_original"] = "leave_out"  # a question of which no rewriting passed
    thinking: bool | None = None  # of models that can; None: as their template has it

    def __post_init__(self) -> None:
        for name, allowed, good in (
            ("attempts", "1 or more", self.attempts >= 1),
            ("temperature", "more than 0, for another attempt draws another reply", self.temperature > 0),
            ("top_p", "more than 0, at most 1", 0 < self.top_p <= 1),
            ("max_tokens", "1 or more", self.max_tokens >= 1),
            ("solver_samples", "0 (no solver) or more", self.solver_samples >= 0),
            ("solver_max_tokens", "1 or more", self.solver_max_tokens >= 1),
            ("batch_rows", "1 or more", self.batch_rows >= 1),
            ("refused", "leave_out, keep_original", self.refused in ("leave_out", "keep_original")),
        ):
            if not good:
                raise InputError(f"{name}: found {getattr(self, name)}; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the rows."""

    rows: int
    written: int  # rewritings; originals that are kept in their stead do not count
    written_by_attempt: list[int]  # [attempts]
    replies: int
    refused_replies: dict[str, int]  # why a reply could not be read -> replies
    failed_checks: dict[str, int]  # check -> replies
    mean_similarity: float  # of what was written
    left_out: list[str]  # uids of questions without a rewriting


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
        InputError: bad files, or a log of another job, before an engine starts.
    """
    if target.suffix != ".parquet":
        raise InputError(f"{target}: the file of rewritings must end with .parquet")
    if holds_pairs(source):
        raise InputError(
            f"{source}: found pairs of questions and rephrasings; allowed: a file of questions "
            "(prepare-data with --view original takes them out of it)"
        )
    rows, table = read_rows(source), pq.read_table(source)
    with hf_model_dir(model) as hf_path:
        tokenizer = AutoTokenizer.from_pretrained(hf_path)
        changeable = ("attempts", "batch_rows", "refused")  # between a kill and the next start
        identity = {
            "model": model_fingerprint(hf_path),
            "source": {"rows": len(rows), "fingerprint": _fingerprint(rows)},
            "prompt": PROMPTS[settings.prompt].hash,
            "settings": {k: v for k, v in asdict(settings).items() if k not in changeable},
            "dtype": dtype,
            "solver": [system_prompt, equivalence] if settings.solver_samples else None,
        }
        refuse_former_name(_beside(target, "replies.jsonl"), _beside(target, "journal.jsonl"))
        with (
            JobLog(_beside(target, "replies.jsonl"), identity) as job_log,
            AnswerEquivalence(equivalence) as equivalence,
        ):
            asking, solving = _prompt_lengths(tokenizer, rows, settings, system_prompt)
            job = RewritingJob(rows, job_log, tokenizer, settings, equivalence, system_prompt, solving)
            if job.pending():
                sampling = Sampling(seed=settings.seed, dtype=dtype)
                needed = max(asking + settings.max_tokens, solving + settings.solver_max_tokens if solving else 0)
                with running_engines(hf_path, engines, sampling, needed, _beside(target, "logs")) as group:
                    job.run(group, on_progress)
            report = job.report()
            _write(table, target, job, model.absolute().name)
    _write_report(target, report, rows, job)
    return report


def _prompt_lengths(
    tokenizer: Tokenizer, rows: Sequence[Row], settings: Rewriting, system_prompt: str | None
) -> tuple[int, int]:
    """Tokens: (the longest prompt that asks for a rewriting, the longest that the solver may get).

    How long rewritings will be is not known; one that makes the solver's prompt longer than this is refused.
    """
    asking = build_prompts(
        tokenizer, [rewriting_prompt(_question(row), settings.prompt) for row in rows], settings.thinking
    )
    longest = max(len(prompt.token_ids) for prompt in asking)
    if not settings.solver_samples:
        return longest, 0
    conversations = [with_system_prompt(row.messages, system_prompt) for row in rows]
    solving = build_prompts(tokenizer, conversations, settings.thinking)
    return longest, 2 * max(longest, *(len(prompt.token_ids) for prompt in solving)) + 64


class RewritingJob:
    """The rows, what is known of them, and what is still to be asked."""

    def __init__(
        self,
        rows: Sequence[Row],
        job_log: JobLog,
        tokenizer: Tokenizer,
        settings: Rewriting,
        equivalence: AnswerEquivalence,
        system_prompt: str | None,
        max_solver_prompt: int,
    ) -> None:
        """`max_solver_prompt`: tokens; a rewriting whose prompt to the solver is longer fails the check `length`."""
        self.rows, self.job_log, self.settings = rows, job_log, settings
        self._tokenizer, self._equivalence, self._system_prompt = tokenizer, equivalence, system_prompt
        self._max_solver_prompt = max_solver_prompt

    def replies(self, row: Row) -> list[Item]:
        """What the log has of a row, attempt by attempt."""
        keys = (f"{row.uid}#{attempt}" for attempt in range(self.settings.attempts))
        return [self.job_log[key] for key in keys if key in self.job_log]

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
        """Asks until every row has passed or has had its attempts; each batch is in the log before the next."""
        while waiting := self.pending():
            for start in range(0, len(waiting), self.settings.batch_rows):
                batch = waiting[start : start + self.settings.batch_rows]
                self.job_log.append(dict(self._attempt(engines, batch)))
                on_progress(sum(self.accepted(row) is not None for row in self.rows), len(self.rows))

    def _attempt(self, engines: SamplingEngines, batch: Sequence[tuple[Row, int]]) -> Iterator[tuple[str, Item]]:
        s = self.settings
        seeds = [request_seed(s.seed, attempt, row.uid, "original", "policy") for row, attempt in batch]
        asked = [rewriting_prompt(_question(row), s.prompt) for row, _ in batch]
        prompts = build_prompts(self._tokenizer, asked, s.thinking)
        requests = [
            SamplingRequest(prompt.token_ids, 1, seed, s.temperature, s.top_p, s.max_tokens)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        items: list[Item] = []
        for (row, attempt), seed, (sample,) in zip(batch, seeds, engines.sample(requests, VERSION), strict=True):
            text, refusal = parse_reply(sample.text, s.prompt)
            if sample.finish_reason != "stop":
                text, refusal = None, "the reply was cut off"
            item: Item = {"attempt": attempt, "seed": seed, "text": text, "refusal": refusal, "passed": False}
            if text is None:
                item["reply"] = sample.text[:SHOWN_REPLY]
            else:
                checks = check(_question(row), text)
                item |= {"checks": dict(checks.checks), "similarity": checks.similarity}
                item["passed"] = checks.passed or not s.filter
            items.append(item)
        if s.solver_samples:
            self._solve(engines, [row for row, _ in batch], items)
        for (row, attempt), item in zip(batch, items, strict=True):
            yield f"{row.uid}#{attempt}", item

    def _solve(self, engines: SamplingEngines, rows: Sequence[Row], items: Sequence[Item]) -> None:
        """The last check, for rewritings that pass the others: do majorities of answers to both versions agree?

        The original is solved once: its draws do not depend on the attempt, so the next attempt takes the label over.
        """
        conversations: list[tuple[Message, ...]] = []
        seeds: list[int] = []
        asked: list[tuple[Row, Item]] = []
        known = {row.uid: found["majorities"] for row in rows for found in self.replies(row) if "majorities" in found}
        for row, item in zip(rows, items, strict=True):
            if not item["passed"]:
                continue
            rewriting = (*row.messages[:-1], Message(role="user", content=item["text"]))
            own = [(1, rewriting)] if row.uid in known else [(0, row.messages), (1, rewriting)]
            asked.append((row, item))
            conversations += [with_system_prompt(messages, self._system_prompt) for _, messages in own]
            seeds += [request_seed(self.settings.seed, which, row.uid, "rephrased", "teacher") for which, _ in own]
        if not asked:
            return
        drawn = self._answers(engines, conversations, seeds)
        self._equivalence.compare([group for group in drawn if group is not None])
        answers = iter(drawn)
        for row, item in asked:
            original = known[row.uid][0] if row.uid in known else self._label(next(answers))
            answered = next(answers)
            rewriting_label = self._label(answered)
            agree = original is not None and rewriting_label is not None
            agree = agree and self._equivalence.equivalent(original, rewriting_label)
            item["majorities"] = [original, rewriting_label]
            item["checks"]["solver"] = agree
            item["checks"]["length"] &= answered is not None
            item["passed"] = all(item["checks"].values()) if self.settings.filter else agree

    def _answers(
        self, engines: SamplingEngines, conversations: Sequence[Sequence[Message]], seeds: Sequence[int]
    ) -> list[list[str | None] | None]:
        """The answers to each conversation; None for one that is too long to be asked."""
        s = self.settings
        prompts = build_prompts(self._tokenizer, conversations, s.thinking)
        fits = [len(prompt.token_ids) <= self._max_solver_prompt for prompt in prompts]
        requests = [
            SamplingRequest(prompt.token_ids, s.solver_samples, seed, 1.0, 1.0, s.solver_max_tokens)
            for prompt, seed, fit in zip(prompts, seeds, fits, strict=True)
            if fit
        ]
        groups = iter(engines.sample(requests, VERSION) if requests else [])
        return [[extract_answer(sample.text) for sample in next(groups)] if fit else None for fit in fits]

    def _label(self, answers: Sequence[str | None] | None) -> str | None:
        return None if answers is None else majority_vote(answers, self._equivalence).label

    def report(self) -> Report:
        every = [item for row in self.rows for item in self.replies(row)]
        written = [item for item in map(self.accepted, self.rows) if item is not None]
        failures: Counter[str] = Counter()
        for item in every:
            failures.update(name for name, passed in item.get("checks", {}).items() if not passed)
        return Report(
            rows=len(self.rows),
            written=len(written),
            written_by_attempt=[sum(i["attempt"] == k for i in written) for k in range(self.settings.attempts)],
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


def _fingerprint(rows: Sequence[Row]) -> str:
    """Of what is rewritten: the questions and their names."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps([row.uid, row.messages]).encode() + b"\n")
    return digest.hexdigest()


def _write(table: pa.Table, target: Path, job: RewritingJob, model: str) -> None:
    """The pair of files, from the rows of the source; neither, if nothing passed."""
    originals = _beside(target, "originals.parquet")
    accepted = [job.accepted(row) for row in job.rows]
    if not any(accepted):
        target.unlink(missing_ok=True)
        originals.unlink(missing_ok=True)
        return
    keep_all = job.settings.refused == "keep_original"
    places = [place for place, item in enumerate(accepted) if item is not None or keep_all]
    kept = table.take(places)
    prompts = kept["prompt"].to_pylist()
    for prompt, place in zip(prompts, places, strict=True):
        if (item := accepted[place]) is not None:
            prompt[-1]["content"] = item["text"]
    rewritten = kept.set_column(
        kept.schema.get_field_index("prompt"), kept.schema.field("prompt"), pa.array(prompts, kept["prompt"].type)
    )
    if "rephrase" in rewritten.column_names:  # a set that was rephrased before
        rewritten = rewritten.drop_columns("rephrase")
    origin = pa.array(
        [_provenance(accepted[place], model, PROMPTS[job.settings.prompt].hash) for place in places], PROVENANCE
    )
    for file, content in ((target, rewritten.append_column("rephrase", origin)), (originals, kept)):
        with replaced_whole(file) as temporary:
            pq.write_table(content, temporary)


def _provenance(item: Item | None, model: str, prompt_hash: str) -> dict[str, Any]:
    made_by = {"model": model, "prompt_hash": prompt_hash, "kept_original": item is None}
    if item is None:
        return made_by
    original, rewriting = item.get("majorities", (None, None))
    return made_by | {
        "seed": item["seed"],
        "attempt": item["attempt"],
        "similarity": item["similarity"],
        "checks": json.dumps(item["checks"]),
        "original_majority": original,
        "rewriting_majority": rewriting,
    }


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}
table{border-collapse:collapse;width:100%;table-layout:fixed}td,th{padding:.4rem .6rem;border-bottom:1px solid #ddd;
text-align:left;vertical-align:top;overflow-wrap:anywhere;white-space:pre-wrap}
"""


def _write_report(target: Path, report: Report, rows: Sequence[Row], job: RewritingJob) -> None:
    with replaced_whole(_beside(target, "report.json")) as temporary:
        temporary.write_text(json.dumps(asdict(report), indent=2) + "\n")
    passed = [(row, item) for row in rows if (item := job.accepted(row)) is not None]
    failed = [(row, item) for row in rows for item in job.replies(row) if not item["passed"]]
    rate = f"{report.written / report.rows:.1%}"
    parts = [f"<p>{report.written} of {report.rows} questions rewritten ({rate}) with {report.replies} replies.</p>"]
    attempts = [(str(number), str(count)) for number, count in enumerate(report.written_by_attempt, 1)]
    parts.append(f"<h2>Passed</h2>{_table(('attempt', 'questions'), attempts)}")
    for title, counts in (("Replies refused", report.refused_replies), ("Checks failed", report.failed_checks)):
        lines = [(name, str(count), f"{count / report.replies:.1%}") for name, count in counts.items()]
        parts.append(f"<h2>{title}</h2>{_table(('why', 'replies', 'of all'), lines or [('none', '', '')])}")
    for title, items in (("Accepted", passed), ("Refused", failed)):
        lines = [(_question(row), item["text"] or item.get("reply", ""), _why(item)) for row, item in _spread(items)]
        parts.append(f"<h2>{title}: {len(lines)} of {len(items)}</h2>{_table(('question', 'reply', ''), lines)}")
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
