"""Runs on a foreign checkpoint, of random weights: resume, evaluation, what is left on disk, the reference on the host."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rlflow as rf
from rlflow.config import recipes
from rlflow.deploy.runs import evaluator_of
from rlflow.flow.grid import FromScheduler
from rlflow.flow.kernels import FlowSDE
from rlflow.flow.policy import FlowPolicy
from rlflow.models.pretrained import lora as lora_files
from rlflow.train.checkpoint import Checkpoints, pack
from rlflow.train.trainer import Trainer

SMALL = (
    *("policy.field.resolution=32", "policy.field.max_sequence_length=16", "policy.field.lora=2", "policy.num_steps=5"),
    *("env.num_groups=2", "env.group_size=4", "reward.weights={brightness: 1}", "eval.num=2", "eval.num_steps=3"),
    *("eval.metrics={bright: brightness}", "train.tensorboard=false", "train.report=false", "policy.precision=float32"),
)


@pytest.fixture
def trainer(tiny_pipeline, tmp_path) -> Callable[..., Trainer]:
    """trainer(run name, override, ...) -> a small Flow-GRPO run on the tiny Stable Diffusion 3."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{i} cats\n" for i in range(12)))

    def make(run: str, *more: str, **settings: Any) -> Trainer:
        fixed = [f"policy.field.checkpoint={tiny_pipeline('sd3')}", f"env.prompts={prompts}", *SMALL]
        return Trainer("sd35_flow_grpo_ocr", tmp_path / run, overrides=[*fixed, *more], quiet=True, **settings)

    return make


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return pack(Checkpoints(run).load("last")[1])[0]


def test_two_and_two_iterations_are_four_bit_for_bit(trainer, tmp_path):
    """In another process's memory the texts are encoded in another order, and must come out the same."""
    few = "env.group_size=2"
    trainer("a", few, "train.iterations=4").fit()
    trainer("b", few, "train.iterations=2").fit()
    trainer("b", few, "train.iterations=4", resume="last").fit()
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def test_what_a_run_leaves(trainer, tmp_path):
    """A checkpoint of the LoRA alone; RUN/model for plain diffusers; both load, and say the same."""
    made = trainer("run", "train.iterations=1")
    made.fit()
    names = {n.removeprefix("policy/") for n in tensors(tmp_path / "run") if n.startswith("policy/field")}
    assert {n.partition("transformer.")[2] for n in names} == set(
        lora_files.parameters(made.policy.field.unguided.transformer)
    )
    saved = load_file(tmp_path / "run/model/pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.") for name in saved)
    run, model = rf.load(tmp_path / "run"), rf.load(tmp_path / "run/model")
    mine, theirs = (dict(lora_files.parameters(p.field.unguided.transformer)) for p in (run, model))
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=0)
    by_run, by_model = evaluator_of(tmp_path / "run"), evaluator_of(tmp_path / "run/model")
    torch.testing.assert_close(by_model().images, by_run().images, rtol=0, atol=1e-6)


def test_evaluation_at_another_resolution_leaves_training_alone(trainer):
    made = trainer("run", "train.iterations=1", "eval.resolution=64")
    assert made.evaluator().images.shape == (2, 3, 64, 64)
    assert made.policy.event_shape == (4, 8, 8)
    made.fit()
    with pytest.raises(ValueError, match=r"^eval\.resolution: resolution 50 must be a positive multiple"):
        trainer("other", "train.iterations=1", "eval.resolution=50")


def test_models_of_one_size_refuse_another(tmp_path):
    with pytest.raises(ValueError, match=r"^eval\.resolution: DiT makes pictures of one size"):
        Trainer("t2i_flow_grpo", tmp_path, overrides=["eval.resolution=64", "train.iterations=1"])
    with pytest.raises(ValueError, match=r"DiT has no time grid of its own: use policy.grid=uniform"):
        Trainer("t2i_flow_grpo", tmp_path, overrides=["policy.grid=scheduler", "train.iterations=1"])


