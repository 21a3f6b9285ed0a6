"""Text in, judgements out: extract answers, compare them, vote on them, and reward rollouts by a method's rule.

Imports numpy at most; the symbolic comparison lives in processes of its own.
"""
