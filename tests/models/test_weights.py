"""Weight sets: one mechanism for reference, old and averaged weights; what goes in comes back out."""

import copy

import pytest
import torch
from torch import Tensor, nn

from rlflow.flow.weights import WeightSets


def module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def perturb(net: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p += by


def values(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def net() -> nn.Sequential:
    return module()


@pytest.fixture
def sets(net: nn.Sequential) -> WeightSets:
    """'ref' holds the first weights, the live ones have moved on by 1."""
    sets = WeightSets(net)
    sets.snapshot("ref")
    perturb(net)
    return sets


class TestUsing:
    def test_puts_the_set_in_place_and_the_live_weights_back(self, net, sets):
        live, ref = values(net), sets.sets["ref"]
        with sets.using("ref"):
            assert sets.active == "ref"
            assert all(torch.equal(p + 1, live[n]) for n, p in net.named_parameters())
        assert sets.active == "live"
        assert equal(values(net), live)
        assert all(torch.equal(v + 1, live[n]) for n, v in ref.items())

    def test_restores_after_an_exception(self, net, sets):
        live = values(net)
        with pytest.raises(RuntimeError, match="inside"), sets.using("ref"):
            raise RuntimeError("inside")
        assert sets.active == "live"
        assert equal(values(net), live)

    def test_live_is_always_there(self, net, sets):
        live = values(net)
        with sets.using("live"):
            assert equal(values(net), live)

    def test_a_missing_set_is_an_error_that_names_the_stored_ones(self, net, sets):
        live = values(net)
        with pytest.raises(KeyError, match=r"no weight set 'old'; stored: \['ref'\]"), sets.using("old"):
            pass
        assert equal(values(net), live)

    def test_sets_do_not_nest_but_the_active_one_may_be_asked_for_again(self, net, sets):
        sets.snapshot("ema")
        live = values(net)
        with sets.using("ref"):
            with sets.using("ref"):
                assert sets.active == "ref"
            assert sets.active == "ref"
            for other in ("ema", "live"):
                with pytest.raises(ValueError, match="do not nest"), sets.using(other):
                    pass
            with pytest.raises(ValueError, match="cannot store"):
                sets.snapshot("old")
        assert equal(values(net), live)

    def test_points_at_the_storage_of_the_set_and_copies_nothing(self, net, sets):
        live = {n: p.data_ptr() for n, p in net.named_parameters()}
        stored = {n: v.data_ptr() for n, v in sets.sets["ref"].items()}
        with sets.using("ref"):
            assert {n: p.data_ptr() for n, p in net.named_parameters()} == stored
        assert {n: p.data_ptr() for n, p in net.named_parameters()} == live

    def test_what_is_done_to_the_weights_inside_is_done_to_the_set(self, net, sets):
        live = values(net)
        with sets.using("ref"):
            perturb(net, 5.0)
        assert equal(values(net), live)
        assert all(torch.equal(v - 4, live[n]) or torch.allclose(v - 4, live[n]) for n, v in sets.sets["ref"].items())


class TestGraphAndOptimiser:
    def test_a_graph_built_before_the_swap_has_the_live_gradients(self, net, sets):
        x = torch.randn(5, 3)
        expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
        loss = net(x).square().sum()
        with torch.no_grad(), sets.using("ref"):
            net(x)
        got = torch.autograd.grad(loss, list(net.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_the_optimiser_does_not_notice(self):
        """Adam with a swap between its steps takes the same path as Adam without."""

        def train(swap: bool) -> dict[str, Tensor]:
            torch.manual_seed(0)
            net = module()
            sets = WeightSets(net)
            sets.snapshot("ref")
            optimiser = torch.optim.Adam(net.parameters(), 0.1)
            for _ in range(4):
                net(torch.ones(2, 3)).square().sum().backward()
                optimiser.step()
                optimiser.zero_grad()
                if swap:
                    with torch.no_grad(), sets.using("ref"):
                        net(torch.ones(2, 3))
            return values(net)

        assert equal(train(True), train(False))


class TestBlend:
    def test_is_decay_set_plus_the_rest_live(self, net, sets):
        ref, live = {n: v.clone() for n, v in sets.sets["ref"].items()}, values(net)
        sets.blend("ref", 0.9)
        for n, v in sets.sets["ref"].items():
            torch.testing.assert_close(v, 0.9 * ref[n] + 0.1 * live[n])
        assert equal(values(net), live)

    def test_decay_1_keeps_and_decay_0_copies(self, net, sets):
        before = {n: v.clone() for n, v in sets.sets["ref"].items()}
        sets.blend("ref", 1.0)
        assert equal(sets.sets["ref"], before)
        sets.blend("ref", 0.0)
        assert equal(sets.sets["ref"], values(net))

    def test_never_shares_storage_with_the_live_weights(self, net, sets):
        sets.blend("ref", 0.0)
        sets.snapshot("ema")
        held = {k: v.clone() for k, v in sets.state_dict().items()}
        perturb(net)
        assert equal(sets.state_dict(), held)

    def test_half_precision_averages_do_not_stall(self):
        """From 0 towards 1 at decay .999: 1 - .999^500 = .394; steps of bfloat16 stop at .25."""
        net = nn.Linear(1, 1, bias=False).bfloat16()
        nn.init.zeros_(net.weight)
        sets = WeightSets(net)
        sets.snapshot("ema")
        nn.init.ones_(net.weight)
        for _ in range(500):
            sets.blend("ema", 0.999)
        assert float(sets.sets["ema"]["weight"]) == pytest.approx(0.394, abs=0.01)


class TestTrainableOnly:
    def test_a_frozen_base_is_neither_stored_nor_swapped(self, net):
        """As with LoRA: the reference costs the size of the adapters."""
        net[0].requires_grad_(False)
        sets = WeightSets(net)
        sets.snapshot("ref")
        assert list(sets.sets["ref"]) == ["2.weight", "2.bias"]
        base = net[0].weight.data_ptr()
        perturb(net)
        moved = net[0].weight.clone()
        with sets.using("ref"):
            assert net[0].weight.data_ptr() == base
            assert torch.equal(net[0].weight, moved)

    def test_weights_frozen_later_are_still_swapped_and_put_back(self, net, sets):
        """A warm-up that freezes the actor must not change what 'ref' means, nor lose the live weights."""
        live = values(net)
        net[0].requires_grad_(False)
        with sets.using("ref"):
            assert torch.equal(net[0].weight + 1, live["0.weight"])
            net[2].requires_grad_(False)
        assert equal(values(net), live)

    def test_weights_thawed_after_the_snapshot_are_a_clear_error_that_swaps_nothing(self, net):
        net[0].requires_grad_(False)
        sets = WeightSets(net)
        sets.snapshot("ref")
        net[0].requires_grad_(True)
        perturb(net)
        live = values(net)
        with pytest.raises(ValueError, match=r"0\.weight"), sets.using("ref"):
            pass
        assert equal(values(net), live)


class TestState:
    def test_round_trip(self, net, sets):
        sets.snapshot("ema")
        other = WeightSets(copy.deepcopy(net))
        other.load_state_dict(sets.state_dict())
        assert equal(other.state_dict(), sets.state_dict())
        with other.using("ref"):
            assert equal(values(other._module[0]), sets.sets["ref"])

    def test_loaded_tensors_are_copies(self, net, sets):
        state = {k: v.clone() for k, v in sets.state_dict().items()}
        sets.load_state_dict(state)
        for v in state.values():
            v.zero_()
        assert any(bool(v.any()) for v in sets.state_dict().values())

    def test_an_average_resumes_in_the_precision_it_was_kept_in(self):
        net = module().bfloat16()
        sets = WeightSets(net)
        sets.snapshot("ema")
        perturb(net)
        sets.blend("ema", 0.999)
        other = WeightSets(copy.deepcopy(net))
        other.load_state_dict(sets.state_dict())
        assert equal(other.state_dict(), sets.state_dict())
        assert {v.dtype for v in other.state_dict().values()} == {torch.float32}
        with other.using("ema"):
            assert {p.dtype for p in other._module[0].parameters()} == {torch.bfloat16}

    def test_blending_inside_using_is_an_error(self, sets):
        """It would blend the set with itself."""
        with sets.using("ref"), pytest.raises(ValueError, match="in place"):
            sets.blend("ref", 0.9)

    def test_saving_inside_using_saves_the_set_not_the_live_weights(self, net, sets):
        state = {k: v.clone() for k, v in sets.state_dict().items()}
        with sets.using("ref"):
            inside = {k: v.clone() for k, v in sets.state_dict().items()}
        assert equal(inside, state)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda s: s.pop("ref/0.weight"), "0.weight"),
            (lambda s: s.update({"ref/nowhere": torch.zeros(1)}), "nowhere"),
            (lambda s: s.update({"ref/0.weight": torch.zeros(3, 4)}), "0.weight"),
        ],
        ids=["missing", "unknown", "transposed"],
    )
    def test_names_and_shapes_that_do_not_match_are_an_error_and_load_nothing(self, sets, change, match):
        before, state = {k: v.clone() for k, v in sets.state_dict().items()}, sets.state_dict()
        change(state)
        with pytest.raises((KeyError, ValueError), match=match):
            sets.load_state_dict(state)
        assert equal(sets.state_dict(), before)

    def test_moving_the_module_moves_the_sets(self, net, sets):
        net.double()
        with sets.using("ref"):
            assert {p.dtype for p in net.parameters()} == {torch.float64}
        assert {p.dtype for p in net.parameters()} == {torch.float64}
