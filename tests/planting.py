"""A network that says what is painted into its image, so that objects can be planted exactly."""

import numpy as np
import torch
from helpers import config_of

from bigseg.blocks import Region
from bigseg.checkpoint import save_model
from bigseg.config import ModelCard, NormRule, UNetSpec
from bigseg.instances import FOREGROUND_BIT, INSIDE_BIT, segment_codes
from bigseg.model import UNet
from bigseg.rules import NEIGHBOURS, InstanceRule, RuleOptions
from bigseg.steps import Steps
from bigseg.volume import open_volume

BACKGROUND, BORDER, INSIDE = 0, 1, 2
CERTAIN = 50.0
TILE = (8, 8, 8)


def write_planting_model(path, *, dims=3, **card):
    """A model whose classes are the intensities: 0 background, 1 border, 2 inside."""
    spec = UNetSpec(
        dims=dims,
        out_channels=3,
        widths=(3,),
        kernels=((1,) * dims,),
        strides=(),
        n_convs=1,
        norm="none",
    )
    net = UNet(spec)
    weights = dict(net.named_parameters())
    with torch.no_grad():
        # Of an intensity v: v, v - 1 and 1 - v, where they are positive.
        weights["down.0.0.weight"].copy_(torch.tensor([1.0, 1.0, -1.0]).reshape(3, 1, *[1] * dims))
        weights["down.0.0.bias"].copy_(torch.tensor([0.0, -1.0, 1.0]))
        head = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, -2.0, 0.0]])
        weights["head.weight"].copy_(CERTAIN * head.reshape(3, 3, *[1] * dims))
        weights["head.bias"].zero_()
    card = {
        "classes": ("background", "inside", "border"),
        "task": "instances",
        "norm": NormRule(kind="fixed", offset=0.0, scale=1.0),
        **card,
    }
    save_model(str(path), net.eval(), ModelCard(spec=spec, **card))
    return str(path)


def codes_of_painting(painting):
    """The codes that the planting model gives for a painting of those three intensities."""
    codes = INSIDE_BIT * (painting == INSIDE) + FOREGROUND_BIT * (painting != BACKGROUND)
    return codes.astype(np.uint8)


def planted_shapes(shape=(24, 40, 44), *, side=8):
    """A painting (z, y, x) of everything that blocks of `side` voxels could get wrong.

    A snake through many blocks, a ring that lies in four of them, objects that touch diagonally at
    a corner of blocks, one that is larger than several blocks, single voxels on both sides of a
    border, seeds that touch over a bridge, a hollow object, and blocks without anything.
    """
    paint = np.zeros(shape, np.uint8)

    def put(z, y, x, value=INSIDE):
        paint[z, y, x] = value

    # A snake along x and back, two planes thick.
    for i, y in enumerate(range(1, 14, 4)):
        put(slice(0, 2), slice(y, y + 2), slice(2, 42))
        if i:
            put(slice(0, 2), slice(y - 3, y + 1), slice(2, 4) if i % 2 else slice(40, 42))
    # A ring around the corner that four blocks share, and what is inside it.
    put(slice(4, 6), slice(18, 31), slice(2, 15))
    put(slice(4, 6), slice(21, 28), slice(5, 12), BACKGROUND)
    put(slice(4, 6), slice(23, 26), slice(7, 10))
    # Cubes that meet in nothing but corners of blocks.
    for z, y, x in ((8, 16, 24), (5, 13, 21), (8, 13, 27), (11, 19, 21)):
        put(slice(z, z + 3), slice(y, y + 3), slice(x, x + 3))
    # An object of 18³, hollow; its rim is border.
    put(slice(5, 23), slice(20, 38), slice(24, 42), BORDER)
    put(slice(6, 22), slice(21, 37), slice(25, 41))
    put(slice(12, 15), slice(28, 31), slice(31, 34), BACKGROUND)
    # Single voxels beside each other across a border, and across a corner.
    for place in ((15, 3, 3), (16, 3, 3), (15, 7, 8), (16, 8, 7), (23, 39, 0), (23, 0, 43)):
        put(*place)
    # Two seeds with a bridge of one voxel that erosion breaks, in one foreground.
    put(slice(17, 23), slice(2, 14), slice(10, 36), BORDER)
    put(slice(18, 22), slice(3, 13), slice(12, 20))
    put(slice(18, 22), slice(3, 13), slice(24, 34))
    put(20, 8, slice(20, 24))
    assert side < 16
    return paint


def config_for(image, model, out, rule, **options):
    """Settings of a serial run that makes objects by a rule; the rest is the model's."""
    options = {"tile": TILE, "output": None, **options}
    rule = dict(rule)
    if connectivity := rule.pop("connectivity", None):
        of_dims = NEIGHBOURS[len(options["tile"])]
        rule["neighbours"] = next(n for n, c in of_dims.items() if c == connectivity)
    return config_of(image, model, out, rule=RuleOptions(**rule), **options)


def labels_at(url):
    """The labels (t, z, y, x) of the finest level."""
    volume = open_volume(str(url))
    return volume.read(Region.of_shape(volume.shape))[0]


def truth_of(painting, rule, *, ratios=(1.0, 1.0, 1.0), dims=3):
    """The definition, on the whole array (t, z, y, x)."""
    rule = InstanceRule(**rule)
    painting = painting.reshape((1,) * (4 - painting.ndim) + painting.shape)
    return segment_codes(codes_of_painting(painting), rule, Steps(ratios), dims=dims)
