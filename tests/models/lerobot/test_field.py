"""LeRobot's policies behind the adapter, on stand-ins with their loop: border, one prefix, saving back."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from rlflow.envs.simulators.tabletop import WORDS, Tabletop
from rlflow.envs.wrappers import Processed
from rlflow.flow.kernels import FlowSDE, LearnedNoise
from rlflow.flow.policy import FlowPolicy
from rlflow.flow.steps import All, OneRandom
from rlflow.models.io import save_field
from rlflow.models.lerobot.condition import again
from rlflow.models.lerobot.export import save_policy
from rlflow.models.lerobot.field import LeRobotField
from rlflow.rl.advantages import GAE
from rlflow.rl.collector import Collector
from rlflow.rl.groups import Groups
from rlflow.rl.learners.policy_gradient import PolicyGradient
from rlflow.rl.likelihoods.chain import ChainLikelihood
from rlflow.types import Tree

ROWS, K = 6, 4


def euler_integrate(denoise_fn, noise, num_steps, *, rtc_enabled=False):
    """LeRobot's loop: the one seam."""
    x = noise
    for step in range(num_steps):
        s = torch.full((len(x),), 1 - step / num_steps)
        x = x - denoise_fn(x, s) / num_steps
    return x


class Cache:
    """As transformers' DynamicCache: layers of keys and values, to which a step may append."""

    def __init__(self, pairs):
        self.layers = [SimpleNamespace(keys=k, values=v) for k, v in pairs]


