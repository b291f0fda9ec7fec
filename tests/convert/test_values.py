"""What conversion does to the numbers, at a size where they can be looked at."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitdet.backbones.vitae import ViTAE
from vitdet.convert import convert, tensors
from vitdet.convert.names import shapes_of
from vitdet.utils.checks import InputError

from .manifests import mae, pyramid, random, vit


def shapes(**changes):
    return shapes_of(vit(**changes).state_dict())


# --- where the weights lie, and where they go ----------------------------------------------------


def test_backbone_weights_go_to_any_root_and_back():
    weights, bare, net = mae(), shapes(), pyramid(vit())
    in_pyramid = shapes_of(net.state_dict())
    detector = {f"backbone.{name}": shape for name, shape in in_pyramid.items()}
    head = "roi_heads.box_predictor.cls_score.weight"
    detector[head] = (6, 8)
    for target, root in ((bare, ""), (in_pyramid, "net."), (detector, "backbone.net.")):
        output, report = convert({"model": weights}, target)
        assert report.used == {n: root + n for n in bare}
        assert all(torch.equal(output[root + name], weights[name]) for name in bare)
        assert set(report.initialised) == {n for n in target if not n.startswith(root)}
    source = {f"backbone.{name}": value for name, value in net.state_dict().items()}
    output, report = convert({"model": source | {head: torch.ones(6, 8)}}, in_pyramid)
    assert all(torch.equal(output[name], value) for name, value in net.state_dict().items())
    assert report.dropped == {head: "pyramid or head: the model has no place for it"}


@pytest.mark.parametrize("prefix", ["module.", "model._orig_mod.", "student.module."])
@pytest.mark.parametrize("nest", ["", "state_dict", "params", "student"])
def test_wrappers_are_taken_off(prefix, nest):
    weights = {f"{prefix}{name}": value for name, value in mae().items()}
    content = {nest: weights, "epoch": 3} if nest else weights
    output, report = convert(content, shapes(), source_format="mae")
    assert torch.equal(output["pos_embed"], weights[f"{prefix}pos_embed"])
    assert report.nested_under == nest


def test_weights_are_chosen_among_the_nests_of_a_file():
    average = {name: value + 1 for name, value in mae().items()}
    content = {"model": mae(), "ema_state": average, "iteration": 3}
    _, report = convert(content, shapes(), source_format="mae")
    note = "weights taken from 'model'; --weights takes another: ema_state"
    assert report.notes == [note, "left out beside the weights: iteration"]
    output, report = convert(content, shapes(), source_format="mae", weights="ema_state")
    assert torch.equal(output["pos_embed"], average["pos_embed"])
    content = {"state_dict": mae(), "state_dict_ema": average}
    output, report = convert(content, shapes(), source_format="mae")
    assert torch.equal(output["pos_embed"], average["pos_embed"])


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(5, 5), (6, 3)])
def test_position_embedding_grows_with_its_class_row(grid):
    weights, size = mae(), [16 * side for side in grid]
    square = grid[0] == grid[1]
    options = {"pretrain_img_size": size[0] if square else size}
    settings = None if square else options | {"patch_size": 16}
    output, report = convert({"model": weights}, shapes(**options), settings=settings)
    table = weights["pos_embed"][:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    grown = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
    expected = grown.flatten(2).mT
    torch.testing.assert_close(output["pos_embed"][:, 1:], expected, rtol=0, atol=1e-6)
    assert torch.equal(output["pos_embed"][:, :1], weights["pos_embed"][:, :1])
    assert report.resized == {"pos_embed": ((1, 17, 16), (1, 1 + grid[0] * grid[1], 16))}


def test_class_row_dropped_or_filled_with_zeros():
    weights, no_row = mae(), {"pretrain_use_cls_token": False}
    output, report = convert({"model": weights}, shapes(**no_row))
    assert torch.equal(output["pos_embed"], weights["pos_embed"][:, 1:])
    assert report.notes == ["pos_embed: class row dropped, the model has none"]
    weights = mae(**no_row)
    output, report = convert({"model": weights}, shapes())
    assert torch.equal(output["pos_embed"][:, 1:], weights["pos_embed"])
    assert not output["pos_embed"][:, 0].any()
    assert report.notes == ["pos_embed: class row filled with zeros, the file has none"]
    _, report = convert({"model": mae(pretrain_img_size=80)}, shapes())
    assert report.notes[0].startswith("pos_embed shrinks from 5x5 to 4x4 places: to keep all, set")


def test_class_token_and_the_row_for_it():
    weights, tokens = mae(), {"use_cls_token": True, "final_norm": True}
    output, report = convert({"model": weights}, shapes(**tokens))
    assert torch.equal(output["cls_token"], weights["cls_token"])
    assert report.dropped == {}
    output, report = convert({"model": weights}, shapes(**tokens, pretrain_use_cls_token=False))
    assert torch.equal(output["cls_token"], weights["cls_token"] + weights["pos_embed"][:, :1])
    assert torch.equal(output["pos_embed"], weights["pos_embed"][:, 1:])
    assert report.made["cls_token"] == ["cls_token", "pos_embed"]


def test_relative_positions_are_resized_linearly():
    source, name = random(vit(use_rel_pos=True, window_size=4)), "blocks.1.attn.rel_pos_w"
    target = shapes(use_rel_pos=True, window_size=6)
    output, report = convert({"model": source}, target, source_format="detectron2")
    expected = F.interpolate(source[name].T[None], size=11, mode="linear")[0].T
    torch.testing.assert_close(output[name], expected, rtol=0, atol=1e-6)
    assert report.resized[name] == ((7, 8), (11, 8))
    assert len(report.resized) == 4


def test_patch_kernel_is_resampled_on_demand():
    weights = mae(patch_size=14, pretrain_img_size=56)
    output, report = convert({"model": weights}, shapes(), resize_patch_embed=True)
    kernel = weights["patch_embed.proj.weight"]
    expected = F.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(output["patch_embed.proj.weight"], expected)
    assert report.resized["patch_embed.proj.weight"] == ((16, 3, 14, 14), (16, 3, 16, 16))
    assert "patch_embed resampled from 14 to 16 pixels" in report.notes


def test_folded_layer_scale_is_the_same_network():
    source, model = vit(layer_scale=True), vit()
    source.load_state_dict({name: value * 0.3 for name, value in random(source).items()})
    options = {"source_format": "detectron2", "fold_layer_scale": True}
    output, report = convert({"state_dict": source.state_dict()}, shapes(), **options)
    model.load_state_dict(output)
    image = torch.randn(1, 3, 64, 64)
    expected = source(image)["last_feat"]
    torch.testing.assert_close(model(image)["last_feat"], expected, rtol=0, atol=1e-4)
    assert report.made["blocks.1.mlp.fc2.bias"] == ["blocks.1.mlp.fc2.bias", "blocks.1.ls2.gamma"]
    assert report.notes == ["LayerScale of 4 branches folded into the layers before it"]
    half = {name: value.bfloat16() for name, value in source.state_dict().items()}
    output, _ = convert(half, shapes(), **options)
    name, gamma = "blocks.0.attn.proj.weight", half["blocks.0.ls1.gamma"].float()
    assert torch.equal(output[name], (half[name].float() * gamma[:, None]).bfloat16())
    for state, target in ((mae(), shapes()), (source.state_dict(), shapes(layer_scale=True))):
        with pytest.raises(InputError, match=r"--fold-layer-scale: expected LayerScale in the fil"):
            convert(state, target, **options)


# --- ViTAE: scaled tables, split biases, kernels of another size, names of stages ----------------


def vitae():
    options = {"img_size": 64, "patch_size": 16, "embed_dim": 8, "depth": 2}
    net = ViTAE(**options, num_heads=2, window_size=2, global_block_indexes=[1])
    return shapes_of(net.state_dict())


def vitae_file(changes):
    """Return a file without tables and with other shapes, None takes a name away."""
    found = {name: shape for name, shape in vitae().items() if "rel_pos" not in name} | changes
    torch.manual_seed(1)
    return {
        name: torch.randn(shape) if shape else torch.zeros((), dtype=torch.int64)
        for name, shape in found.items()
        if shape is not None
    }


def test_biases_of_q_and_v_become_one_with_nothing_for_k_and_back():
    split = {f"blocks.0.attn.{x}_bias": (8,) for x in "qv"} | {"blocks.0.attn.qkv.bias": None}
    split |= {f"blocks.1.attn.{x}_bias": None for x in "qv"} | {"blocks.1.attn.qkv.bias": (24,)}
    file = vitae_file(split)
    output, report = convert({"model": file}, vitae())
    assert report.source_format == "vitae_pretrain"
    q, v = file["blocks.0.attn.q_bias"], file["blocks.0.attn.v_bias"]
    assert torch.equal(output["blocks.0.attn.qkv.bias"], torch.cat([q, torch.zeros(8), v]))
    bias = file["blocks.1.attn.qkv.bias"]
    assert torch.equal(output["blocks.1.attn.q_bias"], bias[:8])
    assert torch.equal(output["blocks.1.attn.v_bias"], bias[16:])


def test_small_kernels_become_the_middle_of_larger_ones():
    small = {f"blocks.{i}.PCM.0.weight": (32, 4, 1, 1) for i in (0, 1)}
    source = vitae_file(small | {f"blocks.{i}.PCM.3.weight": (8, 16, 1, 1) for i in (0, 1)})
    output, _ = convert({"model": source}, vitae())
    name = "blocks.1.PCM.3.weight"
    assert torch.equal(output[name][..., 1, 1], source[name][..., 0, 0])
    assert output[name].count_nonzero() == source[name].count_nonzero()


# --- what is not let through ---------------------------------------------------------------------


def test_propagation_blocks_and_tables_may_start_fresh_as_a_whole():
    _, report = convert({"model": mae()}, shapes(residual_block_indexes=[1], use_rel_pos=True))
    assert len(report.initialised) == 9 + 4
    assert all(".residual." in n or ".rel_pos_" in n for n in report.initialised)
    source = random(vit(use_rel_pos=True))
    del source["blocks.1.attn.rel_pos_h"]  # one among others is missing
    with pytest.raises(InputError, match=r"not in the file \(blocks\.1\.attn\.rel_pos_h\)"):
        convert({"model": source}, shapes(use_rel_pos=True), source_format="detectron2")


NAN = torch.full((64,), float("nan"))
SAM = {name.replace("fc", "lin"): value for name, value in mae().items()}
# what the line says, what the file has otherwise, options of the model, of the conversion
WRONG = [
    ("of its weights are not in the file (blocks.1.", {"blocks.1.attn.qkv.weight": None}, {}, {}),
    ("not in the file (pos", {"pos_embed": None}, {}, {"source_format": "mae"}),
    ("set its num_register_tokens.", {}, {"num_register_tokens": 2}, {}),
    ("set its pre_norm.", {}, {"pre_norm": True}, {}),
    ("set its ffn_layer.", {}, {"ffn_layer": "swiglu"}, {}),
    ("set its layer_scale", {"blocks.0.ls1.gamma": torch.ones(16)}, {}, {"source_format": "mae"}),
    ("keys have no place in the model (blocks.0.x", {"blocks.0.x": torch.ones(1)}, {}, {}),
    ("Check --config-file and", {"patch_embed.norm.weight": torch.ones(16)}, {}, {}),
    # ViTAE's tables belong to scaled queries: they must not pass as detectron2's
    ("relative positions, which", {"blocks.0.attn.rel_pos_h": torch.ones(7, 8)}, {}, {}),
    ("x: pos_embed of the file: expected a square", {"pos_embed": torch.ones(1, 19, 16)}, {}, {}),
    ("x: blocks.1.mlp.fc1.bias: expected finite numbers", {"blocks.1.mlp.fc1.bias": NAN}, {}, {}),
    ("float16, got complex64", {"blocks.1.norm1.bias": torch.ones(16).cfloat()}, {}, {}),
    ("got 'timmm'. Did you mean 'timm'?", {}, {}, {"source_format": "timmm"}),
    ("x as clip: expected a key that ends in conv1.weight", {}, {}, {"source_format": "clip"}),
    ("fc1.weight: expected one key, got", SAM, {}, {"source_format": "sam"}),
    ("--weights: expected a key of the file", {}, {}, {"weights": "ema"}),
]


@pytest.mark.parametrize(("text", "changes", "options", "how"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_files_and_models(text, changes, options, how):
    weights = {name: value for name, value in (mae() | changes).items() if value is not None}
    with pytest.raises(InputError) as error:
        convert({"model": weights}, shapes(**options), source="x", **how)
    assert text in str(error.value)


def test_wrong_content():
    for content, text in (({"epoch": 3}, "got other things: epoch"), ({}, "got nothing")):
        with pytest.raises(InputError, match=f"state dict: expected tensors, {text}"):
            convert(content, shapes())
    with pytest.raises(
        InputError, match=r"model: backbone: expected .* got names like backbone\.b"
    ):
        convert({"model": mae()}, {"backbone.bottom_up.stem.conv1.weight": (64, 3, 7, 7)})
    with pytest.raises(InputError, match=r"expected a multiple of 3 rows, got 4"):
        tensors.part(2)((1,), torch.ones(4))
