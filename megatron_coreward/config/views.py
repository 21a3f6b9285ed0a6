"""The two views of a question, and who samples: names that configuration needs without anything heavy."""

from typing import Literal

View = Literal["original", "rephrased"]
Role = Literal["policy", "teacher"]
VIEWS: tuple[View, ...] = ("original", "rephrased")