def reference_rows(made: Trainer) -> list[int]:
    """A list that grows by the rows of each network pass under the reference weights."""
    rows: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if made.policy.weights.active == "ref":
            rows.append(len(kwargs["hidden_states"]))

    made.policy.field.unguided.transformer.register_forward_pre_hook(note, with_kwargs=True)
    return rows


TRAINED = {"lora": ("policy.field.lora=2",), "full": ("policy.field.lora=null", "policy.field.weights=float32")}


@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_a_reference_on_the_host_is_the_same_reference(trained, trainer):
    """Stored where it was told to be, put back by each checkpoint, without effect on the numbers; for the KL it runs
    once per scored pair, 8 samples at 3 of the 5 steps, with guidance."""
    settings = ("train.iterations=2", "algorithm.micro_batch=12", *trained)
    plain, offloaded = trainer("a", *settings), trainer("b", *settings, "policy.offload_reference=true")
    assert offloaded.policy.weights.places == {"ref": torch.device("cpu")}
    offloaded.policy.weights.places["other"] = torch.device("meta")
    offloaded.policy.weights.snapshot("other")
    assert {v.device.type for v in offloaded.policy.weights.sets.pop("other").values()} == {"meta"}
    plain.policy.multiple = offloaded.policy.multiple = 1  # nothing is filled up, so rows can be counted
    counts = [reference_rows(made) for made in (plain, offloaded)]
    plain.fit()
    offloaded.fit()
    assert [sum(rows) for rows in counts] == [2 * 8 * 3 * 2] * 2
    a, b = (made.policy.weights.parameters() for made in (plain, offloaded))
    assert a.keys() == b.keys() == offloaded.policy.weights.sets["ref"].keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_encoders_run_once_per_prompt_in_a_whole_run(trainer):
    """Twelve prompts and the negative one, whether they are encoded when first met or all at the start."""
    kept, released = (
        trainer("a", "train.iterations=3"),
        trainer("b", "train.iterations=3", "policy.field.release_encoders=true"),
    )
    kept.fit()
    released.fit()
    table = released.policy.field.unguided.table
    assert table.encoded == 13
    assert kept.policy.field.unguided.table.encoded <= 13
    a, b = (dict(lora_files.parameters(m.policy.field.unguided.transformer)) for m in (kept, released))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_doctor_passes_on_a_recipe_of_a_checkpoint(trainer):
    from rlflow.doctor.doctor import doctor

    checks = doctor(trainer("run", "train.iterations=1", "env.group_size=2").config)
    assert [c.name for c in checks if c.passed is False] == []


