"""The names of a step's metrics and what each one means.

One table for whoever writes a metric and whoever shows it. A metric that a method or a step does not have is left out
of the step's row; it is never written as zero. Units: seconds (`_s`), nats for entropies, KL and log-probability gaps;
shares and rates are in [0, 1].
"""

from collections.abc import Iterable, Mapping

STEP = "step"
STEP_TIME = "step_time_s"

# The phases of a step, in the order in which they run; each is timed as time/<phase>_s.
PHASES = (
    "teacher_ema",
    "switch",
    "sync",
    "rephrasing",
    "rollout",
    "token_stats",
    "rewards",
    "update",
    "validation",
    "anchors",
    "checkpoint",
)
OUTSIDE = "outside"  # what a step spends between its phases

MEANINGS: Mapping[str, str] = {
    STEP: "training step, from 1; 0 is the validation before training",
    STEP_TIME: "wall time of the whole step",
    **{f"time/{phase}_s": f"wall time of the phase {phase}" for phase in PHASES},
    f"time/{OUTSIDE}_s": "wall time of the step outside its phases",
    f"time/{OUTSIDE}_share": "share of the step's wall time outside its phases",
    "reward/mean": "mean reward of the policy's rollouts, those that only voted (rollout.votes) included",
    "reward/std": "standard deviation of the reward over all of the policy's rollouts",
    "reward/accuracy": "share of rollouts whose reward is right by the data set's answer",
    "advantage/zero_variance_share": "share of groups whose rewards are all equal, so that they train nothing",
    "vote/share": "mean share of a group that gave the majority answer",
    "vote/margin": "mean lead of the majority answer over the runner-up",
    "vote/tie_rate": "share of votes with two answers at the top",
    "vote/no_answer_rate": "share of rollouts in which no final answer was found",
    "vote/distinct_answers": "mean number of distinct answers in a group",
    "vote/entropy": "mean entropy of a group's answers, as a share of the largest: 0 if all agree, 1 if no two do",
    "vote/label_variety": "distinct labels over all labels of a view: low if all questions are answered alike",
    "vote/exact_vs_math_disagreement": "share of votes whose label depends on the equivalence relation",
    "vote/exact_vs_math_changed_rollouts": "share of rollouts whose reward as a winner depends on the relation",
    "vote/abstention_rate": "share of votes that gave no label because their margin was too small",
    **{
        f"teacher_vote/{name}": f"vote/{name} of the teacher's groups; over the answers that were in when the vote was "
        "decided, if votes end early (teacher.early_stop), which makes shares and margins larger"
        for name in (
            "share",
            "margin",
            "tie_rate",
            "abstention_rate",
            "no_answer_rate",
            "distinct_answers",
            "entropy",
            "label_variety",
        )
    },
    "label/missing_rate": "share of groups without a label, by abstention or by method",
    "label/accuracy": "share of pseudo-labels that match the data set's answer",
    "label/accuracy_low": "lower end of its 95% interval (Wilson), groups counted as independent",
    "label/accuracy_high": "upper end of that interval",
    "label/flip_rate": "share of labels that are another answer than the question's last label in the same view",
    "label/seen_before_share": "share of labels whose question had been labelled before, in the same view",
    "label/view_agreement": "share of questions on which both views' votes agree",
    "label/teacher_agreement": "share of groups on which the teacher's vote and the policy's agree",
    "rollout/response_tokens_mean": "mean response length in tokens",
    "rollout/response_tokens_max": "longest response in tokens",
    "rollout/accuracy": "share of rollouts that match the data set's answer",
    "rollout/self_certainty": "mean KL(uniform || p) of the policy's next-token distribution on its rollouts",
    "rollout/truncated_share": "share of responses cut off at the length limit",
    "rollout/repeated_ngrams": "share of 4-grams of tokens that occur earlier in the same response",
    "anchor/questions": "anchor questions: training questions with a clear majority at the start",
    "anchor/moved_share": "share of anchor questions whose majority is another answer than at the start",
    "anchor/agreement": "share of rollouts on anchor questions that give the majority answer of the start",
    "anchor/kept": "anchor/agreement, or its mean over two draws if that is higher, divided by the highest mean so far",
    "rollout/tokens_per_s": "response tokens sampled a second, over all engines",
    "rollout/staleness": "steps by which the weights that sampled are behind those that learn, mean over tokens",
    "rollout/staleness_max": "the largest such number of any token",
    "rollout/continued_share": "share of responses whose tokens were drawn by several versions of the weights",
    "rollout/teacher_tokens_saved": "share of the teacher's tokens that votes which ended early have spared, an "
    "estimate: as if each token of a response were equally likely to be its last",
    "rollout/teacher_aborted_share": "share of the teacher's samples that were aborted because their vote was decided",
    "rollout/teacher_stopped_share": "share of the teacher's groups that ended before their last sample",
    "rollout/flat_share": "share of the drawn questions whose rollouts all had the same reward, with those replaced",
    "rollout/further_questions": "questions that a step has drawn in place of flat ones (rollout.resample_flat)",
    "rollout/rewritten_share": "share of questions with a rephrasing that the model wrote for this step",
    "rollout/aborted_samples": "samples of the step's groups that were aborted because their group needed no more; "
    "what an engine reports too late counts in the next step",
    "rollout/aborted_tokens": "tokens of these samples that had been drawn",
    "rollout/slowest_engine_s": "time until the slowest engine had sampled its share of the policy's rollouts; not "
    "measured of groups that are streamed",
    "rollout/fastest_engine_s": "time until the fastest engine had sampled its share",
    "rollout/entropy": "mean entropy of the policy's next-token distribution on its rollouts",
    "loss/policy": "clipped policy loss",
    "loss/total": "what the update minimises: policy loss plus weighted KL",
    "loss/mismatch_affected_share": "share of response tokens that the mismatch correction truncated or masked",
    "loss/kl": "KL estimate to the reference, before its coefficient",
    "loss/kl_coef": "the KL term's weight; the collapse guard may raise it",
    "loss/clip_share": "share of response tokens whose ratio was clipped",
    "optim/lr": "learning rate of the update",
    "optim/grad_norm": "global norm of the gradient before clipping",
    "optim/skipped_updates": "updates left out because their gradient was not finite",
    "teacher/decay": "the teacher's decay d(k)",
    "guard/level": "the collapse guard's alarm: 0 is none, 1 a warning, 2 calls for an action",
    "guard/indicators": "number of indicators of collapse, whether or not they raise an alarm",
    "sync/logprob_gap": "mean absolute log-probability gap between rollout engine and actor; for tokens of older "
    "weights (rollout.max_staleness), what the policy has moved since is part of it",
    "sync/logprob_gap_max": "largest such gap of a single token",
    "sync/canary_gap": "mean gap on the canary after a weight sync, the worst engine's",
    "sync/canary_limit": "largest such gap that rounding explains; a larger one ends the run",
    "sync/seconds": "time to send the weights to every engine",
}

# Validation keys carry their k: val/pass@1, val/avg@8, val/maj@8. Over several data sets each has keys of its own
# besides, with its source in between: val/openai/gsm8k/avg@8.
VALIDATION_MEANINGS: Mapping[str, str] = {
    "val/pass@": "share of validation questions with a right answer in k samples",
    "val/avg@": "mean accuracy over k samples a question",
    "val/maj@": "accuracy of the majority answer of k samples",
}


def validation_keys(keys: Iterable[str]) -> list[str]:
    """The validation metrics among `keys`: pass@k before avg@k before maj@k, each by growing k, then any others."""
    order = {prefix: place for place, prefix in enumerate(VALIDATION_MEANINGS)}

    def place(key: str) -> tuple[int, int, str]:
        prefix, _, k = key.partition("@")
        if f"{prefix}@" in order and k.isdigit():
            return order[f"{prefix}@"], int(k), key
        return len(order), 0, key

    return sorted({key for key in keys if key.startswith("val/")}, key=place)
