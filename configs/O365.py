"""Objects365 v2, boxes alone, before COCO and LVIS.

    python train_net.py --config-file configs/O365/cascade_rcnn_eva02_l.py
        --num-gpus 8 --num-machines N --machine-rank RANK --dist-url tcp://HOST:PORT

Source: EVA-02 (arXiv 2303.11331); baaivision/EVA, EVA-02/det. Its rows train on train and val
together, and val is what is evaluated, so no AP was published. docs/data.md has the data; the
folder is Objects365, as in EVA's code (its README says o365).
"""

from types import SimpleNamespace

from detectron2.config import LazyCall as L

from vitdet.data.datasets import joined_dataset

from .common.changes import THIRDS, eva02_l, eva02_steps, image_size
from .common.data.coco import dataloader
from .common.models.mask_rcnn_vitdet import model
from .common.optim import optimizer
from .common.rows import Recipes, Row, net, steps, training
from .common.schedule import schedule
from .common.train import train


def boxes(parts: SimpleNamespace) -> None:
    """365 classes at 1536 pixels; without masks boxes are cut, not taken again from cut masks."""
    image_size(parts, 1536)
    heads, data = parts.model.roi_heads, parts.dataloader
    heads.update(num_classes=365, mask_in_features=None, mask_pooler=None, mask_head=None)
    names = ["objects365_v2_train", "objects365_v2_val"]
    data.train.dataset = L(joined_dataset)(names=names)
    data.train.mapper.update(use_masks=False, recompute_boxes=False)
    data.test.dataset.name = "objects365_v2_val"


ROWS = {
    "cascade_rcnn_eva02_l": Row(
        "", 359.14,
        "eva02_L_m38m_to_o365 and eva02_L_in21k_to_o365, "
        "eva2_o365_cascade_mask_rcnn_vitdet_l_8attn_1536_lrd0p8.py",
        (
            eva02_l, net(global_block_indexes=THIRDS), boxes,
            eva02_steps(160, 6e-5, 400000, every=10000), training(checkpoint_every=2500 * 160),
            steps(400000, 320000, 360000, batch=160, warmup=5000),  # 64 M images
        ),
        "eva02_L_pt_m38m_p14to16.pt (to go on to COCO) or eva02_L_pt_in21k_p14to16.pt (to LVIS, "
        "whose images are COCO's)",
    ),
}  # fmt: skip
recipes = Recipes(ROWS, "o365", globals())
