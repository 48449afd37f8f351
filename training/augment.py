"""Batched picture augmentation: shape, stroke, colour, background."""

from __future__ import annotations

import math
from collections.abc import Callable

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

MEAN = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
STD = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
LUMA = torch.tensor([0.299, 0.587, 0.114])
TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
FROM_YIQ = torch.linalg.inv(TO_YIQ)


def uniform(n: int, low: float, high: float) -> Tensor:
    """``n`` random numbers between ``low`` and ``high``."""
    return torch.empty(n).uniform_(low, high)


def chance(n: int, p: float) -> Tensor:
    """``n`` random truth values, true with probability ``p``."""
    return torch.rand(n) < p


def affine(n: int, flip: Tensor, strength: float) -> Tensor:
    """Random inverse affine maps (n, 2, 3); mirrored where ``flip``."""
    angle = torch.randn(n) * 0.16 * strength
    zoom = 1 / uniform(n, 1 - 0.32 * strength, 1.1)
    stretch = torch.exp(torch.randn(n) * 0.08 * strength)
    shear = torch.randn(n) * 0.08 * strength
    cos, sin = torch.cos(angle), torch.sin(angle)
    mirror = torch.where(flip, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = cos * zoom * stretch * mirror
    theta[:, 0, 1] = (-sin + shear) * zoom
    theta[:, 1, 0] = sin * zoom * mirror
    theta[:, 1, 1] = cos * zoom / stretch
    theta[:, :, 2] = torch.randn(n, 2) * 0.07 * strength
    return theta


def warp(rgba: Tensor, flip: Tensor, size: int, strength: float) -> Tensor:
    """Resample premultiplied ``rgba`` with random affine and smooth bending."""
    n = rgba.shape[0]
    grid = F.affine_grid(affine(n, flip, strength), [n, 4, size, size], align_corners=False)
    bend = torch.randn(n, 2, 4, 4) * uniform(n, 0.0, 0.07 * strength).view(-1, 1, 1, 1)
    bend = F.interpolate(bend, size=(size, size), mode="bilinear", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 1)
    return F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def colour_matrix(n: int, strength: float) -> Tensor:
    """Random hue turns and saturation factors as (n, 3, 3) colour matrices."""
    hue = torch.randn(n) * 0.18 * strength
    grey = torch.where(chance(n, 0.07 * strength), 0.0, 1.0)
    saturation = uniform(n, 1 - 0.5 * strength, 1 + 0.5 * strength) * grey
    middle = torch.zeros(n, 3, 3)
    middle[:, 0, 0] = 1.0
    middle[:, 1, 1] = middle[:, 2, 2] = torch.cos(hue) * saturation
    middle[:, 1, 2] = -torch.sin(hue) * saturation
    middle[:, 2, 1] = torch.sin(hue) * saturation
    return torch.matmul(torch.matmul(FROM_YIQ, middle), TO_YIQ)


def recolour(rgba: Tensor, mono: Tensor, strength: float) -> Tensor:
    """Jitter colours of premultiplied ``rgba``; give ``mono`` drawings two new inks."""
    n = rgba.shape[0]
    rgb, alpha = rgba[:, :3], rgba[:, 3:]
    luma = torch.einsum("i,nihw->nhw", LUMA, rgb).unsqueeze(1)
    inks = (alpha - luma) * torch.rand(n, 3, 1, 1) + luma * torch.rand(n, 3, 1, 1)
    rgb = torch.einsum("nij,njhw->nihw", colour_matrix(n, strength), rgb)
    contrast = uniform(n, 1 - 0.3 * strength, 1 + 0.35 * strength).view(-1, 1, 1, 1)
    light = uniform(n, -0.18 * strength, 0.18 * strength).view(-1, 1, 1, 1)
    rgb = rgb * contrast + alpha * (0.5 * (1 - contrast) + light)
    tint = alpha * (torch.randn(n, 3) * 0.04).view(n, 3, 1, 1)
    ink = torch.where(mono.view(-1, 1, 1, 1), inks, rgb + tint)
    return torch.cat([torch.minimum(ink.clamp_min(0), alpha), alpha], 1)


def outline(rgba: Tensor, p: float) -> Tensor:
    """Draw a stroke around some of the drawings, dark more often than not."""
    pick = torch.nonzero(chance(rgba.shape[0], p)).flatten()
    if not len(pick):
        return rgba
    part = rgba[pick]
    alpha = part[:, 3:]
    rim = F.max_pool2d(alpha, 3, 1, 1) - alpha
    shade = torch.where(chance(len(pick), 0.6), 0.1, 0.95).view(-1, 1, 1, 1)
    ink = shade + torch.randn(len(pick), 3, 1, 1) * 0.1
    rgba = rgba.clone()
    rgba[pick] = torch.cat([part[:, :3] + rim * ink.clamp(0, 1), alpha + rim], 1)
    return rgba


def ramp(n: int, size: int) -> Tensor:
    """Linear ramps from -1 to 1 in random directions, (n, 1, size, size)."""
    axis = torch.linspace(-1, 1, size)
    angle = uniform(n, 0, 2 * math.pi).view(-1, 1, 1)
    field = torch.cos(angle) * axis.view(1, 1, -1) + torch.sin(angle) * axis.view(1, -1, 1)
    return (field / math.sqrt(2)).unsqueeze(1)


def background(n: int, size: int) -> Tensor:
    """White, black, plain-coloured and graded backgrounds, (n, 3, size, size)."""
    kind = torch.rand(n).view(-1, 1, 1, 1)
    colour = torch.rand(n, 3, 1, 1)
    plain = torch.where(kind < 0.5, torch.ones_like(colour), colour)
    plain = torch.where((kind >= 0.5) & (kind < 0.72), torch.zeros_like(colour), plain)
    slope = torch.randn(n, 3, 1, 1) * 0.35 * (kind > 0.86)
    return (plain + slope * ramp(n, size)).clamp(0, 1)


def contrast_with_ink(rgba: Tensor, back: Tensor, mono: Tensor) -> Tensor:
    """Turn the background of ``mono`` drawings away from the ink's lightness."""
    ink = rgba[:, :3].sum((2, 3)) / rgba[:, 3].sum((1, 2)).clamp_min(1e-3).unsqueeze(1)
    gap = (ink @ LUMA) - (back.mean((2, 3)) @ LUMA)
    clash = mono & (gap.abs() < 0.35)
    pole = torch.where(ink @ LUMA > 0.5, 0.0, 1.0).view(-1, 1, 1, 1)
    return torch.where(clash.view(-1, 1, 1, 1), pole.expand_as(back), back)


def soften(image: Tensor, strength: float) -> Tensor:
    """Blur, thicken or thin the lines of some of the pictures."""
    draw = torch.rand(image.shape[0]) / strength
    image = image.clone()
    changes: tuple[tuple[float, float, Callable[[Tensor], Tensor]], ...] = (
        (0.0, 0.12, lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
        (0.12, 0.2, lambda x: F.max_pool2d(x, 3, 1, 1)),
        (0.2, 0.28, lambda x: -F.max_pool2d(-x, 3, 1, 1)),
    )
    for low, high, change in changes:
        pick = torch.nonzero((draw >= low) & (draw < high)).flatten()
        if len(pick):
            share = uniform(len(pick), 0.3, 1.0).view(-1, 1, 1, 1)
            image[pick] = torch.lerp(image[pick], change(image[pick]), share)
    return image


def cut_out(image: Tensor, p: float) -> Tensor:
    """Cover a random rectangle of some of the pictures with a plain colour."""
    n, _, size, _ = image.shape
    axis = torch.linspace(0, 1, size)
    centre, half = torch.rand(n, 2, 1), uniform(n * 2, 0.06, 0.18).view(n, 2, 1)
    inside = (axis.view(1, 1, -1) - centre).abs() < half
    box = inside[:, 0].unsqueeze(1) & inside[:, 1].unsqueeze(2)
    box = (box & chance(n, p).view(-1, 1, 1)).unsqueeze(1)
    return torch.where(box, torch.rand(n, 3, 1, 1), image)


def normalise(image: Tensor) -> Tensor:
    """Subtract CLIP's mean and divide by its deviation."""
    return (image - MEAN) / STD


def augment(
    pixels: Tensor, mono: Tensor, flippable: Tensor, size: int, strength: float = 1.0
) -> Tensor:
    """Straight-alpha uint8 (n, h, w, 4) to normalised training pictures."""
    n = pixels.shape[0]
    rgba = pixels.permute(0, 3, 1, 2).float() / 255
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    rgba = warp(rgba, flippable & chance(n, 0.4), size, strength)
    rgba = outline(recolour(rgba, mono, strength), 0.2 * strength)
    back = contrast_with_ink(rgba, background(n, size), mono)
    image = rgba[:, :3] + back * (1 - rgba[:, 3:])
    shading = ramp(n, size) * (uniform(n, 0, 0.25) * chance(n, 0.4)).view(-1, 1, 1, 1)
    image = cut_out(soften(image * (1 + shading), strength), 0.3 * strength)
    noise = uniform(n, 0, 0.05) * chance(n, 0.3)
    image = image + torch.randn_like(image) * noise.view(-1, 1, 1, 1)
    return normalise(image.clamp(0, 1))
