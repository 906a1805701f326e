import math
from collections.abc import Callable
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import torch
from lightly.loss.swav_loss import SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from training.errors import BadInput
from training.loop import LocalStepper
from training.objectives.config import SwavLoss
from training.objectives.objective import build_objective
from training.objectives.sinkhorn import sinkhorn
from training.objectives.swav import assignments, prototype_entropy, swapped_prediction_loss
from training.optimizers.build import build_optimizer, govern
from training.recipe import SwavTraining

Tiny = Callable[..., SwavTraining]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def cosines(*shape: int, seed: int = 0) -> Tensor:
    """Scores as a head gives them: cosines of random embeddings [..., B] and K random prototypes."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = functional.normalize(torch.randn(*shape[:-1], 8, generator=generator), dim=-1)
    return embeddings @ functional.normalize(torch.randn(shape[-1], 8, generator=generator), dim=-1).T


def loss_of(scores: Tensor, config: SwavLoss, epoch: int = 0) -> Tensor:
    codes = assignments(scores[list(config.crops_for_assign)], config, epoch)
    return swapped_prediction_loss(scores, codes, config)


def views(batch: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2 * batch, 3, side, side, generator=generator) for side in (16, 8)]


@pytest.mark.parametrize(("batch", "prototypes"), [(16, 10), (7, 40), (64, 300)])
@pytest.mark.parametrize("epsilon", [0.03, 0.05, 0.5])
@pytest.mark.parametrize("num_iters", [1, 3, 10])
def test_sinkhorn_agrees_with_lightly(batch: int, prototypes: int, epsilon: float, num_iters: int) -> None:
    scores = cosines(batch, prototypes)
    ours = sinkhorn(scores, epsilon=epsilon, num_iters=num_iters)
    torch.testing.assert_close(ours, lightly_sinkhorn(scores, num_iters, epsilon), **CLOSE)


@pytest.mark.parametrize("num_crops", [2, 4, 8])
@pytest.mark.parametrize(("temperature", "epsilon"), [(0.1, 0.05), (0.2, 0.03)])
def test_loss_and_its_gradient_agree_with_lightly(num_crops: int, temperature: float, epsilon: float) -> None:
    config = SwavLoss(temperature=temperature, epsilon=epsilon)
    ours, theirs = (cosines(num_crops, 12, 20).requires_grad_() for _ in range(2))
    loss = loss_of(ours, config)
    reference = SwaVLoss(temperature, config.num_iters, epsilon)(list(theirs[:2]), list(theirs[2:]))
    torch.testing.assert_close(loss, reference.squeeze(), **CLOSE)
    loss.backward()
    reference.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)


@pytest.mark.parametrize("assigned", [(0,), (3,), (2, 0), (0, 1, 2, 3)])
def test_any_crops_may_be_assigned(assigned: tuple[int, ...]) -> None:
    config = SwavLoss(crops_for_assign=assigned)
    scores = cosines(4, 12, 20)
    pairs = [(c, p) for c, p in permutations(range(4), 2) if c in assigned]
    expected = sum(functional.cross_entropy(scores[p] / config.temperature,
                                            lightly_sinkhorn(scores[c], config.num_iters, config.epsilon))
                   for c, p in pairs) / len(pairs)
    torch.testing.assert_close(loss_of(scores, config), expected, **CLOSE)


def test_permuted_batch_permutes_the_assignments() -> None:
    scores, order = cosines(2, 12, 20), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    permuted = assignments(scores[:, order], SwavLoss(), epoch=0)
    torch.testing.assert_close(permuted, assignments(scores, SwavLoss(), epoch=0)[:, order], **CLOSE)


def test_permuted_prototypes_permute_the_assignments() -> None:
    scores, order = cosines(2, 12, 20), torch.randperm(20, generator=torch.Generator().manual_seed(1))
    permuted = assignments(scores[..., order], SwavLoss(), epoch=0)
    torch.testing.assert_close(permuted, assignments(scores, SwavLoss(), epoch=0)[..., order], **CLOSE)


@pytest.mark.parametrize("axis", [1, 2])
def test_loss_is_indifferent_to_the_order_of_images_and_of_prototypes(axis: int) -> None:
    scores = cosines(4, 12, 20)
    order = torch.randperm(scores.shape[axis], generator=torch.Generator().manual_seed(1))
    permuted = loss_of(scores.index_select(axis, order), SwavLoss())
    torch.testing.assert_close(permuted, loss_of(scores, SwavLoss()), **CLOSE)


def test_crops_are_assigned_apart_from_each_other() -> None:
    scores = cosines(3, 12, 20)
    together = assignments(scores, SwavLoss(), epoch=0)
    apart = torch.stack([assignments(crop[None], SwavLoss(), epoch=0)[0] for crop in scores])
    torch.testing.assert_close(together, apart, **CLOSE)


def test_every_image_is_assigned_once_and_every_prototype_its_share() -> None:
    codes = sinkhorn(cosines(24, 10), epsilon=0.05, num_iters=3)
    torch.testing.assert_close(codes.sum(1), torch.ones(24))
    converged = sinkhorn(cosines(24, 10), epsilon=0.05, num_iters=300, dtype=torch.float64)
    torch.testing.assert_close(converged.sum(1), torch.ones(24, dtype=torch.float64))
    torch.testing.assert_close(converged.sum(0), torch.full((10,), 2.4, dtype=torch.float64))


def test_uniform_scores_are_assigned_evenly_at_a_loss_of_ln_k() -> None:
    scores = torch.full((4, 12, 20), 0.3)
    torch.testing.assert_close(assignments(scores, SwavLoss(), epoch=0), torch.full_like(scores, 1 / 20))
    loss = loss_of(scores, SwavLoss())
    assert loss.item() == pytest.approx(math.log(20), rel=1e-6)


def test_separated_clusters_are_assigned_almost_surely_at_almost_no_loss() -> None:
    scores = torch.eye(6).expand(4, 6, 6)
    codes = assignments(scores, SwavLoss(), epoch=0)
    torch.testing.assert_close(codes, scores.contiguous(), rtol=0, atol=1e-6)
    expected = math.log(1 + 5 * math.exp(-10))  # one score of 1 against five of 0, at temperature 0.1
    assert loss_of(scores, SwavLoss()).item() == pytest.approx(expected, abs=1e-6)


def test_sinkhorn_stays_in_full_precision_under_autocast() -> None:
    scores = cosines(12, 20)
    with torch.autocast("cpu", torch.bfloat16):
        codes = sinkhorn(scores, epsilon=0.05, num_iters=3)
    torch.testing.assert_close(codes, sinkhorn(scores, epsilon=0.05, num_iters=3), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_do_not_overflow(dtype: torch.dtype) -> None:
    scores = cosines(4, 12, 20).to(dtype)
    loss = loss_of(scores, SwavLoss(epsilon=0.03))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, loss_of(scores.float(), SwavLoss(epsilon=0.03)))


def test_double_precision_bears_an_epsilon_that_single_precision_does_not() -> None:
    far_from_all = torch.linspace(-0.99, -0.9, 6)  # exp((-0.9 - 1) / 0.01) underflows in float32
    scores = torch.cat([torch.eye(6) * 2 - 1, far_from_all[None]])
    single = sinkhorn(scores, epsilon=0.01, num_iters=3)
    double = sinkhorn(scores, epsilon=0.01, num_iters=3, dtype=torch.float64)
    assert single.isnan().any()
    torch.testing.assert_close(double.sum(1), torch.ones(7, dtype=torch.float64))
    config = SwavLoss(epsilon=0.01, use_double_precision=True)
    torch.testing.assert_close(assignments(scores[None], config, epoch=0)[0], double.float())


def test_prototype_that_underflowed_everywhere_gets_a_share() -> None:
    scores = cosines(12, 5)
    scores[:, 2] = -100
    codes = sinkhorn(scores, epsilon=0.05, num_iters=3)
    torch.testing.assert_close(codes.sum(1), torch.ones(12))
    assert codes[:, 2].sum() > 1


def test_infinite_score_counts_as_the_largest_finite_one() -> None:
    scores = cosines(12, 5)
    largest = scores.argmax()
    scores.view(-1)[largest] = scores.max()
    scores[0, 0] = math.inf
    replaced = scores.clone()
    replaced[0, 0] = scores[scores.isfinite()].max()
    torch.testing.assert_close(sinkhorn(scores, epsilon=0.05, num_iters=3),
                               sinkhorn(replaced, epsilon=0.05, num_iters=3))


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_power_law_gives_prototypes_shares_that_fall_with_their_number(exponent: float) -> None:
    codes = sinkhorn(cosines(64, 5), epsilon=0.5, num_iters=300, dtype=torch.float64, power_law_exponent=exponent)
    torch.testing.assert_close(codes.sum(1), torch.ones(64, dtype=torch.float64))
    shares = torch.tensor([1 / (i + 1) ** exponent for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(codes.sum(0), 64 * shares / shares.sum())


def test_power_law_is_an_option_of_the_loss() -> None:
    config = SwavLoss(power_law_exponent=2.0, epsilon=0.5, num_iters=30)
    steep = assignments(cosines(1, 64, 5), config, epoch=0)[0].sum(0)
    assert steep.argsort(descending=True).tolist() == [0, 1, 2, 3, 4]


def test_assignments_are_rounded_to_one_prototype_at_the_start() -> None:
    config = SwavLoss(temp_hard_assignment_iters=3)
    soft = assignments(cosines(2, 12, 20), config, epoch=3)
    hard = assignments(cosines(2, 12, 20), config, epoch=2)
    torch.testing.assert_close(hard, functional.one_hot(soft.argmax(-1), 20).float())
    assert soft.max() < 1


@pytest.mark.parametrize(("nearest", "expected"), [
    ([3] * 8, 0), ([0, 1, 2, 3] * 2, 1), ([0, 0, 1, 1, 0, 0, 1, 1], 0.5), ([0, 1], 1)])
def test_prototype_entropy_is_0_in_collapse_and_1_in_even_use(nearest: list[int], expected: float) -> None:
    scores = functional.one_hot(torch.tensor(nearest), 4).float()
    assert prototype_entropy(scores).item() == pytest.approx(expected, abs=1e-6)


def test_prototype_entropy_sees_a_collapse_that_sinkhorn_hides() -> None:
    scores = cosines(1, 20).repeat(64, 1) + 1e-3 * cosines(64, 20, seed=1)
    assert assignments(scores[None], SwavLoss(), epoch=0).sum(1).std() < 0.01  # in use evenly, to all appearance
    assert prototype_entropy(scores) < 0.1


def test_equal_seeds_give_equal_parameters_whatever_was_drawn_before(tiny: Tiny) -> None:
    def parameters(*overrides: str) -> Tensor:
        torch.rand(3)
        return torch.cat([p.detach().flatten() for p in build_objective(tiny(*overrides)).parameters()])

    assert torch.equal(parameters(), parameters())
    assert not torch.equal(parameters(), parameters("seed=1"))


def test_building_draws_nothing_from_the_global_generator(tiny: Tiny) -> None:
    before = torch.get_rng_state()
    build_objective(tiny())
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_of_one_size_share_a_pass_of_the_trunk_and_all_share_the_heads(tiny: Tiny) -> None:
    objective = build_objective(tiny())
    passes: list[tuple[str, int]] = []
    for name in ("backbone", "head"):
        objective.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: passes.append((name, len(args[0]))))
    objective(views(batch=4), None, epoch=0)
    assert passes == [("backbone", 8), ("backbone", 8), ("head", 16)]


def test_single_pass_every_crop_gives_each_crop_a_pass_of_the_trunk(tiny: Tiny) -> None:
    objective = build_objective(tiny("model.single_pass_every_crop=true"))
    passes: list[Tensor] = []
    objective.backbone.register_forward_hook(lambda module, args, output: passes.append(args[0]))
    objective(views(batch=4), None, epoch=0)
    expected = [crop for crops in views(batch=4) for crop in crops.split(4)]
    assert [len(crops) for crops in passes] == [4, 4, 4, 4]
    assert all(torch.equal(found, crop) for found, crop in zip(passes, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embedding_scores_and_loss_are_float32_under_autocast(tiny: Tiny, dtype: torch.dtype) -> None:
    objective = build_objective(tiny())
    heads: list[Tensor] = []
    objective.get_submodule("head").register_forward_hook(lambda module, args, out: heads.extend([out[0], *out[1]]))
    with torch.autocast("cpu", dtype):
        loss, _ = objective(views(), None, epoch=0)
    assert [tensor.dtype for tensor in [*heads, loss]] == [torch.float32] * 3
    torch.testing.assert_close(heads[0].norm(dim=1), torch.ones(16))


@pytest.mark.parametrize(("key", "source"), [
    ("embedding_dim=128", "the last of model.head.dims"), ("num_prototypes=[3000]", "model.head.num_clusters"),
    ("num_crops=2", "data.transforms.total_num_crops"), ("output_dir=\"\"", "the folder of the run's state"),
    ("queue.local_queue_length=0", "loss.queue.queue_length over the processes")])
def test_inferred_key_is_refused_with_where_it_comes_from(tiny: Tiny, key: str, source: str) -> None:
    name = key.partition("=")[0]
    with pytest.raises(BadInput, match=rf"key 'loss\.{name}'.* {source}"):
        tiny(f"loss.{key}")


def test_head_that_does_not_fit_a_trunk_of_unknown_width_is_refused_when_built(tiny: Tiny) -> None:
    training = tiny("model.trunk={name=\"torchvision:squeezenet1_1\"}", "model.head.dims=[7,16,8]")
    with pytest.raises(BadInput, match=r"model\.head\.dims begins with 7; expected 512"):
        build_objective(training)


def test_loss_that_is_not_finite_leaves_its_scores_and_assignments_in_a_file(tiny: Tiny, tmp_path: Path) -> None:
    objective = build_objective(tiny("model.head.num_clusters=[6, 9]"), output_dir=tmp_path / "state")
    assert objective.write_dump() is None
    images = views()
    images[0][0] = torch.nan
    assert objective(images, None, epoch=0)[0].isnan()
    path = objective.write_dump()
    assert path is not None
    tensors = load_file(path)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "head0.scores": [4, 4, 6], "head0.assignments": [2, 4, 6],
        "head1.scores": [4, 4, 9], "head1.assignments": [2, 4, 9]}
    assert tensors["head0.scores"].isnan().any()
    assert tensors["head0.assignments"].isnan().any()


def test_loss_of_several_heads_is_the_mean_of_theirs(tiny: Tiny) -> None:
    objective = build_objective(tiny("model.head.num_clusters=[6, 9]"))
    loss, metrics = objective(views(), None, epoch=0)
    with torch.no_grad():
        _, heads = objective.head(torch.cat([objective.backbone(crops) for crops in views()]))
    losses = [loss_of(scores.unflatten(0, (4, -1)), SwavLoss()) for scores in heads]
    torch.testing.assert_close(loss.detach(), torch.stack(losses).mean())
    entropies = [prototype_entropy(scores) for scores in heads]
    torch.testing.assert_close(metrics["prototype_entropy"], torch.stack(entropies).mean())


def updates(training: SwavTraining, epochs: int) -> list[Tensor]:
    """The prototypes before the first update and after each."""
    objective = build_objective(training)
    optimizer = build_optimizer(training.optimizer, objective.parameters())
    stepper = LocalStepper(optimizer, target_batch_size=1)
    govern(optimizer, objective, lambda epoch: 0.1, lambda: stepper.epoch)
    prototypes = objective.head.prototypes[0].weight
    history = [prototypes.detach().clone()]
    for _ in range(epochs):
        objective(views(), None, stepper.epoch)[0].backward()
        stepper.step(4)
        history.append(prototypes.detach().clone())
    return history


@pytest.mark.parametrize("optimiser", ["optimizer.use_larc=true", "optimizer.name=adamw"])
def test_prototypes_stay_as_they_are_while_frozen_and_move_after(tiny: Tiny, optimiser: str) -> None:
    history = updates(tiny("loss.freeze_prototypes_iters=2", "optimizer.weight_decay=0.1", optimiser,
                           "loss.normalize_last_layer=false"), epochs=4)
    moved = [not torch.equal(before, after) for before, after in pairwise(history)]
    assert moved == [False, False, True, True]


def test_prototypes_have_length_1_from_the_start_and_after_every_update(tiny: Tiny) -> None:
    for prototypes in updates(tiny(), epochs=3):
        torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(6))


def test_prototypes_keep_their_length_where_normalisation_is_off(tiny: Tiny) -> None:
    first, *_, last = updates(tiny("loss.normalize_last_layer=false"), epochs=3)
    assert (first.norm(dim=1) - 1).abs().min() > 0.01
    assert (last.norm(dim=1) - 1).abs().min() > 0.01


@pytest.mark.parametrize(("sizes", "passes"), [([16, 16], [24]), ([16, 8], [12, 12])])
def test_consecutive_crops_of_one_size_share_a_pass(tiny: Tiny, sizes: list[int], passes: list[int]) -> None:
    objective, seen = build_objective(tiny(f"data.transforms.size_crops={sizes}")), list[int]()
    objective.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    objective([torch.randn(12, 3, size, size) for size in sizes], None, epoch=0)
    assert seen == passes
