"""Trainer: the one loop, `algorithm.update(collector.collect(iteration))`, and what stands around it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlflow.assembly.evaluator import judged_by, make_evaluator
from rlflow.assembly.parts import make_parts
from rlflow.assembly.policy import whole_field
from rlflow.config import recipes
from rlflow.config.schema import Config
from rlflow.config.stopping import StopRules
from rlflow.evaluation.episodes import Episodes
from rlflow.evaluation.images import Evaluation
from rlflow.failures import sized_by
from rlflow.flow.noise import generator
from rlflow.models.io import save_field
from rlflow.parallel import dist, shards
from rlflow.report.glossary import HELDOUT, headline
from rlflow.rl.collector import permute_rewards
from rlflow.rl.learners.passes import size_passes
from rlflow.rl.optim import NonFiniteError
from rlflow.train.budget import Budget
from rlflow.train.callbacks import AfterIteration, Callback, Each
from rlflow.train.checkpoint import Checkpoints
from rlflow.train.folder import RunFolder, default_run
from rlflow.train.logger import RunLogger, import_wandb
from rlflow.train.rollout_metrics import rollout_metrics
from rlflow.train.signals import Signals
from rlflow.train.state import state_of, take_up
from rlflow.types import Rollout


class Trainer:
    """Train a recipe into a run folder.

    `config` is a recipe name, a .yaml path, a Config, or a dict of sections as in a recipe (`base` too), in which a
    component may be the function or class itself. A callback is a `Callback`, or a function that is called after
    every iteration with (trainer, iteration, metrics).
    """

    def __init__(
        self,
        config: str | Mapping[str, Any] | Config,
        run: str | Path | None = None,
        *,
        overrides: Sequence[str] = (),
        resume: str | Path | None = None,
        callbacks: Sequence[Callback | AfterIteration] = (),
        trust_code: bool = False,
        quiet: bool = False,
    ):
        self.recipe = config if isinstance(config, str) else "custom"
        self.config = recipes.load(config, overrides, trust_code)
        if run == "":
            raise ValueError("run: must not be empty: leave it out, or name a folder")
        self.run = Path(run) if run is not None else default_run(self.recipe)
        self.callbacks = [c if isinstance(c, Callback) else Each(c) for c in callbacks]
        self.quiet = quiet
        if self.config.train.threads:
            torch.set_num_threads(self.config.train.threads)
        dist.start()
        self._resumed = resume is not None
        self.folder = RunFolder(self.run, self.config, self.recipe, self._resumed)
        try:
            self.folder.enter()
            self._prepare(resume, trust_code)
        except BaseException:
            self.folder.leave()
            raise

    def stop(self) -> None:
        """Ask `fit` to end after this iteration, with a checkpoint; for callbacks and signals."""
        self._stop_asked = True

    def _tell(self, event: Callable[[Callback], None]) -> None:
        for callback in self.callbacks:
            event(callback)

    # -- set-up -----------------------------------------------------------------------------------

    def _prepare(self, resume: str | Path | None, trust_code: bool) -> None:
        """All that trains, from its start or a checkpoint."""
        config = self.folder.at_hand(trust_code)
        with sized_by("setting up the run", self.config, "env.num_groups", "env.group_size"):
            parts = make_parts(config, trust_code)
        self.policy, self.collector, self.algorithm, self.groups = (
            parts.policy,
            parts.collector,
            parts.algorithm,
            parts.groups,
        )
        if self.config.train.wandb is not None:  # what would otherwise end the run after its folder was written
            import_wandb()
        self.evaluator = make_evaluator(config, self.policy, trust_code)
        self.checkpoints = Checkpoints(self.run, self.config.train.keep, self.config.to_dict())
        self.iteration, self.seconds, self.network_rows, self.samples = 0, 0.0, 0, 0
        self.last_eval: dict[str, float] = {}
        self.interrupted = False
        """True when a signal or a callback ended `fit` before the budget."""
        self.stops = StopRules(self.config.train.stop_when if dist.rank() == 0 else ())
        """`stops.reason`, of rank 0, says which rule of `train.stop_when` ended the run, if one did."""
        self._stop_asked = self._warned = False
        self.evaluated, self.headline = -1, ""
        """Which iteration's weights `last_eval` is of, and the metric of it by which `best` goes."""
        self._last_good = 0
        if resume is not None:
            self._load(resume)

    # -- the loop ---------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train until the budget is spent; returns the last evaluation's metrics.

        SIGINT and SIGTERM finish the iteration, save a checkpoint and return.
        """
        self._stop_asked = False
        try:
            facts: dict[str, Any] = {"device": str(self.policy.device), "weights": self.config.eval.weights}
            if self.config.train.passes == "auto":
                noted = self.folder.noted("passes") if self._resumed else None
                facts["passes"] = size_passes(self.collector, self.algorithm, noted, self.config.train.passes_gib)
            self.folder.begin(facts, self.iteration)
            return self._fit()
        finally:
            self.folder.leave()

    def _fit(self) -> dict[str, float]:
        train = self.config.train
        with (
            RunLogger(
                self.run if dist.rank() == 0 else None,
                total_iterations=train.iterations,
                minutes=train.minutes,
                config=self.config.to_yaml() if train.tensorboard or train.wandb is not None else "",
                tensorboard=train.tensorboard,
                wandb=train.wandb,
                quiet=self.quiet or dist.rank() > 0,
            ) as self.logger,
            Signals(self.stop),
        ):
            self.logger.cut(self.iteration, self.evaluated)
            self._tell(lambda c: c.on_start(self))
            if self.iteration == 0 and self.evaluated < 0:
                self.algorithm.begin()
                self._evaluate()
            try:
                self._loop()
            except NonFiniteError as error:
                self._report()
                raise NonFiniteError(f"{error}. {self.checkpoints.ways_on(self._last_good)}") from None
            self._warn_of_no_step()
            if self.evaluated != self.iteration and not self.interrupted:
                self._evaluate()
            self._save()
            self.folder.end(self.stops.reason)
            self._finish()
            self._tell(lambda c: c.on_end(self))
        return self.last_eval

    def _loop(self) -> None:
        """Iterations until the budget is spent or someone asks to stop."""
        while not self._done():
            metrics = self._one()
            self.logger.log(self.iteration, "train", metrics)
            self.stops.see(self.iteration, metrics)
            self._warn_of_no_score(metrics)
            self.logger.progress(self.iteration, metrics | self.last_eval, self.seconds)
            for callback in self.callbacks:
                callback.on_iteration(self, self.iteration, metrics)
            self._periodic()

    def _one(self) -> dict[str, float]:
        """One iteration: collect, (permute,) update."""
        start, cost = time.perf_counter(), self.policy.network_cost
        self.algorithm.set_progress(self._progress())
        with sized_by("the rollout", self.config, "env.rows_per_call", "env.num_groups", "env.group_size"):
            rollout = self.collector.collect(self.iteration)
        if self.config.train.permute_rewards:
            permute_rewards(rollout, generator("control", self.config.train.seed, self.iteration))
        self._tell(lambda c: c.on_rollout(self, rollout))
        middle = time.perf_counter()
        metrics = self.collector.env.metrics() | rollout_metrics(rollout)
        with sized_by("the update", self.config, *self.config.algorithm.sizes):
            metrics |= self.algorithm.update(rollout)
        if not self.algorithm.optimizer.bad_in_a_row:
            self._last_good = self.iteration + 1
        end = time.perf_counter()
        self.iteration += 1
        # the same on every rank: the learning rate and the end of the run depend on them
        device = self.policy.device
        seconds = float(dist.all_max(torch.tensor(end - start, dtype=torch.float64, device=device)))
        spent = int(dist.all_sum(torch.tensor(self.policy.network_cost - cost, device=device)))
        samples = self._samples(rollout)
        self.seconds += seconds
        self.network_rows += spent
        self.samples += samples
        return metrics | {
            "time/rollout": middle - start,
            "time/update": end - middle,
            "perf/samples_per_s" if rollout.num_steps is None else "perf/env_steps_per_s": samples / seconds,
            "perf/network_rows": float(spent),
            **self._cost(),
        }

    def _samples(self, rollout: Rollout) -> int:
        """Images, or primitive steps of the simulator, of all ranks."""
        if rollout.num_steps is None:
            return self.groups.total_rows * len(rollout.reward)
        return int(dist.all_sum(rollout.num_steps.sum()))

    def _cost(self) -> dict[str, float]:
        """Spent since the start of the run."""
        return {
            "cost/network_rows_total": float(self.network_rows),
            "cost/samples_total": float(self.samples),
            "cost/train_seconds_total": self.seconds,
        }

    def _warn_of_no_score(self, metrics: dict[str, float]) -> None:
        """Say once that a whole iteration had no score: it teaches nothing, and no error will end the run."""
        if metrics["reward/masked_frac"] < 1 or self._warned or dist.rank() > 0:
            return
        self._warned = True
        warnings.warn(
            f"no sample of iteration {self.iteration} has a score from every reward, so nothing was learnt from it: "
            "look at reward/<name>/masked_frac for the one that gives None, nan or an error",
            stacklevel=2,
        )

    def _warn_of_no_step(self) -> None:
        """Say that a run ended before its learner began."""
        if self.algorithm.optimizer.steps or self.interrupted or not self.iteration or self._warned or dist.rank() > 0:
            return
        waits = [f"algorithm.{n}" for n in ("start", "warmup") if getattr(self.config.algorithm, n, 0)]
        why = f"it waits for {' and '.join(waits)}" if waits else "nothing it saw gave a gradient"
        warnings.warn(f"the policy never took a step in {self.iteration} iterations: {why}", stacklevel=2)

    def _progress(self) -> float:
        """Share of the budget that is spent; 0 where there is none."""
        budget = Budget(self.config.train.iterations, self.config.train.minutes)
        share = budget.done(self.iteration, self.seconds)
        return 0.0 if math.isnan(share) else share

    def _done(self) -> bool:
        """Budget spent, a rule of `stop_when` holds, or any rank was asked to stop."""
        over, asked = self._any(bool(self.stops.reason)) or self._progress() >= 1.0, self._any(self._stop_asked)
        self.interrupted = asked and not over
        return over or asked

    def _any(self, mine: bool) -> bool:
        """True on every rank where any says so; all have to ask at once."""
        return bool(dist.all_max(torch.tensor(float(mine), device=self.policy.device)))

    def _periodic(self) -> None:
        every = self.config.eval.every
        if every and self.iteration % every == 0:
            self._evaluate()
        if self.iteration % self.config.train.checkpoint_every == 0 and not self.algorithm.optimizer.bad_in_a_row:
            self._save()

    # -- evaluation -------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Evaluate held out; logs, and writes the per-sample scores and what one would rather look at."""
        start = time.perf_counter()
        with sized_by("evaluation", self.config, "eval.rows_per_call"):
            result = self.evaluator(self.config.eval.weights)
        self.last_eval = {f"{HELDOUT}{n}": v for n, v in result.means().items()}
        self.evaluated = self.iteration
        self.headline = (headline(self.last_eval) or "").removeprefix(HELDOUT)
        told = self.last_eval | {f"eval/task/{name}": share for name, share in result.by_task().items()}
        self.logger.log(self.iteration, "eval", told | self._cost() | {"time/eval": time.perf_counter() - start})
        self.stops.see(self.iteration, told)
        if dist.rank() == 0:
            self._keep(result)
        if self._is_best():
            self._write_checkpoint()
        dist.barrier()
        self._tell(lambda c: c.on_evaluation(self, told))

    def _is_best(self) -> bool:
        """True for a score above all checkpoints'; rank 0 looks, and all hear of it, for all take part in saving."""
        sound = self._finite() and dist.rank() == 0 and not self.algorithm.optimizer.bad_in_a_row
        return self._any(sound and self.checkpoints.beats_best(self._score()))

    def _score(self) -> float | None:
        """What `best` goes by; None unless these very weights were evaluated."""
        score = self.last_eval.get(f"{HELDOUT}{self.headline}", math.nan)
        return score if self.evaluated == self.iteration and math.isfinite(score) else None

    def _keep(self, result: Evaluation | Episodes) -> None:
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        result.save(folder / f"eval_{self.iteration:06d}.safetensors")
        self.logger.show(self.iteration, result.show(folder, self.iteration, self.config.eval.grid))

    # -- files ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs; complete on rank 0, and every process has to ask for it at once."""
        return state_of(self)

    def _save(self) -> None:
        self._check_weights()
        self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        state, sound = self.state_dict(), not self.algorithm.optimizer.bad_in_a_row
        if dist.rank() == 0:
            self.checkpoints.save(self.iteration, state, self._score() if sound else None, prune=sound)
        dist.barrier()
        self._tell(lambda c: c.on_checkpoint(self, self.checkpoints.folder / f"{self.iteration:06d}"))

    def _finite(self) -> bool:
        """Whether the weights of all sets are; the same on every rank."""
        stored = [v for weights in self.policy.weights.sets.values() for v in weights.values()]
        return shards.finite([*self.algorithm.optimizer.parameters, *stored])

    def _check_weights(self) -> None:
        """NonFiniteError before such weights, live or of another set, become the last checkpoint."""
        if not self._finite():
            setting = self.algorithm.optimizer.setting
            raise NonFiniteError(f"the weights are not finite after iteration {self.iteration}: lower {setting}")

    def _load(self, which: str | Path) -> None:
        if which == "last" and not self.checkpoints.all():
            return  # killed before its first checkpoint: the run begins again
        path, (iteration, state) = self.checkpoints.path(which), self.checkpoints.load(which)
        take_up(self, path, state)
        self.iteration = self._last_good = iteration
        if dist.rank() == 0:
            self.checkpoints.cut(iteration)

    def _finish(self) -> None:
        """The tuned network as a checkpoint folder, and the report."""
        with self.policy.using(self.config.eval.weights), whole_field(self.policy, self.config) as field:
            if dist.rank() == 0:
                about = {"run": str(self.run), "recipe": self.recipe}
                save_field(field, self.run / "model", about, judged_by(self.config))
        self._report()

    def _report(self) -> None:
        from rlflow.report.report import write_report

        if self.config.train.report and dist.rank() == 0:
            write_report(self.run)
