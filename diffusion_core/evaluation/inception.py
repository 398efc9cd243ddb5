"""InceptionV3 as the Fréchet inception distance uses it: the TensorFlow graph of 2015, with its published weights.

The FID of the literature is defined by one set of weights, ported from TensorFlow, whose graph differs from the usual
InceptionV3 in four places: average pools do not count the padding, the last block pools by maximum, there are 1,008
outputs, and images are resized to 299x299 bilinearly without anti-aliasing. Module names are those of the published
files (`pt_inception-2015-12-05`), so their state dicts load as they are. Nothing is downloaded here.
"""

from __future__ import annotations

import io
import pickle

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.config import UserError
from diffusion_core.evaluation.identity import read_weights, weights_identity

FEATURES, OUTPUTS, SIDE = 2048, 1008, 299
_BATCH = 32


class ConvolutionNorm(nn.Module):
    """Convolution without bias, batch norm with ε = 0.001, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


_C = ConvolutionNorm


def _wide(inputs: int, outputs: int, size: int) -> ConvolutionNorm:
    return ConvolutionNorm(inputs, outputs, (1, size), padding=(0, size // 2))


def _tall(inputs: int, outputs: int, size: int) -> ConvolutionNorm:
    return ConvolutionNorm(inputs, outputs, (size, 1), padding=(size // 2, 0))


class BlockA(nn.Module):
    """35x35 places: 1x1, 5x5 and double 3x3 convolutions beside an average pool."""

    def __init__(self, inputs: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = _C(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _C(inputs, 48, 1), _C(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _C(inputs, 64, 1), _C(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _C(96, 96, 3, padding=1)
        self.branch_pool = _C(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(average(x))], 1
        )


class BlockB(nn.Module):
    """35x35 places to 17x17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _C(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _C(inputs, 64, 1), _C(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _C(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17x17 places: 7x7 convolutions in factors of 1x7 and 7x1, beside an average pool."""

    def __init__(self, inputs: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = _C(inputs, 192, 1)
        self.branch7x7_1 = _C(inputs, inner, 1)
        self.branch7x7_2, self.branch7x7_3 = _wide(inner, inner, 7), _tall(inner, 192, 7)
        self.branch7x7dbl_1 = _C(inputs, inner, 1)
        self.branch7x7dbl_2, self.branch7x7dbl_3 = _tall(inner, inner, 7), _wide(inner, inner, 7)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = _tall(inner, inner, 7), _wide(inner, 192, 7)
        self.branch_pool = _C(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(average(x))], 1)


class BlockD(nn.Module):
    """17x17 places to 8x8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _C(inputs, 192, 1), _C(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _C(inputs, 192, 1)
        self.branch7x7x3_2 = _wide(192, 192, 7)
        self.branch7x7x3_3 = _tall(192, 192, 7)
        self.branch7x7x3_4 = _C(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        factored = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), factored, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8x8 places: 3x3 convolutions that end in 1x3 and 3x1 side by side, beside a pool."""

    def __init__(self, inputs: int, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = _C(inputs, 320, 1)
        self.branch3x3_1 = _C(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = _wide(384, 384, 3), _tall(384, 384, 3)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _C(inputs, 448, 1), _C(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _wide(384, 384, 3), _tall(384, 384, 3)
        self.branch_pool = _C(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(single),
                self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


def average(x: Tensor) -> Tensor:
    """3x3 average that keeps the size; at the border the mean is over the places that exist, as in TensorFlow."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class FIDInceptionV3(nn.Module):
    """Images (N, 3, H, W) float32 in [-1, 1] to features (N, 2048): the mean over places of the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _C(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _C(32, 32, 3)
        self.Conv2d_2b_3x3 = _C(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _C(64, 80, 1)
        self.Conv2d_4a_3x3 = _C(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, maximum=False), BlockE(2048, maximum=True)
        self.fc = nn.Linear(FEATURES, OUTPUTS)

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean(dim=(2, 3))


class InceptionExtractor:
    """FID's InceptionV3 as an extractor. Grey images are shown as equal red, green and blue."""

    kind = "inception"

    def __init__(self, weights_uri: str) -> None:
        data = read_weights(weights_uri)
        self.digest = weights_identity(data)
        model = FIDInceptionV3()
        try:
            model.load_state_dict(_state_dict(data, weights_uri))
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise UserError(
                f"evaluation.inception_weights: {weights_uri} does not hold the weights of FID's InceptionV3: {first}"
            ) from error
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().requires_grad_(False).to(self._device)

    @torch.no_grad()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Features (N, 2048) float32 of images (N, H, W, C) uint8, C = 1 or 3."""
        found = np.empty((len(images), FEATURES), dtype=np.float32)
        for start in range(0, len(images), _BATCH):
            block = torch.from_numpy(np.ascontiguousarray(images[start : start + _BATCH])).to(self._device)
            x = block.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
            found[start : start + len(block)] = self._model(x.expand(-1, 3, -1, -1)).cpu().numpy()
        return found


def _state_dict(data: bytes, uri: str) -> dict[str, Tensor]:
    """Weights from safetensors, or from a torch file with `weights_only=True`, which cannot execute anything."""
    try:
        if uri.endswith(".safetensors"):
            from safetensors.torch import load

            found = load(data)
        else:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UserError(
            f"evaluation.inception_weights: {uri} is neither safetensors nor plain torch weights."
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"evaluation.inception_weights: {uri} is not a safetensors file: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"evaluation.inception_weights: {uri} does not hold a state dict.")
    for key in [key for key in found if key.endswith(".bn.running_mean")]:  # the published file lacks these counters
        found.setdefault(key.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return found
