"""AdamW of ViTDet (arXiv 2203.16527, A.2): one weight decay, none on norms and on positions.

"Norms" are the LayerNorms over tokens; the LayerNorms over channels in pyramid and heads decay, as
in detectron2. `layer_decay_rate` lowers the learning rate block by block towards the input.
"""

from detectron2.config import LazyCall as L

from vitdet.optim import adamw

optimizer = L(adamw)(
    lr=1e-4,
    betas=[0.9, 0.999],
    weight_decay=0.1,
    weight_decay_norm=0.0,
    no_decay=["pos_embed"],
    layer_decay_rate=None,
)
