"""All that a training loop holds."""

from __future__ import annotations

from dataclasses import dataclass

from rlflow.assembly.environment import make_env
from rlflow.assembly.learner import make_algorithm, make_likelihood
from rlflow.assembly.policy import make_policy
from rlflow.config.processes import check_updates, share
from rlflow.config.schema import Config
from rlflow.config.steps import make_steps
from rlflow.flow.policy import FlowPolicy
from rlflow.parallel import dist
from rlflow.rl.algorithm import Algorithm
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups


@dataclass
class Parts:
    """Everything a training loop holds."""

    policy: FlowPolicy
    collector: Collector
    algorithm: Algorithm
    groups: Groups


def make_parts(config: Config, trust_code: bool = False) -> Parts:
    """Policy, environment, collector and learner of this process."""
    groups = share(config, dist.rank(), dist.world())
    policy = make_policy(config, trust_code)
    env = make_env(config, policy, groups, trust_code)
    likelihood = make_likelihood(config, trust_code)
    steps = make_steps(config, trust_code)
    horizon = config.env.horizon or env.horizon
    check_updates(config, groups, horizon)
    algorithm = make_algorithm(config, policy, likelihood, groups, env, trust_code)
    collector = Collector(
        env,
        policy,
        likelihood,
        steps,
        groups,
        seed=config.train.seed,
        horizon=horizon,
        mode=config.env.mode,
        rows_per_call=config.env.rows_per_call,
        sample_with=algorithm.sample_with,
        shared_noise=config.env.shared_noise,
        keep_path=algorithm.keep_path,
    )
    return Parts(policy, collector, algorithm, groups)
