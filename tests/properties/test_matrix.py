"""The combination matrix: everything runs with everything, or is refused at construction by one of at most 12 rules.

    kernel x steps x likelihood x advantage x algorithm x environment        6 x 9 x 4 x 3 x 10 x 2 = 12960

A combination that runs makes two optimiser steps from one rollout: the first ratio is 1, the second step's is not, all
metrics are finite and the weights change. The fast suite covers every pair of choices; `-m slow` runs the whole
product. RULES is the closed list of refusals; docs/matrix.md and docs/matrix.png come from it (scripts/draw_matrix.py).
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rlflow.envs.simulators.toy import ToyImage, ToyReach
from rlflow.flow.guidance import CFG
from rlflow.flow.kernels import CPS, Ancestral, ConstantSDE, FlowSDE, Kernel, LearnedNoise, Overshoot
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.solvers import Euler, Heun, Solver
from rlflow.flow.steps import All, AllButLast, Fraction, LastN, NoSteps, OneRandom, RandomWindow, Window
from rlflow.models.mlp import MLPField
from rlflow.rl.advantages import GAE, GroupAdvantage
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.learners.regularizers import KL
from rlflow.rl.likelihoods.base import Likelihood
from rlflow.rl.likelihoods.cfm import CFMLikelihood
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.rl.objectives.awm import AWM
from rlflow.rl.objectives.dgfs import DGFS
from rlflow.rl.objectives.divergence import FlowDPPO
from rlflow.rl.objectives.guard import Guard
from rlflow.rl.objectives.orw import ORW, ACFlow
from rlflow.rl.optim import AdamW

KERNELS: dict[str, Callable[[tuple[int, ...]], Kernel]] = {
    "flow_sde": lambda _: FlowSDE(0.7),
    "constant_sde": lambda _: ConstantSDE(0.3),
    "cps": lambda _: CPS(0.7),
    "ancestral": lambda _: Ancestral(0.7),
    "overshoot": lambda _: Overshoot(0.5),
    "learned_noise": lambda shape: LearnedNoise(4, shape, 0.1, 0.3, width=8),
}
STEPS = {
    "none": NoSteps(),
    "all": All(),
    "all_but_last": AllButLast(),
    "last_n": LastN(2),
    "window": Window(size=2, skip_last=1),
    "window (flash)": Window(size=2, skip_last=1, compress=0.8),
    "random_window": RandomWindow(2),
    "one_random": OneRandom(),
    "fraction": Fraction(0.6),
}
LIKELIHOODS: dict[str, Likelihood] = {
    "mean": ChainLikelihood("mean"),
    "sum": ChainLikelihood("sum"),
    "joint": ChainLikelihood("sum", joint=True),
    "cfm": CFMLikelihood(2, joint=False),
}
ADVANTAGES = {"group": GroupAdvantage("group"), "epoch": GroupAdvantage("epoch"), "gae": GAE()}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guard": {"objective": Guard},
    "flow_dppo": {"objective": FlowDPPO},
    "dgfs": {"objective": DGFS},
    "awm": {"objective": AWM},
    "orw": {"objective": ORW},
    "ac_flow": {"objective": ACFlow},
    "kl exact": {"kl": KL(0.1, "exact")},
    "kl velocity": {"kl": KL(0.1, "velocity")},
    "kl released": {"kl": KL(0.1, "released")},
}
HOLDS = {"guard": ("mean", "sum"), "flow_dppo": ("mean", "sum"), "dgfs": ("sum",)}
HOLDS |= dict.fromkeys(("awm", "orw", "ac_flow"), ("cfm",))
"""Likelihoods whose evidence the formula of an objective holds for; of others any."""
ENVS = {"image": ToyImage, "reach": ToyReach}
AXES = (KERNELS, STEPS, LIKELIHOODS, ADVANTAGES, ALGORITHMS, ENVS)


class Combination(NamedTuple):
    """One choice per axis, by name."""

    kernel: str
    steps: str
    likelihood: str
    advantage: str
    algorithm: str
    env: str


@dataclass(frozen=True)
class Extra:
    """Settings beside the six axes, which rules 5 to 12 are about."""

    solver: Solver | None = None
    num_steps: int = 4
    flow_map: bool = False
    guidance: float | None = None
    group_size: int = 4
    entropy: float = 0.0
    mode: str = "episodes"
    shared_noise: bool = False


@dataclass(frozen=True)
class Rule:
    """A refusal: which combinations, the words of its error, and why."""

    what: str
    message: str
    why: str
    applies: Callable[[Combination], bool] = lambda c: False
    example: tuple[Combination, Extra] | None = None


USUAL = Combination("flow_sde", "all_but_last", "mean", "group", "plain", "image")

RULES = (
    Rule(
        "the density of a chain without scored steps (`steps: none`)",
        "NoSteps scores no step: use steps=all_but_last",
        "with nothing scored there is no density and no ratio; `cfm` needs none",
        lambda c: c.steps == "none" and c.likelihood != "cfm",
    ),
    Rule(
        "CPS, Ancestral or Overshoot with the last step scored (`all`, `last_n` without `skip_last`)",
        "has zero std at step .* use steps=all_but_last",
        "their noise ends before the data does: the last step is an ODE step and has no density",
        lambda c: c.kernel in ("cps", "ancestral", "overshoot") and c.steps in ("all", "last_n"),
    ),
    Rule(
        "an objective with evidence that its formula does not hold for",
        "GRPO-Guard|set likelihood=",
        "AWM, ORW and AC-Flow are losses of single draws of `cfm`; Flow-DPPO bounds the KL of a single step, DGFS adds "
        "log-densities of them in nats; Guard re-scales the ratio of each step by that step's std and dt, which a sum over steps and a matching loss "
        "have not; E[log r] = -|dmu|²/(2 S²), which it adds back, holds for one fixed S, and a noise net would be "
        "trained on the bias",
        lambda c: (
            c.likelihood not in HOLDS.get(c.algorithm, (c.likelihood,))
            or (c.algorithm == "guard" and c.kernel == "learned_noise")
        ),
    ),
    Rule(
        "the released KL with learned noise or `cfm`",
        "use kl.kind=exact",
        "Flow-GRPO's |dmu|²/(2 g²) has one fixed g and no term for the std; a matching loss has no g",
        lambda c: c.algorithm == "kl released" and (c.kernel == "learned_noise" or c.likelihood == "cfm"),
    ),
    Rule(
        "`cfm` with guidance, or on a distilled network",
        r"or likelihood.allow_(guided|distilled)=true",
        "neither is E[x_1 - x_0 | x_t] of its own samples: the loss would pull where all advantages are equal, and "
        "undo the distillation; the overrides train the field inside the guidance, and the network all the same",
        example=(USUAL._replace(likelihood="cfm"), Extra(guidance=3.0)),
    ),
    Rule(
        "a scored step with kappa = |dmean/dv| / std above 5",
        r"kappa = .* exclude them .*skip_last.* or raise policy.max_kappa",
        "rounding of the network, multiplied by kappa, would swamp the log-ratio; the limit is a setting",
        example=(USUAL._replace(kernel="learned_noise", steps="all"), Extra(num_steps=1)),
    ),
    Rule(
        "`one_random` with a solver other than Euler",
        "mixes noisy and ODE rows in one step.* use solver=euler",
        "in each step some rows are noisy and others are not, and both must share one network call",
        example=(USUAL._replace(steps="one_random"), Extra(solver=Heun())),
    ),
    Rule(
        "FlowSDE, ConstantSDE, CPS, a second-order solver or `cfm` on a flow map",
        "dt = 0 branch",
        "they need the velocity of an instant, and a network trained on averages alone does not know it",
        example=(USUAL, Extra(flow_map=True)),
    ),
    Rule(
        "group advantages in groups of one",
        "set group_size >= 2, or use advantage=gae",
        "a sample cannot be compared with itself",
        example=(USUAL, Extra(group_size=1)),
    ),
    Rule(
        "an entropy bonus for a kernel of fixed std, or with `cfm`",
        "use entropy=0",
        "the entropy of a step is that of its std; without a noise net it has no gradient, without steps there is none",
        example=(USUAL, Extra(entropy=0.1)),
    ),
    Rule(
        "`shared_noise` beyond one step, or without any noise after the start",
        "use shared_noise=false",
        "after the first step the rows of a group are in different states; without noise they would be the same sample",
        example=(USUAL._replace(env="reach"), Extra(shared_noise=True)),
    ),
    Rule(
        "mode `steps` with episodes of one step",
        "use mode=episodes",
        "there is nothing to carry over, and the prompts would never change",
        example=(USUAL, Extra(mode="steps")),
    ),
)


def rules_of(c: Combination) -> list[int]:
    """Numbers (from 1) of the rules that refuse a combination of the six axes."""
    return [i for i, rule in enumerate(RULES, 1) if rule.applies(c)]


def matching(error: Exception) -> list[int]:
    """Numbers of the rules whose words an error has."""
    return [i for i, rule in enumerate(RULES, 1) if re.search(rule.message, str(error))]


def build(c: Combination, extra: Extra | None = None) -> tuple[Collector, PolicyGradient]:
    """Everything a run constructs; ValueError where it is refused."""
    extra = extra or Extra()
    torch.manual_seed(0)
    groups = Groups(2, extra.group_size)
    env = ENVS[c.env](groups.num_rows)
    field = MLPField(4, env.action_shape, width=8, depth=1, average=extra.flow_map)
    field.has_instantaneous = not extra.flow_map
    if extra.guidance is not None:
        field = CFG(field, extra.guidance)
    kernel, steps, likelihood = KERNELS[c.kernel](env.action_shape), STEPS[c.steps], LIKELIHOODS[c.likelihood]
    policy = FlowPolicy(field, kernel, extra.solver or Euler(), num_steps=extra.num_steps).double()
    policy.check_steps(steps)
    walker = Collector(
        env,
        policy,
        likelihood,
        steps,
        groups,
        horizon=env.horizon,
        mode=extra.mode,
        shared_noise=extra.shared_noise,
    )
    settings = {"epochs": 2, "entropy": extra.entropy, "optimizer": AdamW(lr=1e-3)} | ALGORITHMS[c.algorithm]
    if "objective" in settings:
        settings["objective"] = settings["objective"](likelihood)
    learner = PolicyGradient(policy, likelihood, ADVANTAGES[c.advantage], groups, **settings)
    learner.objective.check_steps(steps(0, policy.grid(policy.num_steps), groups.row_ids()))
    return walker, learner


def run(c: Combination) -> str:
    """'' where two optimiser steps went well, else what was wrong; ValueError where refused."""
    walker, learner = build(c)
    before = [p.detach().clone() for p in learner.optimizer.parameters]
    metrics = learner.update(walker.collect(0))
    changed = any(not torch.equal(p, q) for p, q in zip(learner.optimizer.parameters, before, strict=True))
    wrong = [
        ("not two optimiser steps", metrics["optim/steps"] != 2),
        ("the weights did not change", not changed),
        ("the first ratio is not 1", metrics["policy/first_log_ratio_max"] > 1e-13),
        ("the second step saw the first one's weights", not metrics.get("policy/approx_kl", 1.0) > 0),
        ("no KL", c.algorithm.startswith("kl") and not metrics["kl/ref"] > 0),
        ("no critic", c.advantage == "gae" and "critic/loss" not in metrics),
        *((f"{name} = {v}", True) for name, v in metrics.items() if not math.isfinite(v)),
    ]
    return ", ".join(text for text, bad in wrong if bad)


def product() -> list[Combination]:
    """All combinations, in a fixed order."""
    return [Combination(*names) for names in itertools.product(*AXES)]


def pairwise(combinations: Iterable[Combination]) -> list[Combination]:
    """Few of the combinations that have every pair of choices any of them has: greedily the one with most new pairs."""
    bit: dict[tuple[tuple[int, str], ...], int] = {}
    masks = {}
    for c in combinations:
        pairs = itertools.combinations(enumerate(c), 2)
        masks[c] = sum(1 << bit.setdefault(p, len(bit)) for p in pairs)
    left, chosen = (1 << len(bit)) - 1, []
    while left:
        best = max(masks, key=lambda c: (masks[c] & left).bit_count())
        left &= ~masks[best]
        chosen.append(best)
    return chosen


ALL = product()
RUNS, REFUSED = [c for c in ALL if not rules_of(c)], [c for c in ALL if rules_of(c)]


def check(c: Combination) -> str:
    """'' where the combination does what RULES says, else what it did."""
    expected = rules_of(c)
    try:
        wrong = run(c)
    except ValueError as error:
        found = matching(error)
        return "" if len(found) == 1 and found[0] in expected else f"refused by {found}, not {expected}: {error}"
    return f"runs, although rules {expected} refuse it" if expected else wrong


@pytest.mark.parametrize("c", pairwise(RUNS), ids="-".join)
def test_every_pair_of_choices_runs(c):
    assert check(c) == ""


@pytest.mark.parametrize("c", pairwise(REFUSED), ids="-".join)
def test_every_refused_pair_of_choices_is_refused_at_construction(c):
    assert check(c) == ""
    with pytest.raises(ValueError, match=r"use|set|skip_last"):  # before anything is sampled, with the fix
        build(c)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_whole_product(kernel):
    """About five minutes of one core in all."""
    wrong = {c: found for c in ALL if c.kernel == kernel and (found := check(c))}
    assert wrong == {}


class TestRules:
    def test_are_at_most_twelve_and_each_refuses_something(self):
        assert len(RULES) <= 12
        for i, rule in enumerate(RULES, 1):
            assert rule.example or any(i in rules_of(c) for c in REFUSED), rule.what

    @pytest.mark.parametrize(
        "rule", [pytest.param(r, id=str(i)) for i, r in enumerate(RULES, 1) if r.example is not None]
    )
    def test_those_beside_the_axes_refuse_their_example_alone(self, rule):
        """The same combination without the extra setting runs."""
        c, extra = rule.example
        with pytest.raises(ValueError, match=rule.message) as caught:
            build(c, extra)
        assert [RULES[i - 1] for i in matching(caught.value)] == [rule]
        assert run(c) == ""

    def test_leave_most_combinations_alone(self):
        """A matrix that refuses everything would pass all of the above."""
        assert len(ALL) == 12960
        assert len(RUNS) > 4500

    def test_the_page_lists_them(self):
        page = (Path(__file__).parents[2] / "docs" / "matrix.md").read_text(encoding="utf-8")
        assert page == markdown(), "run scripts/draw_matrix.py"


class TestPairwise:
    def test_has_every_pair_and_is_short(self):
        def pairs(some: Iterable[Combination]) -> set[Any]:
            return {p for c in some for p in itertools.combinations(enumerate(c), 2)}

        few = pairwise(RUNS)
        assert pairs(few) == pairs(RUNS)
        assert len(few) < 100


def markdown() -> str:
    """docs/matrix.md."""
    axes = "\n".join(
        f"| {name} | {', '.join(f'`{choice}`' for choice in axis)} |"
        for name, axis in zip(Combination._fields, AXES, strict=True)
    )
    cells = [(str(i), rule.what, rule.why) for i, rule in enumerate(RULES, 1)]
    rules = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in cells)
    return f"""# What can be combined

