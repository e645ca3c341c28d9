"""What every logged number means: label, unit, which way is better, and one sentence for a reader of the report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

HELDOUT = "eval/heldout/"
HEADLINE = HELDOUT + "strict"


class Metric(NamedTuple):
    """Label for a picture, unit ("" for a pure number), better: +1 up, -1 down, 0 neither; one sentence."""

    label: str
    unit: str
    better: int
    meaning: str


_FIXED: dict[str, Metric] = {
    "eval/heldout/strict": Metric(
        "strict accuracy",
        "share",
        1,
        "Share of held-out prompts whose image is right in everything the prompt names.",
    ),
    "eval/heldout/soft": Metric(
        "soft accuracy", "share", 1, "The same verifier with partial credit for what is right in a wrong image."
    ),
    "eval/heldout/judge": Metric(
        "held-out judge",
        "share",
        1,
        "Accuracy by an independent judge that no reward sees; it should rise together with the reward.",
    ),
    "eval/heldout/diversity": Metric(
        "diversity",
        "rms distance",
        0,
        "Distance between images of one prompt; a steady fall means that the samples become all alike.",
    ),
    "eval/heldout/base_distance": Metric(
        "distance to the base model",
        "rms distance",
        0,
        "How far an image moved from the un-tuned model's image of the same noise and prompt.",
    ),
    "eval/heldout/return": Metric(
        "return", "reward", 1, "Undiscounted return of held-out episodes, by the simulator's own reward, noise off."
    ),
    "eval/heldout/success": Metric("success", "share", 1, "Share of held-out episodes that reached their goal."),
    "eval/heldout/train_success": Metric(
        "success with training noise", "share", 1, "The same episodes and weights, played with the noise of training."
    ),
    "eval/heldout/train_return": Metric("return with training noise", "", 1, "Of those episodes."),
    "eval/heldout/train_length": Metric("length with training noise", "steps", 0, "Of those episodes."),
    "eval/heldout/length": Metric("length of episodes", "steps", 0, "Primitive steps of a held-out episode."),
    "eval/heldout/calls": Metric(
        "network calls",
        "rows",
        -1,
        "Rows of the network that made a held-out sample, or an action, noise off.",
    ),
    "eval/heldout/rank_correlation": Metric(
        "return follows target",
        "",
        1,
        "Spearman's rank correlation of the mean returns with the targets that were asked for; 1 is in their order.",
    ),
    "rollout/episode_return": Metric(
        "return while training", "reward", 1, "Return of the episodes that ended in this iteration, noise on."
    ),
    "rollout/episode_length": Metric(
        "length of episodes while training", "steps", 0, "Primitive steps of the episodes that ended."
    ),
    "rollout/success": Metric("success while training", "share", 1, "Share of the ended episodes that succeeded."),
    "perf/env_steps_per_s": Metric(
        "environment steps per second", "steps/s", 1, "Primitive simulator steps made and trained on per second."
    ),
    "reward/mean": Metric(
        "reward", "reward", 1, "Mean training reward, over the samples that could be scored; this is what is optimised."
    ),
    "reward/std": Metric("reward, standard deviation", "reward", 0, "Spread of the training reward over all samples."),
    "reward/masked_frac": Metric(
        "samples without a score",
        "share",
        -1,
        "Share of samples left out because a reward gave none, failed or was too late; they never count as zero.",
    ),
    "env/bad_rows": Metric(
        "steps with broken numbers",
        "steps",
        -1,
        "Steps left out because an observation or an action was not finite; the simulator or the network gave nan.",
    ),
    "rollout/masked_frac": Metric(
        "masked samples",
        "share",
        -1,
        "Share of sampled rows that took no part in the update.",
    ),
    "policy/loss": Metric(
        "policy loss",
        "",
        0,
        "What is minimised, without the KL term; near zero for a clipped surrogate, less the reward for its gradient.",
    ),
    "policy/ratio_mean": Metric(
        "probability ratio", "", 0, "Mean probability ratio of new to old policy; should stay close to 1."
    ),
    "policy/clip_frac": Metric(
        "clip fraction",
        "share",
        0,
        "Share of scored steps whose ratio the clip holds back; above .3 the updates are too large.",
    ),
    "policy/approx_kl": Metric(
        "KL to the sampling policy",
        "nats",
        0,
        "Estimated KL of the policy that sampled to the updated one, per scored step.",
    ),
    "policy/first_log_ratio_max": Metric(
        "first log-ratio, largest",
        "nats",
        -1,
        "Largest |log ratio| before any update: 0 when the recorded and the recomputed probabilities agree.",
    ),
    "policy/velocity_norm": Metric(
        "norm of the velocity",
        "rms",
        0,
        "Root mean square of the velocity where steps were scored; a rise over the run means glare and texture.",
    ),
    "policy/norm_excess": Metric(
        "norm above the reference", "rms", -1, "By how much the velocity's norm is above the reference's, else 0."
    ),
    "rollout/sample_norm": Metric(
        "norm of the sample", "rms", 0, "Root mean square of the latents that training sampled."
    ),
    "policy/entropy": Metric("entropy", "nats", 0, "Entropy of the scored steps."),
    "policy/std_mean": Metric(
        "exploration noise",
        "action",
        0,
        "Mean std of the noise added to a denoising step while training.",
    ),
    "policy/anchor": Metric(
        "distance to the reference's action",
        "action^2",
        0,
        "Mean squared difference of the deployed action and the un-tuned policy's, from the same start noise.",
    ),
    "policy/distance": Metric(
        "distance to the cloned flow",
        "action^2",
        0,
        "Mean squared difference of FQL's one-step action and the cloned flow's, from the same start noise.",
    ),
    "policy/cloning": Metric("cloning loss", "", 0, "Flow-matching loss of the flow cloned beside the policy."),
    "policy/pull": Metric(
        "slope of Q", "", 0, "Norm of what Adjoint Matching goes back with: scale dQ/da at the chain's end."
    ),
    "policy/early_stop": Metric(
        "stopped early",
        "",
        0,
        "1 where the update ended early because the KL limit was reached.",
    ),
    "kl/ref": Metric("KL to the reference", "nats", 0, "KL of the policy to the frozen reference, per scored step."),
    "imitation/divergence": Metric(
        "distance to the expert",
        "nats",
        -1,
        "KL of what the agent does to what the expert did, as the learned reward's ratio tells it (Donsker-Varadhan).",
    ),
    "imitation/log_likelihood": Metric(
        "likelihood of decisions", "nats", 0, "Mean log-likelihood of each flow's own decisions, per number."
    ),
    "critic/loss": Metric("critic loss", "", -1, "Mean squared error of the critic's value."),
    "critic/explained_variance": Metric(
        "explained variance",
        "",
        1,
        "Share of the returns' variance that the critic foretold: 1 is all, 0 no better than their mean.",
    ),
    "optim/lr": Metric("learning rate", "", 0, "Learning rate of the last optimiser step."),
    "optim/grad_norm": Metric(
        "gradient norm",
        "",
        0,
        "Norm of the gradient before clipping; a spike announces trouble.",
    ),
    "optim/skipped_steps": Metric(
        "skipped steps", "steps", 0, "Optimiser steps skipped so far because the loss or the gradient was not finite."
    ),
    "optim/steps": Metric("optimiser steps", "steps", 0, "Optimiser steps taken."),
    "advantage/used_frac": Metric(
        "samples with a signal",
        "share",
        1,
        "Share of samples in groups whose rewards differ; the others teach nothing.",
    ),
    "advantage/abs_mean": Metric("advantage, mean size", "", 0, "Mean absolute advantage."),
    "time/rollout": Metric("sampling and scoring", "s", 0, "Seconds spent sampling and scoring in one iteration."),
    "time/update": Metric("update", "s", 0, "Seconds spent on the policy update in one iteration."),
    "time/eval": Metric("evaluation", "s", 0, "Seconds of one held-out evaluation."),
    "perf/samples_per_s": Metric(
        "images per second",
        "images/s",
        1,
        "Samples generated, scored and trained on per second.",
    ),
    "perf/network_rows": Metric(
        "network rows", "rows", 0, "Network evaluations of one row in this iteration; a backward pass counts as two."
    ),
    "cost/network_rows_total": Metric(
        "network rows in all",
        "rows",
        0,
        "Network evaluations since the start of the run.",
    ),
    "cost/samples_total": Metric(
        "images, or steps of simulators", "", 0, "Images made, or primitive steps taken in simulators, since the start."
    ),
    "iteration": Metric("iteration", "", 0, "Iterations of training."),
    "cost/train_seconds_total": Metric(
        "training time",
        "s",
        0,
        "Seconds of training since the start, evaluations left out.",
    ),
}

_PATTERNS: tuple[tuple[str, Metric], ...] = (
    (
        r"eval/task/(.+)",
        Metric("success at {}", "share", 1, "Share of the held-out episodes of the task '{}' that reached their goal."),
    ),
    (
        r"eval/heldout/(.+)",
        Metric("held-out {}", "", 1, "Held-out evaluation: {}."),
    ),
    (r"reward/(.+)/mean", Metric("reward {}", "reward", 1, "Mean of the reward '{}', before weights.")),
    (r"reward/(.+)/std", Metric("reward {}, standard deviation", "reward", 0, "Spread of the reward '{}'.")),
    (
        r"reward/(.+)/masked_frac",
        Metric("reward {}: no score", "share", -1, "Share of samples that the reward '{}' gave no score."),
    ),
    (
        r"reward/(.+)/errors",
        Metric("reward {}: errors", "calls", -1, "Calls of the reward '{}' that failed or were too late."),
    ),
    (r"reward/(.+)/seconds", Metric("reward {}: time", "s", 0, "Seconds spent in the reward '{}'.")),
    (
        r"policy/first_log_ratio/(.+)",
        Metric("first log-ratio, step {}", "nats", -1, "Largest |log ratio| before any update, at scored step {}."),
    ),
)


def describe(name: str) -> Metric:
    """Label, unit, direction and meaning of a metric; an unknown one is labelled with its own name."""
    if name in _FIXED:
        return _FIXED[name]
    for pattern, metric in _PATTERNS:
        if found := re.fullmatch(pattern, name):
            part = found.group(1).replace("_", " ")
            return metric._replace(label=metric.label.format(part), meaning=metric.meaning.format(part))
    return Metric(name, "", 0, "")


def headline(names: Iterable[str]) -> str | None:
    """What a verdict, `best` and a comparison go by: strict accuracy, else the first held-out metric with a better."""
    heldout = [name for name in names if name.startswith(HELDOUT)]
    return HEADLINE if HEADLINE in heldout else next((n for n in heldout if describe(n).better > 0), None)


MISSING = "\N{EN DASH}"


def order(name: str) -> tuple[int, str]:
    """Sort key: the order of this page, then the name."""
    return (list(_FIXED).index(name) if name in _FIXED else len(_FIXED), name)


def show(value: float, missing: str = MISSING) -> str:
    """A number for people: about four figures, thousands apart, `missing` where there is none."""
    if not math.isfinite(value):
        return missing
    if value == 0 or (float(value).is_integer() and abs(value) < 1e7):
        return f"{value:,.0f}"
    size = abs(value)
    if size >= 1e7 or size < 5e-4:
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def share(value: float) -> str:
    """Below 1 in size two decimals and no leading zero: .62, -.05; three below .1; other sizes as `show` does."""
    if not math.isfinite(value) or abs(value) >= 1 or value == 0:
        return show(value)
    text = f"{value:.3f}" if abs(value) < 0.0995 else f"{value:.2f}"
    return text.replace("0.", ".", 1) if abs(float(text)) < 1 else text


def signed(value: float) -> str:
    """`share` with its sign: +.21."""
    return "+" + share(value) if value > 0 else share(value)


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 05 s or 2 h 07 min."""
    if not math.isfinite(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
