"""EO-1: a list of pictures and tokens of any number on one side, tensors that lead with rows on the other."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from rlflow.models.lerobot.eo1 import ROOM, as_list, by_rows


def made(lengths: list[int], pictures: int = 2, patches: int = 8) -> dict:
    """As EO-1's processor makes it: a picture of `patches` has a quarter as many tokens."""
    longest, seen = max(lengths), pictures * patches // 4
    text = [[0] * (longest - n) + [2] * seen + [3] * (n - seen) for n in lengths]
    tokens = torch.tensor(text)
    grid = torch.tensor([[1, 2, patches // 2]]).repeat(len(lengths) * pictures, 1)
    values = torch.arange(len(lengths) * pictures * patches * 5.0).view(-1, 5)
    found = {"input_ids": tokens, "attention_mask": tokens.ne(0).long(), "mm_token_type_ids": tokens.eq(2).int()}
    found |= {"pixel_values": values, "image_grid_thw": grid, "state_token_id": 7, "action_token_id": 8}
    return found | {"observation.state": torch.zeros(len(lengths), 3), "task": ["x"] * len(lengths)}


def test_rows_become_the_list_again_and_are_filled_up_to_one_length():
    batch = made([9, 6, 7])
    rows = by_rows(batch, 20, pad=1)
    assert {len(v) for v in rows.values()} == {3}
    assert rows["pixel_values"].shape == (3, 16, 5)
    assert rows["input_ids"].shape == (3, 24), "20 beside the four of the pictures"
    assert rows["input_ids"][1].tolist() == [1] * 15 + batch["input_ids"][1].tolist()
    assert rows["attention_mask"].sum(1).tolist() == [9, 6, 7], "what fills up is masked"
    back = as_list(rows)
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(back[name], batch[name])
    assert (back["state_token_id"], back["action_token_id"]) == (7, 8)


def test_a_row_has_its_own_pictures():
    batch = made([9, 6, 7])
    second = {n: v[1:2] for n, v in by_rows(batch, 20, pad=0).items()}
    assert torch.equal(as_list(second)["pixel_values"], batch["pixel_values"][16:32])


def test_other_policies_batches_stay_as_they_are():
    batch = {"observation.state": torch.zeros(2, 3), "observation.images.top": torch.zeros(2, 3, 4, 4)}
    assert as_list(batch) == batch


def test_an_instruction_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match=f"an instruction has 2 tokens more than the {ROOM}"):
        by_rows(made([9]), 3, pad=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("lerobot")
    from rlflow.models.lerobot import tiny

    torch.manual_seed(0)
    found = tmp_path_factory.mktemp("eo1")
    mean, std = torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6)
    tiny.eo1(found, stats={name: {"mean": mean, "std": std} for name in ("observation.state", "action")})
    return found


def observed(words: list[str]) -> dict[str, torch.Tensor]:
    from rlflow.types import as_bytes

    rng = torch.Generator().manual_seed(len(words))
    pixels = torch.randint(0, 256, (len(words), 56, 56, 3), dtype=torch.uint8, generator=rng)
    place = torch.randn(len(words), 6, generator=rng)
    return {"observation.images.top": pixels, "agent_pos": place, "task": as_bytes(words, 32)}


def test_what_plain_lerobot_runs_is_what_was_tuned(folder, tmp_path):
    """Actions in an environment's units, of sentences of different lengths, before and after a change, by LeRobot's own
    processors and loop: it fills tokens up to the longest beside, we to the most there can be."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.eo1.modeling_eo1 import EO1Policy
    from lerobot.policies.factory import make_pre_post_processors

    from rlflow.flow.kernels import FlowSDE
    from rlflow.flow.policy import FlowPolicy
    from rlflow.models.lerobot.export import save_policy
    from rlflow.models.lerobot.opening import lerobot
    from rlflow.types import sentences

    field, obs = lerobot(str(folder)), observed(["push the T", "", "now"])
    trained = [n for n, p in field.named_parameters() if p.requires_grad]
    assert any("action_out_proj" in n for n in trained)
    assert any("language_model" in n for n in trained), "it reads prompt and actions in one row of tokens"
    assert not any("visual" in n or "state_proj" in n for n in trained)
    noise = torch.randn(3, *field.event_shape)

    def ours(rows: slice = slice(None)) -> torch.Tensor:
        policy = FlowPolicy(field, FlowSDE(0.5), num_steps=4)
        with torch.no_grad():
            cond = policy.encode({n: v[rows] for n, v in obs.items()})
            return field.decode(policy.sample(cond, x_0=noise[rows]).final)

    def plain(where: Path) -> torch.Tensor:
        config = PreTrainedConfig.from_pretrained(where)
        config.pretrained_path = where
        policy = EO1Policy.from_pretrained(where, config=config)
        before, after = make_pre_post_processors(policy.config, str(where))
        pictures = obs["observation.images.top"].permute(0, 3, 1, 2).float() / 255
        seen = {"observation.images.top": pictures, "observation.state": obs["agent_pos"]}
        with mock.patch.object(policy.model, "sample_noise", return_value=noise):
            return after(policy.predict_action_chunk(before({**seen, "task": sentences(obs["task"])})))

    first = ours()
    torch.testing.assert_close(first, plain(folder), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[1:2], ours(slice(1, 2)), rtol=1e-4, atol=1e-4, msg="a row depends on no other")
    for p in field.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    save_policy(field, tmp_path)
    moved = ours()
    assert (moved - first).abs().max() > 0.1
    torch.testing.assert_close(moved, plain(tmp_path), rtol=1e-4, atol=1e-4)
