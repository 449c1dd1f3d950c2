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


def small_gpt() -> Shapes:
    """A GPT of examples/train_gpt.py's kind: 27 tensors, 1.3 million parameters."""
    d = 160
    block = [(d,), (3 * d, d), (d, d), (d,), (4 * d, d), (d, 4 * d)]
    return [(256, d), *block * 4, (d,), (256, d)]


WORKLOADS = {"ResNet-50": resnet50, "GPT-2": gpt2, "ViT-B/16": vit_b_16}


class Parameters(nn.Module):
    """A module that only holds parameters of given shapes, with random values."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tensors = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
        )