class Model(nn.Module):
    """The loop of pi0 (`kind` "pi0": the state joins the actions) and of SmolVLA ("smolvla": it joins the prefix;
    "dicts": its cache as older versions have it)."""

    def __init__(self, config, kind):
        super().__init__()
        self.config, self.kind = config, kind
        self.vlm = nn.Linear(3, 8)
        self.word = nn.Embedding(len(WORDS), 8)
        self.state = nn.Linear(2, 8)
        self.query, self.enter = nn.Linear(8, 8), nn.Linear(config.max_action_dim + 1, 8)
        self.leave = nn.Linear(8, config.max_action_dim)
        self.prefixes = 0

    @torch.no_grad()
    def sample_actions(self, pixels: Tensor, text: Tensor, mask: Tensor, state: Tensor, noise: Tensor) -> Tensor:
        self.prefixes += 1
        tokens = torch.cat([self.vlm(pixels.mean((1, 2))).unsqueeze(1), self.word(text)], 1)
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
        if self.kind != "pi0":
            tokens = torch.cat([tokens, self.state(state).unsqueeze(1)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        keys, values = (v.unflatten(-1, (2, 4)) for v in (tokens.tanh(), tokens))
        if self.kind == "dicts":
            cache = {i: {"key_states": keys, "value_states": values + i} for i in range(2)}
        else:
            cache = Cache([(keys.transpose(1, 2), values.transpose(1, 2) + i) for i in range(2)])
        if not self.config.num_steps:
            return noise
        prefix_pad_masks, past_key_values, state = mask, cache, state if self.kind == "pi0" else None
        position_ids = torch.arange(len(tokens)).expand(3, -1)  # as EO-1's: rows are not the first axis
        return euler_integrate(
            lambda x, s: self.denoise_step(prefix_pad_masks, past_key_values, x, s, state) + 0 * position_ids[0, 0],
            noise,
            self.config.num_steps,
            rtc_enabled=self.config.rtc,
        )

    def denoise_step(self, prefix_pad_masks, past_key_values, x_t, timestep, state=None):
        h = self.enter(torch.cat([x_t, timestep[:, None, None].expand(*x_t.shape[:2], 1)], -1))
        h = h if state is None else h + self.state(state).unsqueeze(1)
        layers = past_key_values.values() if self.kind == "dicts" else [vars(v) for v in past_key_values.layers]
        for layer in list(layers):
            keys, values = (v if self.kind == "dicts" else v.transpose(1, 2) for v in layer.values())
            length = prefix_pad_masks.shape[1]
            weight = (self.query(h) @ keys.flatten(2)[:, :length].transpose(1, 2)).masked_fill(
                ~prefix_pad_masks.unsqueeze(1), -1e9
            )
            h = h + torch.tanh(weight.softmax(-1) @ values.flatten(2)[:, :length])
        if self.kind != "dicts":  # an unclean step, as some versions are
            for layer in past_key_values.layers:
                layer.keys = torch.cat([layer.keys, layer.keys], 2)
        return self.leave(h)


class Policy(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.config = SimpleNamespace(chunk_size=4, max_action_dim=6, num_steps=K, compile_model=False, rtc=False)
        self.model, self.kind = Model(self.config, kind), kind

    def reset(self) -> None:
        pass

    @torch.no_grad()
    def predict_action_chunk(self, batch: Tree, noise: Tensor | None = None) -> Tensor:
        self.eval()
        pixels = batch["observation.images.top"]
        noise = torch.randn(len(pixels), 4, 6) if noise is None else noise
        names = ("observation.language.tokens", "observation.language.attention_mask", "observation.state")
        return self.model.sample_actions(pixels, *(batch[n] for n in names), noise)[..., :2]

    def save_pretrained(self, folder: str) -> None:
        torch.save(self.state_dict(), f"{folder}/weights.pt")


def before(obs: Tree) -> Tree:
    """A preprocessor: the names and the ranges of LeRobot."""
    text = {"observation.language.tokens": obs["text"], "observation.language.attention_mask": obs["text"] > 0}
    return text | {"observation.images.top": obs["pixels"] / 255, "observation.state": obs["state"]}


def after(action: Tensor) -> Tensor:
    """A postprocessor: of the padded chunk, the two actions of two numbers that are carried out."""
    return action[:, :2, :2]


def environment() -> Processed:
    return Processed(Tabletop(ROWS, chunk=2, horizon=6), before, after, (4, 6))


def made(kind: str) -> LeRobotField:
    torch.manual_seed(0)
    return LeRobotField(Policy(kind), before(Tabletop(2).reset(torch.arange(2))))


def observed() -> Tree:
    return environment().reset(torch.arange(ROWS))


@pytest.fixture(params=["pi0", "smolvla", "dicts"])
def field(request) -> LeRobotField:
    return made(request.param)


def test_our_chain_without_noise_is_their_loop(field):
    noise = torch.randn(ROWS, 4, 6)
    theirs = field.policy.predict_action_chunk(observed(), noise)
    policy = FlowPolicy(field, FlowSDE(), num_steps=K)
    with torch.no_grad():
        ours = policy.sample(policy.encode(observed()), x_0=noise).final
    torch.testing.assert_close(ours[..., :2], theirs)


def test_the_predicted_data_is_theirs_at_every_time(field):
    """Their network says noise - data at time s = 1 - t, so x + (1 - t) v = x - s denoise_step(x, s)."""
    cond, x, t = field.encode(observed()), torch.randn(ROWS, 4, 6), torch.linspace(0.1, 0.9, ROWS)
    with torch.no_grad():
        v = field(x, t, torch.zeros(ROWS), cond)
        held = {name: rebuild(cond) for name, rebuild in field._rebuild.items()}
        data = x - (1 - t)[:, None, None] * again(field._denoise, held)(x, 1 - t)
    torch.testing.assert_close(x + (1 - t)[:, None, None] * v, data)


def test_a_step_that_appends_to_its_cache_changes_nothing(field):
    cond, x = field.encode(observed()), torch.randn(ROWS, 4, 6)
    with torch.no_grad():
        first, second = (field(x, torch.full((ROWS,), 0.5), torch.zeros(ROWS), cond) for _ in range(2))
    assert torch.equal(first, second)


def test_rows_of_a_condition_are_those_rows(field):
    x, rows = torch.randn(ROWS, 4, 6), torch.tensor([4, 1])
    with torch.no_grad():
        cond = field.encode(observed())
        some = field(x[rows], torch.full((2,), 0.5), torch.zeros(2), cond.index(rows))
        torch.testing.assert_close(some, field(x, torch.full((ROWS,), 0.5), torch.zeros(ROWS), cond)[rows])
    assert not torch.allclose(cond["pooled"][4], cond["pooled"][1])


def test_critics_read_the_state_itself(field):
    """In the prefix it is one token of many, or none: pi0's stands among the actions."""
    batch = observed()
    state = batch["observation.state"]
    assert torch.equal(field.encode(batch)["pooled"][:, -state.shape[1] :], state)


def test_padding_is_no_part_of_what_the_critic_reads(field):
    assert bool((observed()["observation.language.tokens"] == 0).any())
    pooled = field.encode(observed())["pooled"]
    with torch.no_grad():
        field.policy.model.word.weight[0] += 5  # the word that masked places hold
    torch.testing.assert_close(field.encode(observed())["pooled"], pooled, rtol=0, atol=0)


def test_what_the_velocity_reaches_trains_and_the_rest_is_frozen(field):
    trained = {n.partition(".")[0] for n, p in field.policy.model.named_parameters() if p.requires_grad}
    assert trained == {"query", "enter", "leave"} | ({"state"} if field.policy.kind == "pi0" else set())
    assert not FlowPolicy(field, FlowSDE()).encoder_trains


@pytest.mark.parametrize("joint", [False, True], ids=["flow_sde", "flow_noise"])
def test_training_runs_the_prefix_once_per_decision_and_plain_lerobot_runs_the_result(field, joint, tmp_path):
    model = field.policy.model
    kernel = LearnedNoise(field.num_features, field.event_shape) if joint else FlowSDE(0.5)
    policy = FlowPolicy(field, kernel, num_steps=K)
    steps, groups = All() if joint else OneRandom(skip_last=0), Groups(ROWS, 1)
    likelihood, env = ChainLikelihood("sum", joint=joint), environment()
    walker = Collector(env, policy, likelihood, steps, groups, horizon=4, mode="steps")
    model.prefixes, before_rl = 0, copy.deepcopy(field.policy.state_dict())
    rollout = walker.collect(0)
    assert model.prefixes == 4
    assert rollout.num_steps is not None
    assert int(rollout.num_steps.max()) == 2  # of the four actions in a chunk
    rollout.reward += torch.randn(rollout.reward.shape)
    metrics = PolicyGradient(policy, likelihood, GAE(), groups, epochs=2, ema_decay=0.5).update(rollout)
    assert model.prefixes == 4 + 2  # the last observations, and those where episodes were cut off
    assert metrics["policy/first_log_ratio_max"] == 0
    changed = {n.split(".")[1] for n, v in field.policy.state_dict().items() if not torch.equal(v, before_rl[n])}
    assert changed == {n.split(".")[1] for n, p in field.policy.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="save_policy"):
        save_field(field, tmp_path / "ours")
    save_policy(field, str(tmp_path))
    plain = Policy(field.policy.kind)
    plain.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    noise = torch.randn(ROWS, 4, 6)
    with torch.no_grad():
        ours = policy.sample(policy.encode(observed()), x_0=noise).final[..., :2]
    torch.testing.assert_close(plain.predict_action_chunk(observed(), noise), ours)


def test_what_cannot_be_wrapped_says_why():
    with pytest.raises(ValueError, match="no Euler loop"):
        LeRobotField(nn.Linear(2, 2), {})
    policy = Policy("pi0")
    policy.config.compile_model = True
    with pytest.raises(ValueError, match="compile_model=False"):
        LeRobotField(policy, observed())
    policy = Policy("pi0").requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze the action expert"):
        LeRobotField(policy, observed())
    policy = Policy("pi0")
    policy.config.num_steps = 0
    with pytest.raises(ValueError, match="without a denoising step"):
        LeRobotField(policy, observed())
