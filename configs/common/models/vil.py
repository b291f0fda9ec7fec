"""Sizes of ViL (arXiv 2103.15358, Table 1), all with relative positions and windows of 7 x 7.

Every detector has sliding-chunk attention in all stages; the classifiers that they start from have
full attention in stages 3 and 4. The deep sizes start from ImageNet-21K.
"""

tiny = dict(embed_dim=[48, 96, 192, 384], depth=[1, 1, 9, 1], num_heads=[1, 3, 3, 6])
small = dict(embed_dim=[96, 192, 384, 768], depth=[1, 2, 8, 1], num_heads=[3, 3, 6, 12])
medium_deep = dict(embed_dim=[96, 192, 384, 768], depth=[1, 4, 16, 1], num_heads=[3, 3, 6, 12])
base_deep = dict(embed_dim=[96, 192, 384, 768], depth=[1, 8, 24, 1], num_heads=[3, 3, 6, 12])
