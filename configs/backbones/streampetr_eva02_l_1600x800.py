"""Image features of StreamPETR's ViT-Large (EVA-02-L): five levels, images of 1600 x 800 pixels.

Source      exiawsh/StreamPETR, docs/ViT_Large.md
Published   nothing at this size but the window: 50 x 50 tokens in the global blocks
Parameters  333.02 M
Output      p2 to p6, strides 4 to 64, 256 channels, of normalised RGB images (B, 3, 800, 1600)
Positions   windows of 16 x 16 tokens; the global blocks' windows are the short side, 800 / 16 = 50
Start, Use, Optimizer  as streampetr_eva02_l_800x320.py
"""

from .streampetr_eva02_l_800x320 import model, optimizer

model.net.img_size = 800
model.net.global_window_size = 50
