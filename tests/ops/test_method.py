"""Inversion, tuning, refinement and attack on the embedded generator (few steps: their rules, not their quality)."""

import copy
import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster import ItemTimeout
from scol_ops import tuning
from scol_ops.attack import attack, attack_loss
from scol_ops.filters import damp_chroma, low_pass
from scol_ops.inversion import InvertSettings, invert
from scol_ops.losses import identity_hinge_loss
from scol_ops.metrics import to_uint8
from scol_ops.models.embedded import load_mobilestylegan
from scol_ops.refinement import refine
from scol_ops.tuning import DeadlineExceeded, confine, select_parameters, tune
from scol_ops.visibility import jod
from tests.helpers.operator_settings import ATTACK, REFINE, TUNE


@pytest.fixture(scope="module")
def generator():
    return load_mobilestylegan(256)


@pytest.fixture(scope="module")
def faces(generator):
    z = torch.randn(3, 512, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        w = generator.mean_code + 0.7 * (generator.mapping(z) - generator.mean_code)
        codes = w[:, None].expand(-1, 16, -1).contiguous()
        return codes, torch.cat([generator(c).clamp(-1, 1) for c in codes.split(1)])


@pytest.fixture(scope="module")
def mask():
    y = torch.linspace(-1, 1, 256)
    return ((y[:, None] ** 2 + y[None] ** 2) < 0.4).float()[None, None]


def thumbnail(x):
    """A stand-in identity feature for rules that hold for any: the centred 8 x 8 picture, unit norm."""
    small = torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)
    return torch.nn.functional.normalize(small - small.mean(1, keepdim=True), dim=1)


SHORT = replace(TUNE, steps=3, lr=1e-3, ssim_weight=1.0)


def run(generator, faces, mask, i, seed=0):
    codes, pictures = faces
    fused = codes[(i + 1) % 3 : (i + 1) % 3 + 1]
    return tune(generator, fused, pictures[i : i + 1], mask, [thumbnail], [0.2], SHORT, seed)


