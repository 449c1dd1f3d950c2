"""Models as bare parameters in the shapes of well-known networks: what an update touches."""

import torch
from torch import nn

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """ResNet-50: 161 tensors, 25.6 million parameters (He et al., 2015)."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outputs = 4 * width
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            if block == 0:
                convolutions.append((outputs, inputs, 1, 1))
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]  # and its BatchNorm's weight and bias
            inputs = outputs
    return [*shapes, (1000, inputs), (1000,)]


def gpt2() -> Shapes:
    """GPT-2 small: 148 tensors, 124.4 million parameters (Radford et al., 2019)."""
    d = 768
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,)]
    block += [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


def vit_b_16() -> Shapes:
    """ViT-B/16: 152 tensors, 86.6 million parameters (Dosovitskiy et al., 2020)."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,)]
    block += [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    ends = [(d,), (d,), (1000, d), (1000,)]
    return [(1, 1, d), (d, 3, 16, 16), (d,), (1, 197, d), *block * 12, *ends]


def regnet_y_400mf() -> Shapes:
    """RegNet-Y-400MF: 225 tensors, 4.3 million parameters (Radosavovic et al., 2020)."""
    inputs, group = 32, 8
    shapes: Shapes = [(inputs, 3, 3, 3), (inputs,), (inputs,)]
    for width, blocks in ((48, 1), (104, 3), (208, 6), (440, 6)):
        for block in range(blocks):
            squeezed = round(inputs / 4)
            if block == 0:
                shapes += [(width, inputs, 1, 1), (width,), (width,)]
            for shape in ((width, inputs, 1, 1), (width, group, 3, 3)):
                shapes += [shape, (width,), (width,)]  # and its BatchNorm's weight and bias
            shapes += [(squeezed, width, 1, 1), (squeezed,), (width, squeezed, 1, 1), (width,)]
            shapes += [(width, width, 1, 1), (width,), (width,)]
            inputs = width
    return [*shapes, (1000, inputs), (1000,)]


def swin_t() -> Shapes:
    """Swin-T: 173 tensors, 28.3 million parameters (Liu et al., 2021)."""
    d, window = 96, 7
    shapes: Shapes = [(d, 3, 4, 4), (d,), (d,), (d,)]
    for stage, (blocks, heads) in enumerate(((2, 3), (2, 6), (6, 12), (2, 24))):
        if stage:
            shapes += [(2 * d, 4 * d), (4 * d,), (4 * d,)]  # four patches become one
            d *= 2
        block = [(d,), (d,), ((2 * window - 1) ** 2, heads)]
        block += [(3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,)]
        block += [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
        shapes += block * blocks
    return [*shapes, (d,), (d,), (1000, d), (1000,)]


def small_gpt() -> Shapes:
    """A GPT of examples/train_gpt.py's kind: 27 tensors, 1.3 million parameters."""
    d = 160
    block = [(d,), (3 * d, d), (d, d), (d,), (4 * d, d), (d, 4 * d)]
    return [(256, d), *block * 4, (d,), (256, d)]


WORKLOADS = {
    "ResNet-50": resnet50,
    "RegNet-Y-400MF": regnet_y_400mf,
    "ViT-B/16": vit_b_16,
    "Swin-T": swin_t,
    "GPT-2": gpt2,
}


class Parameters(nn.Module):
    """A module that only holds parameters of given shapes, with random values."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tensors = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
        )