@pytest.mark.parametrize("family", ["sd3", "flux", "sd15"])
def test_a_reward_moves_a_lora_through_the_decoder(tiny_pipeline, tmp_path, family: str) -> None:
    """Every row's picture made again on the way back; the gradient of R(decode(x)) is that of a difference."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{i} cats\n" for i in range(12)))
    small = [f"policy.field.checkpoint={tiny_pipeline(family)}", f"env.prompts={prompts}", *SMALL]
    small += ["train.iterations=1", "reward.weights={brightness: 1, redness: 1}", "algorithm.micro_batch=3"]
    small += ["policy.field.max_sequence_length=null"] if family == "sd15" else []
    made = Trainer("sd35_draft", tmp_path / "run", overrides=small, quiet=True)
    before = {n: p.detach().clone() for n, p in made.policy.weights.parameters().items()}
    made.fit()
    assert all("lora_" in name for name in before)
    assert any(not torch.equal(p, before[n]) for n, p in made.policy.weights.parameters().items())
    env, rows = made.collector.env, torch.tensor([1, 6])
    x = torch.randn(2, *made.policy.event_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (found,) = torch.autograd.grad(env.graded(x, rows).sum(), x)
    ends = [
        float(env.graded((x + sign * 1e-2 * found / found.norm()).detach().requires_grad_(), rows).sum().detach())
        for sign in (1, -1)
    ]
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(found.norm()), rel=0.05)


OF_FAMILY = {"klein": "klein_flow_grpo_fast", "z_image": "zimage_nft", "qwen_image": "qwen_image_nft"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_FAMILY)
def test_every_command_on_a_family(kind, tiny_pipeline, tmp_path, capsys):
    """Doctor passes, train leaves a report and a LoRA with its card, sample draws from the run and its model."""
    from rlflow.cli import main
    from rlflow.doctor.doctor import doctor

    (tmp_path / "prompts.txt").write_text("".join(f"{i} cats\n" for i in range(12)))
    fixed = [f"policy.field.checkpoint={tiny_pipeline(kind)}", f"env.prompts={tmp_path / 'prompts.txt'}", *SMALL]
    fixed += [
        "policy.field.max_sequence_length=64",
        "policy.num_steps=10",
        "reward.weights={brightness: 1, redness: 1}",
        "reward.settings={}",
    ]
    recipe, run = OF_FAMILY[kind], tmp_path / "run"
    checks = doctor(recipes.load(recipe, [*fixed, "train.iterations=1", "algorithm.num_minibatches=1"]))
    assert [(c.name, c.value, c.limit) for c in checks if c.passed is False] == []
    main(["train", recipe, *fixed, "train.iterations=1", "algorithm.num_minibatches=1", "--run", str(run), "--quiet"])
    main(["report", str(run)])
    assert "bright" in (run / "report.html").read_text()
    assert (run / "model" / "README.md").is_file()
    for source in (run, run / "model"):
        out = tmp_path / "x.png"
        main(["sample", str(source), "--prompt", "two cats", "--num", "1", "--steps", "2", "--out", str(out)])
        assert out.stat().st_size > 100
        out.unlink()


@pytest.mark.slow
def test_a_kohya_file_of_stable_diffusion_trains_and_every_command_takes_the_run(tiny_pipeline, tmp_path, capsys):
    """doctor, train, sample and export; the exported file gives the run's picture in plain diffusers."""
    from diffusers import DDIMScheduler, DiffusionPipeline
    from safetensors.torch import save_file

    from rlflow.cli import main

    (tmp_path / "prompts.txt").write_text("".join(f"{i} cats\n" for i in range(12)))
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    parts = {"lora_down.weight": torch.randn(2, 8), "lora_up.weight": torch.randn(8, 2), "alpha": torch.tensor(1.0)}
    save_file({f"{layer}.{end}": value for end, value in parts.items()}, tmp_path / "cat.safetensors")
    few = [f"policy.field.checkpoint={tiny_pipeline('sd15')}", f"env.prompts={tmp_path / 'prompts.txt'}", *SMALL]
    few += ["policy.field.lora=null", f"policy.field.adapter={tmp_path / 'cat.safetensors'}"]
    few += ["policy.field.max_sequence_length=null", "train.iterations=2", "algorithm.optimizer.lr=0.01"]
    few += ["policy.field.weights=float32", "train.report=true"]  # the weights as the plain pipeline's
    main(["doctor", "sd15_nft", *few])
    told = "scale 0.5, of the file's alpha tensors"
    assert told in " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    main(["train", "sd15_nft", "--run", str(tmp_path / "run"), *few])
    assert told in capsys.readouterr().out
    assert (tmp_path / "run/report.html").is_file()
    main(["sample", str(tmp_path / "run"), "--prompt", "3 cats", "--num", "1", "--out", str(tmp_path / "x.png")])
    main(["export", str(tmp_path / "run"), "--format", "kohya", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/lora.safetensors").is_file()
    field = rf.load(tmp_path / "run/model").field.unguided
    policy = FlowPolicy(field, FlowSDE(), grid=FromScheduler(field), num_steps=3)
    x_0 = torch.randn(1, *policy.event_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = field.decode(policy.sample(policy.encode(field.tokenize(["3 cats"])), x_0=x_0).final)
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline("sd15"))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=True)
    settings = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "pt", "guidance_scale": 1.0}
    untuned = pipe("3 cats", latents=x_0, **settings).images
    pipe.load_lora_weights(tmp_path / "out", weight_name="lora.safetensors")
    tuned = pipe("3 cats", latents=x_0, **settings).images
    torch.testing.assert_close(tuned, ours, atol=1e-4, rtol=0)
    assert (tuned - untuned).abs().max() > 1e-3
