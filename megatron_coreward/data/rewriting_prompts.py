r"""What a model is asked when it is to rewrite a question, how its reply is read, and how the reply is drawn. Pure.

`own` asks for one tagged block. `paper` is the prompt of the Co-rewarding paper (arXiv 2508.00410, appendix C.2, quoted
under CC BY 4.0) with the sampling of its release, for rephrasings as the published sets have them.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

PromptName = Literal["own", "paper"]
Parsed = tuple[str | None, str]  # (rewriting, "") or (None, why the reply was refused)

_OWN = """\
You are given a mathematics question. Write it anew.

Keep the mathematics exactly: the same quantities and numbers, the same relations between them, the same thing asked \
for, and so the same final answer in the same form. Change everything else: the words, the order of the sentences and, \
if the question tells a story, its scene. A purely symbolic question gets a short scene or other \
words around the same formulas. Do not solve it, do not give hints, do not mention that it was rewritten.

Reply with the new question alone, between <rewritten> and </rewritten>.

The question:
"""

_PAPER = """\
You are given a math problem. Please rewrite it using different wording and a different real-world scenario, while \
keeping the underlying mathematical meaning and answer exactly the same.

Guidelines:
1. Do not change the math logic or the final answer.
2. Use different words and a new context to make it look like a different problem.
3. Avoid copying phrases or sentence structures from the original.
4. Make sure the rewritten question is natural, clear, and solvable.
5. Output ONLY between the following markers, and strictly in this format (no extra explanation):

### RESULT_START
ORIGINAL:
<original question>
REWRITE:
<rewritten question>
### RESULT_END

"""

_BLOCK = re.compile(r"\s*<rewritten>(.*?)</rewritten>\s*", re.DOTALL)
_RESULT = re.compile(r"### RESULT_START(.*?)### RESULT_END", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RewritingPrompt:
    """A prompt with the way that its replies are drawn and read."""

    instruction: str  # stands before the question
    parse: Callable[[str], Parsed]
    temperature: float
    top_p: float
    max_tokens: int  # of a reply
    thinking: bool | None  # of models that can; None: as their template has it

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.instruction.encode()).hexdigest()[:16]

    def ask(self, question: str) -> str:
        return self.instruction + question


def _after_thinking(reply: str) -> str | None:
    """The reply behind a closed <think> section; None for one that was never closed.

    Templates of reasoning models may open the section in the prompt, so that the reply has its end alone.
    """
    text = reply.rpartition("</think>")[2]
    return None if "<think>" in text else text


def _parse_block(reply: str) -> Parsed:
    """One tagged block, and nothing else."""
    text = _after_thinking(reply)
    if text is None:
        return None, "the thinking was never closed"
    if text.count("<rewritten>") != 1 or text.count("</rewritten>") != 1:
        return None, f"{text.count('<rewritten>')} opening and {text.count('</rewritten>')} closing tags"
    block = _BLOCK.fullmatch(text)
    if block is None:
        return None, "text outside of the tags"
    if not block[1].strip():
        return None, "an empty rewriting"
    return block[1].strip(), ""


def _parse_result(reply: str) -> Parsed:
    """The text after REWRITE: between the first pair of markers, whatever is around them."""
    text = _after_thinking(reply)
    if text is None:
        return None, "the thinking was never closed"
    result = _RESULT.search(text)
    if result is None:
        return None, "no result between the markers"
    _, heading, rewriting = result[1].partition("REWRITE:")
    if not heading:
        return None, "no REWRITE: between the markers"
    return (rewriting.strip(), "") if rewriting.strip() else (None, "an empty rewriting")


PROMPTS: Mapping[PromptName, RewritingPrompt] = {
    "own": RewritingPrompt(_OWN, _parse_block, temperature=0.7, top_p=0.95, max_tokens=1024, thinking=None),
    "paper": RewritingPrompt(_PAPER, _parse_result, temperature=0.7, top_p=0.8, max_tokens=20_480, thinking=False),
}