![{len(ALL)} combinations, run](matrix.png)

| axis | choices |
|---|---|
{axes}

Of the {len(ALL)} combinations {len(RUNS)} run: two optimiser steps from one rollout, the first ratio 1 and the second not,
finite metrics, changed weights. The other {len(REFUSED)} are refused before anything is sampled, and the error names the
fix. The list of refusals is closed, and a test holds it to twelve rules.

| rule | refused | why |
|---|---|---|
{rules}

Rules 1 to 4 show in the picture; the others are about settings beside these six axes. Arithmetic that does not work
out (a window longer than the grid, groups that do not divide among processes or minibatches) is an error too, and no
rule.

Four combinations that look odd and are right:

- **The velocity KL with learned noise** is |v - v_ref|², whatever the noise net does: it holds the velocity, as an
  anchor to the pre-trained policy does, and leaves exploration free. The exact KL holds both.
- **A joint ratio over some of the steps** (`one_random`, `fraction`, windows) is the ratio of those steps given the
  rest. At the weights of the rollout its gradient is that of the chain's density for the steps scored, exactly as it is
  step by step.
- **`cfm` with a noisy plan** trains on the samples that the plan makes; its score is the matching loss of the sample,
  whatever path led to it, and the noise of the path is not scored.
- **A group advantage on the robot** compares whole episodes from one start; a row whose reward failed at any step has
  no return and is masked, and never counts as zero.

The picture and this page are made by `python scripts/draw_matrix.py`, which runs every combination;
`pytest -m slow tests/properties/test_matrix.py` asserts the same.
"""
