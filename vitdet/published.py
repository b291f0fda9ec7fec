"""Room 2: published weights by name, with AP, licence and address as their authors give them.

Nothing is fetched here (`vitdet.weights.locate`). Parameters are those of docs/recipes.md, or of
the page that a row is from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Published:
    """A file that somebody else has published.

    Attributes:
        name: FAMILY:NAME, as `--weights` takes it.
        kind: "detector" or "backbone".
        recipe: of this project (configs/...); "" for a backbone, or where there is none.
        box_ap, mask_ap: percent, of the authors; "" where they give none.
        millions: of parameters; "" where unknown.
        address: https://..., or hf:OWNER/NAME/FILE.
        licence: of the weights; of the code, where nothing is said of them.
        origin: the page that all this is from.
        md5: its first digits, where the page has them.
    """

    name: str
    kind: str
    recipe: str
    box_ap: str
    mask_ap: str
    millions: str
    address: str
    licence: str
    origin: str
    md5: str = ""


_META = "https://dl.fbaipublicfiles.com"
_HUB = "https://huggingface.co"
# name of a family, licence, page, and what the addresses begin with, {} the recipe without its
# epochs; then lines of: end of the address, recipe, box AP, mask AP, parameters [M], md5
_FAMILIES = (
    (
        *("detectron2", "Apache-2.0 (code)", "detectron2, projects/ViTDet"),
        f"{_META}/detectron2/ViTDet/{{}}/",
        """
f325346929/model_final_61ccd1.pkl COCO/mask_rcnn_vitdet_b_100ep 51.6 45.9 111
f325599698/model_final_6146ed.pkl COCO/mask_rcnn_vitdet_l_100ep 55.5 49.2 331
f329145471/model_final_7224f1.pkl COCO/mask_rcnn_vitdet_h_75ep 56.7 50.2 661
f325358525/model_final_435fa9.pkl COCO/cascade_mask_rcnn_vitdet_b_100ep 54.0 46.7 141
f328021305/model_final_1a9f28.pkl COCO/cascade_mask_rcnn_vitdet_l_100ep 57.6 50.0 361
f328730692/model_final_f05665.pkl COCO/cascade_mask_rcnn_vitdet_h_75ep 58.7 51.0 691
329225748/model_final_5251c5.pkl LVIS/mask_rcnn_vitdet_b_100ep 40.2 38.2 117
329211570/model_final_021b3a.pkl LVIS/mask_rcnn_vitdet_l_100ep 46.1 43.6 337
332434656/model_final_866730.pkl LVIS/mask_rcnn_vitdet_h_100ep 49.1 46.0 667
329226874/model_final_df306f.pkl LVIS/cascade_mask_rcnn_vitdet_b_100ep 43.0 38.9 145
329042206/model_final_3e81c2.pkl LVIS/cascade_mask_rcnn_vitdet_l_100ep 49.2 44.5 365
332552778/model_final_11bbb7.pkl LVIS/cascade_mask_rcnn_vitdet_h_100ep 51.5 46.6 695
""",
    ),
    (
        *("eva02", "Apache-2.0", f"{_HUB}/Yuxin-CV/EVA-02", "hf:Yuxin-CV/EVA-02/eva02/"),
        """
