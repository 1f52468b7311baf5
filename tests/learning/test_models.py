"""The models by name, their sizes, how they prepare a pattern and where their weights may start from."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from stemtune.config import HEAD_NAMES, Config
from stemtune.crystal.phase import linio2
from stemtune.crystal.sampling import random_orientations
from stemtune.diffraction.geometry import Geometry
from stemtune.errors import UserError
from stemtune.learning import model as model_module
from stemtune.learning.checkpoint import load_model, save_model
from stemtune.learning.model import Backbone, OrientationModel
from stemtune.learning.models import BACKBONES, MODELS, build
from stemtune.learning.models.polar_head import PolarNetwork
from stemtune.learning.models.swin import fitted_window

SMALL = {
    "cnn": {"model.name": "cnn", "model.width": 8, "model.depth": 3},
    "densenet": {"model.name": "densenet", "model.width": 16, "model.depths": "1-1-1-1"},
    "swin": {"model.name": "swin", "model.width": 16, "model.depths": "1-1-1-1"},
    "swin adjusted": {"model.name": "swin", "model.width": 16, "model.depths": "1-1-1-1", "model.adjusted": True},
}


def made(size: int = 64, **flat: object) -> OrientationModel:
    torch.manual_seed(0)
    config = Config.from_flat({"head.step": 30, **flat})
    return build(config, linio2(), Geometry(size, 1.6 / size, 200.0))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [64, 72])
def test_every_backbone_takes_patterns_of_any_number_type_and_learns(name: str, size: int) -> None:
    model = made(size, **SMALL[name])
    counts = torch.randint(0, 50, (4, size, size))
    outputs = [model(counts.to(kind)) for kind in (torch.uint8, torch.int32, torch.float32)]
    for other in outputs[1:]:
        torch.testing.assert_close(other["logits"], outputs[0]["logits"])
    model.loss(outputs[0], random_orientations(4, 1).float()).backward()
    idle = [key for key, weight in model.named_parameters() if weight.grad is None]
    assert not idle
    answers = model.eval().candidates(model(counts), 2)
    assert answers.orientation.shape == (4, 2, 4)
    torch.testing.assert_close(answers.orientation[:, 0].norm(dim=-1), torch.ones(4))


POLAR = {"model.view": "polar", "model.angles": 72, "model.radii": 16, "model.grid_step": 15}
SEEN = {
    "cnn": SMALL["cnn"],
    "densenet": SMALL["densenet"],
    "swin": SMALL["swin"] | {"model.depths": "2-2-2"},
    "swin adjusted": SMALL["swin adjusted"] | {"model.depths": "2-2-2"},
    "circular": {"model.name": "circular", "model.width": 16, "model.depth": 2},
}
TURNS = {"cnn": 4, "densenet": 4, "swin": 24, "swin adjusted": 24, "circular": 1}
"""The smallest turns of the polar view, in angles, that shift the scores: the stride, for swin times the window."""


@pytest.mark.parametrize("head", HEAD_NAMES)
@pytest.mark.parametrize("name", SEEN)
def test_every_backbone_learns_from_the_polar_view_with_any_head(name: str, head: str, tmp_path: Path) -> None:
    model: Any = made(64, **POLAR, **SEEN[name], **{"head.name": head, "head.components": 8})
    counts = torch.randint(0, 50, (4, 64, 64))
    output = model(counts)
    if head == "grid":
        assert output["logits"].shape == (4, *model.head.grid.shape) and model.head.grid.shape[1] == 72
        torch.testing.assert_close(model(counts.to(torch.uint8))["logits"], output["logits"])
    model.loss(output, random_orientations(4, 1).float()).backward()
    assert not [key for key, weight in model.named_parameters() if weight.grad is None]
    model.eval()
    save_model(model, tmp_path / "model", {}, "")
    again = load_model(tmp_path / "model")
    with torch.no_grad():
        answers, others = model.candidates(model(counts), 2), again.candidates(again(counts), 2)
    assert answers.orientation.shape == (4, 2, 4)
    torch.testing.assert_close(answers.orientation[:, 0].norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(others, answers, equal_nan=True)


@pytest.mark.parametrize("name", SEEN)
def test_a_turn_of_the_polar_view_shifts_the_scores(name: str) -> None:
    model: Any = made(64, **POLAR, **SEEN[name]).eval()
    view = torch.randn(2, 1, 16, 72)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
        logits = model.from_view(view)["logits"]
        for shift in (TURNS[name], 2 * TURNS[name]):
            turned = model.from_view(view.roll(shift, -1))["logits"]
            torch.testing.assert_close(turned, logits.roll(shift, -1), atol=1e-4, rtol=1e-4)
            mirrored = model.from_view(view.flip(-2))["logits"]
            assert not torch.allclose(mirrored, logits, atol=1e-2)  # the radius is no circle


def test_the_polar_view_has_one_line_errors() -> None:
    for name, stride in (("cnn", 4), ("densenet", 4), ("swin", 8)):
        with pytest.raises(UserError, match=f"`model.angles` is 90, but must be a multiple of {stride} for {name}"):
            made(64, **POLAR | SEEN[name] | {"model.angles": 90})
    with pytest.raises(UserError, match=r"`model.depth` is 5, but a polar view of 16 radii can be halved less often"):
        made(64, **POLAR | SEEN["cnn"] | {"model.depth": 5})
    with pytest.raises(UserError, match=r"`model.kernel_size` is 31, too wide for `model.angles` of 16"):
        made(64, **POLAR | SEEN["cnn"] | {"model.kernel_size": 31, "model.angles": 16})
    with pytest.raises(UserError, match=r"`model.reach` is 0.1, so that the polar pattern would end at 0.08 1/Å"):
        made(64, **POLAR, **SEEN["circular"], **{"model.reach": 0.1})

    class Vector(Backbone):
        features = 1

    with pytest.raises(UserError, match=r"Vector has no feature map: `head.name` cannot be 'grid'"):
        PolarNetwork(Config.from_flat(POLAR), linio2(), Geometry(64, 0.025, 200.0), Vector())


def test_networks_on_the_polar_view_start_from_weights_of_pixels_and_of_their_own(tmp_path: Path) -> None:
    published = stock("densenet121", growth_rate=8, block_config=(1, 1, 1, 1))
    save_file(published, tmp_path / "densenet.safetensors")
    flat = POLAR | SEEN["densenet"] | {"model.pretrained": str(tmp_path / "densenet.safetensors")}
    model: Any = made(64, **flat)
    first = model.backbone.net.features.conv0.weight
    torch.testing.assert_close(first[:, 0], published["features.conv0.weight"].sum(1))
    assert not first[:, 1].any()
    before: Any = made(64, **POLAR, **SEEN["swin adjusted"])
    save_model(before, tmp_path / "before", {}, "")
    torch.manual_seed(1)
    after: Any = made(64, **POLAR, **SEEN["swin adjusted"], **{"model.pretrained": str(tmp_path / "before")})
    torch.testing.assert_close(after.state_dict(), before.state_dict())


def test_preparation_ignores_exposure_and_bad_numbers_and_resamples() -> None:
    model = made(64, **SMALL["cnn"], **{"model.input_size": 32, "data.gamma": 0.5})
    counts = torch.rand(2, 64, 64) * 100
    prepared = model.prepare(counts)
    assert prepared.shape == (2, 1, 32, 32)
    torch.testing.assert_close(prepared, model.prepare(counts * 7), atol=1e-4, rtol=0)
    torch.testing.assert_close(prepared.mean((1, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(prepared.std((1, 2, 3)), torch.ones(2), atol=1e-4, rtol=0)
    spoilt = counts.clone()
    spoilt[0, 3, 4], spoilt[1, 5, 6] = float("nan"), -50.0
    zeroed = counts.clone()
    zeroed[0, 3, 4], zeroed[1, 5, 6] = 0.0, 0.0
    torch.testing.assert_close(model.prepare(spoilt), model.prepare(zeroed))
    assert model.prepare(torch.full((1, 64, 64), 3)).abs().max() == 0
    by_hand = counts.view(2, 32, 2, 32, 2).mean((2, 4)).sqrt()
    by_hand = (by_hand - by_hand.mean((1, 2), keepdim=True)) / by_hand.std((1, 2), keepdim=True)
    torch.testing.assert_close(prepared[:, 0], by_hand, atol=1e-5, rtol=1e-4)


def test_group_normalisation_keeps_its_layout_on_a_cpu() -> None:
    devices = [torch.device("cpu"), torch.device("cuda")]
    for name, wanted in (("cnn", [False, True]), ("swin", [True, True])):
        assert [made(64, **SMALL[name]).channels_last(device) for device in devices] == wanted
        off = made(64, **{**SMALL[name], "train.channels_last": False})
        assert not any(off.channels_last(device) for device in devices)


def test_stock_networks_have_the_sizes_of_their_papers() -> None:
    sizes = {}
    for name, flat in {
        "densenet": {"model.name": "densenet"},
        "swin": {"model.name": "swin"},
        "adjusted": {"model.name": "swin", "model.adjusted": True},
    }.items():
        model: Any = made(128, **flat)
        sizes[name] = sum(weight.numel() for weight in model.backbone.net.parameters())
        if name != "densenet":
            windows = [layer.blocks[0].window_size[0] for layer in model.backbone.net.layers]
            assert windows == ([8, 8, 8, 4] if name == "swin" else [8, 8, 8, 8])
    assert sizes["densenet"] == pytest.approx(6.95e6, rel=0.01)
    assert sizes["swin"] == pytest.approx(27.5e6, rel=0.01)
    assert sizes["adjusted"] < sizes["swin"]


@pytest.mark.parametrize(("tokens", "wanted", "window"), [(32, 7, 8), (16, 7, 8), (4, 7, 4), (28, 7, 7), (13, 7, 13)])
def test_windows_divide_the_map(tokens: int, wanted: int, window: int) -> None:
    assert fitted_window(tokens, wanted) == window
    assert tokens % window == 0


def test_the_cnn_has_the_kernel_and_depth_that_were_asked_for() -> None:
    model: Any = made(64, **SMALL["cnn"], **{"model.kernel_size": 7})
    assert [stage.down.kernel_size for stage in model.backbone.stages] == [(7, 7)] * 3
    with pytest.raises(UserError, match=r"`model.depth` is 9, but a pattern of 64 px"):
        made(64, **{"model.name": "cnn", "model.depth": 9})


def test_unknown_names_and_malformed_depths_are_one_line_errors() -> None:
    with pytest.raises(UserError, match="`model.depths` is '2-2', but must be 4 numbers of blocks"):
        made(64, **{"model.name": "swin", "model.depths": "2-2"})
    with pytest.raises(UserError, match="multiple of 8 or 12"):
        made(64, **{"model.name": "swin", "model.width": 50})
    assert set(BACKBONES) | set(MODELS) == {"cnn", "densenet", "swin", "circular", "matched", "polar", "rerank"}


def stock(name: str, **sizes: object) -> dict[str, torch.Tensor]:
    """Random weights in the form timm publishes them: three colours and a classifier."""
    torch.manual_seed(5)
    return dict(timm.create_model(name, **sizes).state_dict())


def test_densenet_starts_from_a_file_of_stock_weights(tmp_path: Path) -> None:
    published = stock("densenet121", growth_rate=8, block_config=(1, 1, 1, 1))
    save_file(published, tmp_path / "densenet.safetensors")
    torch.save(published, tmp_path / "densenet.pt")
    for file in ("densenet.safetensors", "densenet.pt"):
        model: Any = made(64, **SMALL["densenet"], **{"model.pretrained": str(tmp_path / file)})
        first = published["features.conv0.weight"].sum(1, keepdim=True)
        torch.testing.assert_close(model.backbone.net.features.conv0.weight, first)
        last = published["features.denseblock4.denselayer1.conv2.weight"]
        torch.testing.assert_close(model.backbone.net.features.denseblock4.denselayer1.conv2.weight, last)


def test_adjusted_swin_takes_what_fits_of_stock_weights_and_says_what_did_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    published = stock("swin_tiny_patch4_window7_224", embed_dim=16, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8))
    monkeypatch.setattr(model_module, "hub_weights", lambda name: published)
    flat = {"model.name": "swin", "model.width": 16, "model.adjusted": True, "model.pretrained": True}
    with caplog.at_level("WARNING"):
        model: Any = made(64, **flat)
    net = model.backbone.net
    torch.testing.assert_close(net.layers[2].blocks[3].mlp.fc1.weight, published["layers.2.blocks.3.mlp.fc1.weight"])
    assert net.patch_embed.proj.weight.shape[-2:] == (2, 2)
    bias = net.layers[0].blocks[0].attn.relative_position_bias_table
    assert bias.shape[0] == 15**2 and bias.std() > 0
    assert "layers.2.blocks.4" in caplog.text or "not used" in caplog.text
    assert "backbone.position" in caplog.text or "backbone" in caplog.text.split("new:")[1].split(";")[0]
    fresh: Any = made(64, **{**flat, "model.pretrained": False})
    assert not torch.equal(fresh.backbone.net.patch_embed.proj.weight, net.patch_embed.proj.weight)


def test_a_network_goes_on_from_the_folder_of_another_with_a_different_head(tmp_path: Path) -> None:
    before: Any = made(64, **SMALL["cnn"])
    save_model(before, tmp_path / "before", {}, "")
    torch.manual_seed(1)
    after: Any = made(64, **SMALL["cnn"], **{"head.step": 45, "model.pretrained": str(tmp_path / "before")})
    for key, value in before.backbone.state_dict().items():
        torch.testing.assert_close(after.backbone.state_dict()[key], value)
    assert after.head.to_product.weight.shape != before.head.to_product.weight.shape


def test_weights_that_cannot_be_had_are_one_line_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(model_module, "_reachable", lambda address: False)
    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(UserError, match="give the file as model.pretrained: PATH") as caught:
        model_module.hub_weights("densenet121")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no weights of 'cnn' are published; give a path"):
        made(64, **SMALL["cnn"], **{"model.pretrained": True})
    with pytest.raises(UserError, match="does not exist"):
        made(64, **SMALL["cnn"], **{"model.pretrained": str(tmp_path / "absent.pt")})
    (tmp_path / "bad.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(UserError, match="cannot be read as weights"):
        made(64, **SMALL["cnn"], **{"model.pretrained": str(tmp_path / "bad.safetensors")})
    save_file({"other": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="nothing in .* fits the model 'cnn'"):
        made(64, **SMALL["cnn"], **{"model.pretrained": str(tmp_path / "other.safetensors")})
