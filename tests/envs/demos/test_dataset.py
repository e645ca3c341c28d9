"""Demonstrations on disk: what is written is read, chunks stay inside episodes, broken folders are named."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlflow.envs.demos.dataset import Demos, Episode, write_demos
from rlflow.envs.demos.demonstrators import DEMONSTRATORS, demonstrator, make_demos
from rlflow.envs.demos.experts import GaussianExpert, play
from rlflow.envs.demos.identity import differences
from rlflow.envs.simulators.toy import ToyReach
from rlflow.parallel.moments import scale

LENGTHS = [7, 3, 12, 5, 4]


def episodes(pixels: bool = False) -> list[Episode]:
    """Observation and action of step i of episode e are e + i / 100."""
    made = []
    for e, length in enumerate(LENGTHS):
        mark = e + torch.arange(length) / 100
        obs = mark[:, None] * torch.tensor([1.0, -2.0])
        tree = {"state": obs, "pixels": (mark[:, None, None, None] * 10).byte().expand(-1, 3, 2, 2)} if pixels else obs
        made.append(Episode(tree, mark[:, None], torch.ones(length), e % 2 == 0, e % 2 == 1, success=e > 2))
    return made


@pytest.fixture
def demos(tmp_path) -> Demos:
    return write_demos(tmp_path / "d", episodes(), {"name": "hopper"}, {"seed": 1}, shard_rows=10, bound=None)


def test_round_trip_over_shards(demos):
    assert [len(s["action"]) for s in demos.shards] == [10, 12, 9]
    joined = torch.cat([e.obs for e in episodes()])
    index = torch.randperm(31)
    assert torch.equal(demos.observations(index), joined[index])
    assert torch.equal(demos.actions(index), torch.cat([e.action for e in episodes()])[index])
    assert demos.env == {"name": "hopper"}
    assert demos.about["made_by"] == {"seed": 1}
    assert demos.action_shape == (1,)


def test_table_of_episodes(demos):
    assert [e["start"] for e in demos.episodes] == [0, 7, 10, 22, 27]
    assert [e["length"] for e in demos.episodes] == LENGTHS
    assert demos.mean_return == sum(LENGTHS) / 5
    assert [(e["terminated"], e["truncated"], e["success"]) for e in demos.episodes[2:4]] == [
        (True, False, False),
        (False, True, True),
    ]


def test_moments_are_those_of_all_observations(demos):
    obs = torch.cat([e.obs for e in episodes()]).double()
    torch.testing.assert_close(demos.moments[1], obs.mean(0))
    torch.testing.assert_close(scale(demos.moments), obs.std(0, correction=0))


def test_pixels_stay_bytes_and_out_of_the_moments(tmp_path):
    demos = write_demos(tmp_path, episodes(pixels=True), {"name": "pusht"}, {}, bound=None)
    obs = demos.observations(torch.tensor([0, 22]))
    assert obs["pixels"].dtype == torch.uint8
    assert obs["pixels"][:, 0, 0, 0].tolist() == [0, 30]
    assert obs["state"].dtype == torch.float32
    assert demos.moments.shape == (3, 2)


def test_shards_are_mapped_not_copied(demos):
    """What another program writes into the file is seen: nothing was read into memory."""
    path = demos.folder / "00000.safetensors"
    value = demos.shards[0]["reward"]
    raw = bytearray(path.read_bytes())
    place = raw.index(torch.ones(10).numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(place)
        file.write(torch.full((1,), 5.0).numpy().tobytes())
    assert value[0] == 5


@pytest.mark.parametrize("num", [1, 2, 4])
def test_chunks_never_straddle_an_end_and_miss_nothing(demos, num):
    chunks = demos.chunks(num)
    assert len(chunks) == sum(max(0, length - num + 1) for length in LENGTHS)
    obs, action = chunks[torch.arange(len(chunks))]
    assert action.shape == (len(chunks), num, 1)
    assert torch.equal(action[:, 0], obs[:, :1])
    assert (action.floor() == action[:, :1].floor()).all()  # one episode
    steps = action.diff(dim=1)
    torch.testing.assert_close(steps, torch.full_like(steps, 0.01), atol=1e-5, rtol=0)


def test_held_out_episodes_are_not_trained_on(demos):
    train, held_out = demos.split(every=2)
    assert [len(d.episodes) for d in (train, held_out)] == [3, 2]
    assert not set(train.chunks(2).starts.tolist()) & set(held_out.chunks(2).starts.tolist())
    assert len(train.chunks(2)) + len(held_out.chunks(2)) == len(demos.chunks(2))
    assert len(demos.split(every=100)[1].episodes) == 1


def test_batches_are_a_function_of_the_generator(demos):
    (first, _), (again, _) = (next(demos.chunks(2).batches(8, torch.Generator().manual_seed(3))) for _ in range(2))
    assert torch.equal(first, again)


def one(length: int = 4, **changes) -> Episode:
    """An episode of the Hopper, but for the changes."""
    rows = {"obs": torch.zeros(length, 2), "action": torch.zeros(length, 1), "reward": torch.ones(length)}
    return Episode(**(rows | {"terminated": True, "truncated": False} | changes))


def seen_twice(value: float) -> torch.Tensor:
    return torch.tensor([[0.0, 0.0], [0.0, 0.0], [value, 0.0], [0.0, 0.0]])


class TestWriting:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_arrays_are_what_tensors_are(self, tmp_path, dtype):
        rng = np.random.default_rng(0)
        arrays = {"obs": rng.normal(size=(4, 2)), "action": rng.uniform(-1, 1, (4, 1)), "reward": rng.normal(size=4)}
        arrays = {name: value.astype(dtype) for name, value in arrays.items()}
        ends = {"terminated": np.True_, "truncated": np.False_, "success": np.bool_(True)}
        found = write_demos(tmp_path, [Episode(**arrays, **ends)], {"name": "hopper"}, {})
        index = torch.arange(4)
        for name, value in {"obs": found.observations(index), "action": found.actions(index)}.items():
            assert value.dtype == torch.float32
            np.testing.assert_array_equal(value.numpy(), arrays[name].astype(np.float32))
        assert found.episodes[0]["terminated"] is True
        assert found.success == 1

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"action": torch.full((4, 1), 100.0)},
                r"actions go up to 100 and the environment takes them in \[-1, 1\]",
            ),
            ({"action": torch.full((4, 1), torch.nan)}, "action is not finite in step 0"),
            ({"obs": seen_twice(torch.inf)}, "obs is not finite in step 2"),
            ({"reward": torch.tensor([0.0, torch.nan, 0.0, 0.0])}, "reward is not finite in step 1"),
            ({"reward": torch.ones(3)}, "its columns have lengths .*'reward': 3"),
            ({"reward": torch.ones(4, 1)}, r"reward has shape \(4, 1\), it must be \(L,\)"),
            ({"obs": torch.zeros(4, 3)}, "its rows are .* those of the first episode"),
            ({"obs": {"a": {"b": torch.zeros(4, 2)}}}, "are dictionaries: flatten them"),
        ],
    )
    def test_what_cannot_be_learnt_from_is_refused_with_its_episode(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=f"episode 1: .*{message}"):
            write_demos(tmp_path, [one(), one(**changes)], {"name": "hopper"}, {})

    def test_where_actions_have_no_bounds_any_size_goes(self, tmp_path):
        found = write_demos(tmp_path, [one(action=torch.full((4, 1), 9.0))], {"name": "hopper"}, {}, bound=None)
        assert float(found.actions(torch.tensor([0]))) == 9

    @pytest.mark.parametrize("env", [{}, {"name": 3}, {"name": "gym", "env_id": "x"}, {"name": "gym", "settings": [1]}])
    def test_an_environment_without_a_name_is_refused(self, tmp_path, env):
        with pytest.raises(ValueError, match="env.*: write"):
            write_demos(tmp_path, [one()], env, {})

    def test_what_others_wrote_is_checked_when_it_is_taken_up(self, demos):
        demos.check()
        path = demos.folder / "00001.safetensors"
        shard = load_file(path)
        shard["action"][3] = torch.nan
        save_file(shard, path)
        with pytest.raises(ValueError, match="action is not finite in row 3 of shard 1"):
            Demos.open(demos.folder).check()


class TestIdentity:
    """The name and the settings that make another world; not those of chunks, threads and pictures."""

    @pytest.mark.parametrize(
        ("mine", "theirs"),
        [
            ({}, {}),
            ({"chunk": 4, "max_steps": 9}, {"chunk": 1, "success": "is_success"}),
            ({"options": {"render_mode": "rgb_array"}}, {}),
            ({"options": {}}, {"options": None}),
        ],
    )
    def test_is_the_same(self, mine, theirs):
        one, two = ({"name": "gym", "settings": {"env_id": "Pendulum-v1", **extra}} for extra in (mine, theirs))
        assert differences(one, two) == []

    @pytest.mark.parametrize(
        ("mine", "theirs", "message"),
        [
            ({"env_id": "A"}, {"env_id": "B"}, "env.settings.env_id: 'A' there, 'B' here"),
            ({}, {"env_id": "B"}, "env.settings.env_id: None there, 'B' here"),
            (
                {"env_id": "A", "options": {"size": 3}},
                {"env_id": "A"},
                "env.settings.options: {'size': 3} there, {} here",
            ),
        ],
    )
    def test_is_another(self, mine, theirs, message):
        assert differences({"name": "gym", "settings": mine}, {"name": "gym", "settings": theirs}) == [message]

    def test_defaults_are_settings(self):
        same = differences({"name": "toy_reach"}, {"name": "toy_reach", "settings": {"device": "cpu"}})
        assert same == []
        assert differences({"name": "toy_reach"}, {"name": "toy_mdp"}) == ["they are of toy_reach, not of toy_mdp"]


class TestBroken:
    def test_folders_are_named_with_what_is_wrong(self, demos):
        about = demos.folder / "dataset.json"
        whole = json.loads(about.read_text())
        for change, message in [
            ({"format": 99}, "format 99, this version reads 1"),
            ({"episodes": whole["episodes"][1:]}, "the episodes have 24 steps, the shards 31"),
            ({"shards": [{"file": "gone.safetensors", "rows": 31}]}, "gone.safetensors cannot be read"),
            ({"shards": [{**whole["shards"][0], "rows": 11}]}, "should hold 11 rows"),
        ]:
            about.write_text(json.dumps(whole | change))
            with pytest.raises(ValueError, match=message):
                Demos.open(demos.folder)
        about.write_text(json.dumps({"format": 1}))
        with pytest.raises(ValueError, match=r"lacks \['env'"):
            Demos.open(demos.folder)
        about.write_text("{")
        with pytest.raises(ValueError, match="is not JSON"):
            Demos.open(demos.folder)
        about.unlink()
        with pytest.raises(ValueError, match=r"there is no dataset\.json"):
            Demos.open(demos.folder)

    def test_cut_shard(self, demos):
        path = demos.folder / "00001.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=r"00001\.safetensors cannot be read"):
            Demos.open(demos.folder)

    def test_shard_without_actions(self, demos):
        path = demos.folder / "00002.safetensors"
        shard = load_file(path)
        save_file({"obs": shard["obs"]}, path)
        with pytest.raises(ValueError, match="rows of obs and action"):
            Demos.open(demos.folder)

    def test_nothing_is_overwritten(self, demos):
        with pytest.raises(FileExistsError, match="give another folder"):
            write_demos(demos.folder, episodes(), {"name": "hopper"}, {})

    def test_nothing_to_write(self, tmp_path):
        with pytest.raises(ValueError, match="no episodes"):
            write_demos(tmp_path, [], {"name": "hopper"}, {})

    def test_too_long_chunks_and_too_few_episodes(self, demos, tmp_path):
        with pytest.raises(
            ValueError, match="of 5 episodes none fills a chunk of 13 steps, the longest has 12: take shorter chunks"
        ):
            demos.chunks(13)
        with pytest.raises(ValueError, match="two are needed"):
            write_demos(tmp_path, episodes()[:1], {"name": "hopper"}, {}).split()


class TestPlay:
    def test_one_whole_episode_of_every_seed(self):
        """Returns and lengths are the environment's own; the first observation is that of the seed."""
        env = ToyReach(5)
        torch.manual_seed(0)
        played = list(play(env, lambda obs: torch.randn(5, *env.action_shape), seed=7))
        assert len(played) == 5
        twin = ToyReach(5)
        first = twin.reset(7 + torch.arange(5))
        assert torch.equal(torch.stack([e.obs["goal"][0] for e in played]), first["goal"])
        assert [len(e.reward) for e in played] == [env.horizon] * 5
        assert all(e.truncated and not e.terminated for e in played)

    def test_expert_file_keeps_the_expert(self, tmp_path):
        expert = GaussianExpert(3, 2)
        expert.mean += 1
        expert.save(tmp_path / "e.safetensors", {"seed": 4})
        again, made_by = GaussianExpert.load(tmp_path / "e.safetensors")
        obs, rng = torch.randn(6, 3), torch.Generator()
        assert torch.equal(again(obs, rng.manual_seed(0)), expert(obs, rng.manual_seed(0)))
        assert made_by == {"seed": 4}

    def test_demonstrations_say_what_the_environment_paid(self, tmp_path):
        """Mean return of the table = the sum of the rewards the simulator gave, and the same seed is the same data."""
        pytest.importorskip("mujoco")
        expert = GaussianExpert(11, 3)
        expert.save(tmp_path / "e.safetensors", {})
        demos, again = (
            make_demos("hopper", tmp_path / name, expert=tmp_path / "e.safetensors", num_episodes=4)
            for name in ("a", "b")
        )
        assert demos.episodes == again.episodes
        assert all(e["terminated"] and not e["truncated"] for e in demos.episodes)
        rewards = [float(s["reward"].double().sum()) for s in demos.shards]
        assert sum(rewards) == pytest.approx(4 * demos.mean_return)
        assert float(demos.actions(torch.arange(20)).abs().max()) <= 1

    def test_missing_expert_names_the_command(self, tmp_path):
        with pytest.raises(ValueError, match="make_demos.py hopper --train"):
            make_demos("hopper", tmp_path, expert=tmp_path / "none")

    def test_an_oracle_takes_noise_and_an_expert_a_file(self, tmp_path):
        assert demonstrator("cube_single", noise=0.1).options == " --noise 0.1"
        assert demonstrator("hopper", expert=tmp_path).file == tmp_path
        with pytest.raises(ValueError, match="expert of hopper has its own; leave it out"):
            demonstrator("hopper", noise=0.1)
        with pytest.raises(ValueError, match="cube_single is demonstrated by a script; leave it out"):
            demonstrator("cube_single", expert=tmp_path)
        with pytest.raises(ValueError, match="nobody demonstrates 'cube_singel'; did you mean 'cube_single'"):
            demonstrator("cube_singel")
        assert all(name.startswith(who.env.split("_")[0]) for name, who in DEMONSTRATORS.items())

    def test_an_oracles_demonstrations_have_rewards_and_success(self, tmp_path):
        """-1 a step until the cube is in place, in the table and in the shard."""
        pytest.importorskip("ogbench")
        demos = make_demos("cube_single", tmp_path, noise=0.0, num_episodes=2, seed=3)
        assert demos.success == 1
        for row in demos.episodes:
            assert row["return"] == 1 - row["length"]
            assert (row["terminated"], row["truncated"]) == (True, False)
        assert demos.about["made_by"]["command"].endswith("cube_single --episodes 2 --seed 3 --noise 0")
        assert demos.moments.shape == (3, 28)
        assert "success 1.0" in demos.summary