det/eva02_B_coco_bsl.pth COCO/cascade_mask_rcnn_eva02_b_bsl 55.5 47.1 141
det/eva02_L_coco_bsl.pth COCO/cascade_mask_rcnn_eva02_l_bsl 59.2 50.8 361
det/eva02_B_coco_sys.pth COCO/cascade_mask_rcnn_eva02_b_sys 58.9 50.7 141
det/eva02_L_coco_sys.pth COCO/cascade_mask_rcnn_eva02_l_sys 62.3 53.8 361
det/eva02_L_coco_det_sys_o365.pth COCO/cascade_mask_rcnn_eva02_l_sys_o365 64.1 54.3 361
det/eva02_L_coco_seg_sys_o365.pth COCO/cascade_mask_rcnn_eva02_l_sys_o365 63.9 55.4 361
det/eva02_B_lvis_bsl.pth LVIS/cascade_mask_rcnn_eva02_b_bsl 47.1 41.4 145
det/eva02_L_lvis_bsl.pth LVIS/cascade_mask_rcnn_eva02_l_bsl 55.3 48.6 365
det/eva02_L_lvis_sys.pth LVIS/cascade_mask_rcnn_eva02_l_sys 60.1 53.5 365
det/eva02_L_lvis_sys_o365.pth LVIS/cascade_mask_rcnn_eva02_l_sys_o365 65.2 57.3 365
det/eva02_L_m38m_to_o365.pth O365/cascade_rcnn_eva02_l - - 359
det/eva02_L_in21k_to_o365.pth O365/cascade_rcnn_eva02_l - - 359
pt/eva02_B_pt_in21k_p14to16.pt - - - 86
pt/eva02_L_pt_in21k_p14to16.pt - - - 304
pt/eva02_L_pt_m38m_p14to16.pt - - - 304
""",
    ),
    (
        *("eva", "MIT", f"{_HUB}/BAAI/EVA", "hf:BAAI/EVA/"),
        """
eva_coco_det.pth - 64.2 53.9 1100
eva_coco_seg.pth - 63.9 55.0 1100
eva_lvis.pth - 62.2 55.0 1100
""",
    ),
    (
        *("pe", "Apache-2.0", f"{_HUB}/facebook/PE-Detection", "hf:facebook/PE-Detection/"),
        """
mask_rcnn_PEcore_G_coco75ep.pth COCO/mask_rcnn_pe_core_g_75ep 57.0 49.8 1886
mask_rcnn_PEspatial_G_coco36ep.pth COCO/mask_rcnn_pe_spatial_g_36ep 57.8 50.3 1886
mask_rcnn_PEcore_G_lvis75ep.pth LVIS/mask_rcnn_pe_core_g_75ep 51.9 47.9 1892
mask_rcnn_PEspatial_G_lvis75ep.pth LVIS/mask_rcnn_pe_spatial_g_75ep 54.2 49.3 1892
""",
    ),
    (
        *("mae", "CC-BY-NC-4.0", "facebookresearch/mae", f"{_META}/mae/pretrain/"),
        """
mae_pretrain_vit_base.pth - - - 86 8cad7c
mae_pretrain_vit_large.pth - - - 304 b8b06e
mae_pretrain_vit_huge.pth - - - 632 9bdbb0
""",
    ),
    (
        *("dinov2", "Apache-2.0", "facebookresearch/dinov2", f"{_META}/dinov2/"),
        """
dinov2_vits14/dinov2_vits14_pretrain.pth - - - 21
dinov2_vits14/dinov2_vits14_reg4_pretrain.pth - - - 21
dinov2_vitb14/dinov2_vitb14_pretrain.pth - - - 86
dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth - - - 86
dinov2_vitl14/dinov2_vitl14_pretrain.pth - - - 300
dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth - - - 300
dinov2_vitg14/dinov2_vitg14_pretrain.pth - - - 1100
dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth - - - 1100
""",
    ),
    (
        *("sam", "Apache-2.0", "facebookresearch/segment-anything", f"{_META}/segment_anything/"),
        """
sam_vit_b_01ec64.pth - - - -
sam_vit_l_0b3195.pth - - - -
sam_vit_h_4b8939.pth - - - -
""",
    ),
)


def _rows() -> Iterator[Published]:
    for family, licence, origin, base, lines in _FAMILIES:
        for line in lines.split("\n")[1:-1]:
            end, *told = ("" if word == "-" else word for word in line.split())
            recipe, box, mask, millions, *md5 = told
            folder = re.sub(r"_\d+ep$", "", recipe)
            name = PurePosixPath(end).stem
            if family == "detectron2":  # its files are called model_final_...
                data, _, name = folder.partition("/")
                name += "" if data == "COCO" else f".{data.lower()}"
            kind = "detector" if recipe or box else "backbone"
            numbers = (f"configs/{recipe}.py" if recipe else "", box, mask, millions)
            address = base.format(folder) + end
            yield Published(f"{family}:{name}", kind, *numbers, address, licence, origin, *md5)


FAMILIES = tuple(family for family, *_ in _FAMILIES)
ROWS = {row.name: row for row in _rows()}