def test_faces_do_not_depend_on_their_order(generator, faces, mask):
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    forward = [run(generator, faces, mask, i).picture for i in (0, 1)]
    backward = [run(generator, faces, mask, i).picture for i in (1, 0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert all(torch.equal(before[k], v) for k, v in generator.state_dict().items())


def test_tuning_reconstructs_and_stays_inside_the_mask(generator, faces, mask):
    codes, pictures = faces
    settings = replace(TUNE, steps=8, lr=1e-3, hinge=0, id_lock=0)
    result = tune(generator, codes[1:2], pictures[:1], mask, [], [], settings)
    assert result.history[-1]["reconstruction"] < 0.8 * result.history[0]["reconstruction"]
    outside = (mask == 0).expand_as(result.picture)
    assert torch.equal(result.picture[outside], pictures[:1][outside])


def test_a_gradient_mode_that_was_left_off_does_no_harm(generator, faces, mask):
    """As after a time limit inside `Optimizer.step`, which sets the mode back in a `finally` of several calls."""
    codes, pictures = faces
    wanted = run(generator, faces, mask, 0).picture
    torch.set_grad_enabled(False)
    try:
        assert torch.equal(run(generator, faces, mask, 0).picture, wanted)
        refine(pictures[:1], pictures[:1], mask, [thumbnail], [0.5], None, replace(REFINE, steps=1))
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_the_generator_is_what_it_was_after_a_failure(generator, faces, mask):
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    with pytest.raises(DeadlineExceeded):
        tune(generator, faces[0][:1], faces[1][:1], mask, [], [], SHORT, deadline=time.monotonic() - 1)

    def fail(step, losses):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        tune(generator, faces[0][:1], faces[1][:1], mask, [], [], SHORT, on_step=fail)
    assert all(torch.equal(before[k], v) for k, v in generator.state_dict().items())
    assert not any(p.requires_grad for p in generator.parameters())


def test_a_time_limit_while_a_face_is_left_changes_no_generator(generator, faces, mask, monkeypatch):
    """The limit's signal comes again and again: whatever would be put right after a face could be cut short by it."""
    before = {k: v.clone() for k, v in generator.state_dict().items()}

    def expired(*arguments, **options):
        raise ItemTimeout

    def step(number, losses):
        for name in ("copy_", "set_", "add_", "data_ptr"):  # by which weights could be put back
            monkeypatch.setattr(torch.Tensor, name, expired)
        monkeypatch.setattr(torch.nn.Module, "load_state_dict", expired)
        raise ItemTimeout

    with pytest.raises(ItemTimeout):
        tune(generator, faces[0][:1], faces[1][:1], mask, [], [], replace(SHORT, parameters="all"), on_step=step)
    monkeypatch.undo()
    assert all(torch.equal(before[k], v) for k, v in generator.state_dict().items())
    assert not any(p.requires_grad for p in generator.parameters())


def test_bfloat16_is_left_where_it_would_be_emulated(generator, faces, mask, monkeypatch):
    def picture(bf16: bool) -> torch.Tensor:
        return tune(generator, faces[0][1:2], faces[1][:1], mask, [], [], replace(SHORT, steps=1, bf16=bf16)).picture

    plain = picture(False)
    monkeypatch.setattr(tuning, "computes_bf16", lambda device: False)
    assert torch.equal(picture(True), plain)
    monkeypatch.setattr(tuning, "computes_bf16", lambda device: True)
    assert not torch.equal(picture(True), plain)


def test_parameter_sets_are_nested_and_leave_the_mapping(generator):
    own = copy.deepcopy(generator)
    sizes = {which: sum(p.numel() for p in select_parameters(own, which)) for which in ("all", "convolutions", "late")}
    assert not any(p.requires_grad for p in own.mapping.parameters())
    with pytest.raises(ValueError, match="parameters"):
        select_parameters(own, "everything")
    assert sizes["all"] > sizes["convolutions"] > 0 and sizes["all"] > sizes["late"] > 0


@pytest.fixture(scope="module")
def begin(faces, mask):
    """Another face in the first one's place, and that one."""
    return confine(faces[1][1:2], faces[1][:1], mask), faces[1][:1]


def refined(begin, mask, *, identity=thumbnail, margin=0.5, photo_side=None, seed=0, **settings):
    picture, original = begin
    settings = replace(REFINE, **{"diversity": 0.0} | settings)
    return refine(picture, original, mask, [identity], [margin], None, settings, seed=seed, photo_side=photo_side)


def pixels(picture: torch.Tensor) -> np.ndarray:
    return to_uint8(picture[0])


def test_refinement_lowers_similarity_and_returns_to_the_photo(begin, mask):
    similarity = {}
    for hinge in (0.0, 2.0):
        result = refined(begin, mask, steps=30, lr=0.03, seen=1.0, hinge=hinge)
        assert result.history[-1]["psnr"] > result.history[0]["psnr"] + 0.5
        assert result.history[-1]["seen"] < 0.5 * result.history[0]["seen"]
        similarity[hinge] = float((thumbnail(result.picture) * thumbnail(begin[1])).sum())
    assert similarity[2.0] < similarity[0.0] - 0.02
    assert torch.equal(refined(begin, mask, steps=0).picture, begin[0])


@pytest.mark.parametrize("more", [{}, {"chroma": 0.25}, {"residual_sigma": 1.5}])
def test_no_pixel_changes_more_than_its_bound(begin, mask, more):
    limit, more = 10 / 255, {"steps": 12, "lr": 0.05, "diversity": 1.0, "margin": -1.0} | more
    for share in (0.0, 1.0):
        result = refined(begin, mask, start=share, limit=limit, **more)
        change = (result.picture - begin[1]).abs()
        assert float(change.max()) <= 2 * limit + 1e-6, share
        assert float(change.max()) > 1.2 * limit, "the bound is what keeps it there"
        assert torch.equal(result.picture * (mask == 0), begin[1] * (mask == 0))
    free = refined(begin, mask, start=1.0, **more).picture
    assert float((free - begin[1]).abs().max()) > 4 * limit


def test_what_starts_at_the_bound_can_still_move(begin, mask):
    """Clamped, a residual beyond the bound would have no gradient, and stay."""
    first, last = (
        refined(begin, mask, steps=n, lr=0.02, start=1.0, limit=4 / 255, seen=5.0, hinge=0.0).history[-1]["seen"]
        for n in (1, 40)
    )
    assert last < 0.5 * first


def test_the_search_starts_at_the_photo_or_at_a_share_of_the_tuned_change(begin, mask):
    begins = {share: refined(begin, mask, steps=1, start=share, seen=1.0).history[0] for share in (0.0, 0.3, 1.0)}
    assert begins[0.0]["psnr"] > 60 and begins[0.0]["seen"] < 1e-3
    assert begins[0.3]["psnr"] - begins[1.0]["psnr"] == pytest.approx(-20 * math.log10(0.3), abs=0.1)
    # From the photo the tuned face plays no part.
    other = confine(-begin[0], begin[1], mask)
    same = refined((other, begin[1]), mask, steps=3, start=0.0, seen=1.0).picture
    assert torch.equal(same, refined(begin, mask, steps=3, start=0.0, seen=1.0).picture)


def test_a_larger_weight_of_what_is_seen_shows_less(begin, mask):
    found = {}
    for seen in (0.05, 0.5, 5.0):
        more = {"steps": 30, "lr": 0.02, "diversity": 1.0, "margin": -1.0, "limit": 20 / 255}
        result = refined(begin, mask, start=0.0, seen=seen, **more)
        found[seen] = jod(pixels(begin[1]), pixels(result.picture))
    assert found[0.05] < found[0.5] - 0.05 and found[0.5] < found[5.0] - 0.01, found


def test_people_look_at_the_middle_and_at_the_photo_s_own_size(begin, mask):
    original, everywhere = begin[1], torch.ones_like(mask)

    def seen(picture, **more):
        return refined((picture, original), everywhere, steps=1, seen=1.0, **more).history[0]["seen"]

    corner = original.clone()
    corner[..., :40, :40] += 0.2
    assert seen(corner, surroundings=0.0) < 0.2 * seen(corner, surroundings=1.0)
    assert seen(corner, surroundings=0.0) < seen(corner, surroundings=0.5) < seen(corner, surroundings=1.0)
    fine = original + 0.05 * torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
    small, own, large = (seen(fine, photo_side=side) for side in (128.0, None, 512.0))
    assert small < 0.8 * own and own < 0.8 * large, "a crop's pixel is so many of the photo's"
    assert seen(fine, zoom=2.0) == pytest.approx(large, rel=1e-5), "enlarged twice it is as a face twice as large"


def test_each_step_sees_as_many_transformed_faces_as_asked_for(begin, mask):
    looked, found = [], {}

    def feature(x):
        looked.append(x.detach())
        return thumbnail(x)

    for draws in (1, 4):
        looked.clear()
        result = refined(begin, mask, identity=feature, steps=2, draws=draws, diversity=1.0, margin=-1.0, seed=3)
        assert len(looked) == 1 + 2 * draws, "the original, and those of each step"
        first = looked[1 : 1 + draws]
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(first, 2))
        hinges = [float(identity_hinge_loss([thumbnail(x)], [thumbnail(begin[1])], [-1.0])) for x in first]
        assert result.history[0]["hinge"] == pytest.approx(sum(hinges) / draws, rel=1e-5)
        found[draws] = result.picture
    assert not torch.equal(found[1], found[4])


def test_refinement_at_the_photo_s_scale_works_on_what_is_left_there(begin, mask):
    """A feature that sees only fine detail cannot steer a face that is small in its photo."""

    def fine(x):
        return torch.nn.functional.normalize((x - low_pass(x, 2.0)).flatten(1), dim=1)

    more = {"identity": fine, "margin": -1.0, "steps": 1, "photo_scale": True}
    hinge = {side: refined(begin, mask, photo_side=side, **more).history[0]["hinge"] for side in (None, 256.0, 20.0)}
    assert hinge[None] == hinge[256.0] and abs(hinge[20.0] - hinge[None]) > 0.05


def test_no_change_is_finer_than_the_photo_s_pixels(begin, mask):
    """The low-pass is as wide as asked for in pixels of the photo, or of the crop where the face is larger."""

    def board(side):
        picture = begin[1] + 0.1 * (((torch.arange(256)[:, None] + torch.arange(256)) // 2 % 2).float() * 2 - 1)
        everywhere, more = torch.ones_like(mask), {"steps": 1, "lr": 1e-6, "start": 1.0, "residual_sigma": 0.8}
        result = refined((picture, begin[1]), everywhere, photo_side=side, **more).picture
        return float((result - begin[1])[..., 16:-16, 16:-16].std())

    own, large, small = board(None), board(512.0), board(128.0)
    assert own == pytest.approx(large, rel=1e-5) and small < 0.5 * own < 0.05


def test_a_share_of_the_draws_is_smaller_than_in_the_photo(begin, mask):
    """What is finer than a pixel of the shrunk face is lost in these."""
    board = ((torch.arange(256)[:, None] + torch.arange(256)) % 2).float().expand(1, 3, -1, -1) - 0.5
    original, everywhere = begin[1], torch.ones_like(mask)
    for share in (0.0, 0.5, 1.0):
        seen = []

        def feature(x, seen=seen):
            seen.append(float((x - low_pass(x, 2.0)).detach().square().mean()))
            return thumbnail(x)

        more = {"identity": feature, "steps": 1, "draws": 40, "photo_scale": True, "shrink": share, "lr": 1e-6}
        refined((original + board, original), everywhere, **more)
        lost = sum(energy < 0.5 * float(board.square().mean()) for energy in seen[1:])
        low, high = {0.0: (0, 0), 0.5: (10, 30), 1.0: (36, 40)}[share]
        assert low <= lost <= high, (share, lost)


def test_features_weigh_by_their_span(begin, mask):
    def hinge(span):
        settings = replace(REFINE, steps=1, diversity=0.0)
        return refine(*begin, mask, [thumbnail], [0.0], None, settings, spans=span).history[0]["hinge"]

    assert hinge([0.25]) == pytest.approx(4 * hinge([1.0])) and hinge(None) == hinge([1.0]) > 0


@pytest.mark.parametrize("limit", [0.0, 20 / 255])
def test_refinement_without_chroma_changes_lightness_alone(begin, mask, limit):
    original, change = begin[1], {}
    for chroma in (0.0, 0.25, 1.0):
        result = refined(begin, mask, steps=5, residual_sigma=2.0, chroma=chroma, limit=limit)
        change[chroma] = result.picture - original
    colour = {chroma: float((c - c.mean(dim=1, keepdim=True)).abs().mean()) for chroma, c in change.items()}
    inside = ((change[0.0] + original).abs() < 1).all(dim=1)  # not clamped
    grey = change[0.0].movedim(1, -1)[inside]
    assert float((grey - grey[:, :1]).abs().max()) < 1e-5 < float(grey.abs().mean())
    assert colour[0.0] < colour[0.25] < 0.5 * colour[1.0]


def test_damped_chroma_by_hand():
    residual = torch.tensor([0.4, 0.2, -0.2]).reshape(1, 3, 1, 1).expand(2, 3, 4, 4)
    luma = 0.299 * 0.4 + 0.587 * 0.2 - 0.114 * 0.2
    assert damp_chroma(residual, 1) is residual
    assert torch.allclose(damp_chroma(residual, 0), torch.full((2, 3, 4, 4), luma))
    assert torch.allclose(damp_chroma(residual, 0.5), (residual + luma) / 2)
    assert torch.allclose(damp_chroma(torch.full((1, 3, 2, 2), 0.3), 0.1), torch.full((1, 3, 2, 2), 0.3))


def test_low_pass_keeps_a_constant_and_removes_a_checkerboard():
    flat = torch.full((1, 3, 32, 32), 0.3)
    assert torch.allclose(low_pass(flat, 2.0), flat, atol=1e-6)
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2).float().expand(1, 3, -1, -1) * 2 - 1
    assert float(low_pass(board, 2.0)[..., 8:-8, 8:-8].abs().max()) < 0.01
    assert low_pass(board, 0) is board


def linear_encoder(x):
    weights = torch.randn(3 * 64, 2 * 512, generator=torch.Generator().manual_seed(1)) / 10
    return (torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1) @ weights).unflatten(1, (2, 512))


@pytest.mark.parametrize(
    "settings",
    [ATTACK, replace(ATTACK, eps=4 / 255, diversity=1.0, blur=True), replace(ATTACK, momentum=1, translation_sigma=3)],
)
def test_attack_improves_its_loss_within_its_bound(faces, mask, settings):
    pictures = faces[1][:2]
    target = linear_encoder(faces[1][[2, 2]])
    components = torch.rand(target.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    result = attack(linear_encoder, pictures, target, components, mask, settings, seed=3)
    assert torch.equal(result.loss_before, attack_loss(linear_encoder, pictures, target, components))
    assert (result.loss_after < result.loss_before).all()
    assert torch.allclose(attack_loss(linear_encoder, result.picture, target, components), result.loss_after, rtol=1e-5)
    change = (result.picture - pictures).abs()
    assert float(change.max()) <= 2 * settings.eps + 1e-6
    assert float((change * (mask == 0)).max()) == 0.0
    again = attack(linear_encoder, pictures, target, components, mask, settings, seed=3)
    assert torch.equal(again.picture, result.picture)


def test_attack_without_components_or_steps_changes_nothing(faces):
    pictures = faces[1][:1]
    target = linear_encoder(faces[1][1:2])
    none = torch.zeros_like(target, dtype=torch.bool)
    assert torch.equal(attack(linear_encoder, pictures, target, none, None, ATTACK).picture, pictures)
    every = torch.ones_like(none)
    assert torch.equal(
        attack(linear_encoder, pictures, target, every, None, replace(ATTACK, steps=0)).picture, pictures
    )
    with pytest.raises(ValueError):
        attack(linear_encoder, pictures, target, every, None, replace(ATTACK, eps=-1))
    with pytest.raises(ValueError, match="momentum"):
        attack(linear_encoder, pictures, target, every, None, replace(ATTACK, momentum=-0.5))


def test_momentum_and_smoothing_change_the_attack_s_steps(faces):
    """By hand, one step: the sign of the smoothed gradient; momentum counts from the second step on."""
    picture, target = faces[1][:1] * 0.9, linear_encoder(faces[1][1:2])
    every = torch.ones_like(target, dtype=torch.bool)

    def steps(number, **settings):
        settings = replace(ATTACK, steps=number, step_size=1 / 255, random_start=0.0, **settings)
        return attack(linear_encoder, picture, target, every, None, settings).picture - picture

    moved = picture.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(attack_loss(linear_encoder, moved, target, every).sum(), moved)
    for sigma in (0.0, 3.0):
        wanted = -2 / 255 * low_pass(gradient, sigma).sign()
        assert torch.allclose(steps(1, translation_sigma=sigma), wanted, atol=1e-6)
        assert torch.allclose(steps(1, translation_sigma=sigma, momentum=1.0), wanted, atol=1e-6)
    assert not torch.allclose(steps(1, translation_sigma=3.0), steps(1), atol=1e-6)
    assert not torch.allclose(steps(6, momentum=1.0), steps(6), atol=1e-6)


def test_tuning_s_features_see_what_transformations_leave(generator, faces, mask):
    """Half of the draws transform; a hinge that rests (margin 1) leaves the pictures themselves as they were."""
    seen, pictures = [], []
    for more in ({}, {"jpeg_quality": (20, 20)}):
        found = []

        def feature(x, found=found):
            found.append(x.detach())
            return thumbnail(x)

        settings = replace(TUNE, steps=5, diversity=0.0, id_lock=0.0, hinge=1.0, **more)
        pictures.append(tune(generator, faces[0][1:2], faces[1][:1], mask, [feature], [1.0], settings, seed=4).picture)
        seen.append(found)
    assert torch.equal(*pictures)
    changes = [float((a - b).abs().max()) for a, b in zip(*seen, strict=True)]
    assert changes[:2] == [0, 0], "the original and the fused face are seen as they are"
    assert min(changes[2:]) == 0 and max(changes[2:]) > 0.05, changes


def test_inversion_refinement_comes_closer(generator, faces):
    codes, pictures = faces

    def mean_encoder(x):
        return generator.mean_code.expand(x.shape[0], 16, -1)

    plain = invert(mean_encoder, pictures[:1], generator)
    refined = invert(mean_encoder, pictures[:1], generator, InvertSettings(refine_steps=6, lr=0.05, stay=0.1))
    assert float(refined.psnr) > float(plain.psnr) + 0.5
    assert refined.codes.shape == (1, 16, 512)
    with pytest.raises(ValueError, match="faces"):
        invert(mean_encoder, pictures[0], generator)
