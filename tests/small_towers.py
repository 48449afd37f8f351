"""Small members of the families whose sizes follow from timm's names, for tests.

Without pytest and torch: a server's process imports it as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clip_server.towers import convnext, eva, fastvit, hybrid_vit, timm_vit, vitamin

VIT = timm_vit.Size(64, 2, 2, 3.0)
_TURNED = eva.Rotation(6, offset=1, across_first=True)
_PERCEPTION = eva.Style(_TURNED, key_bias=True, pools=True)
_GATED = eva.Style(eva.Rotation(6), fused=False, gated=True)
# By the table that holds a family's sizes: names that timm has not.
SIZES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (timm_vit.SIZES, {"test_patch16": VIT}),
    (convnext.SIZES, {"convnext_test": convnext.Size((16, 24, 32, 48), (1, 2, 1, 1))}),
    (
        fastvit.SIZES,
        {
            "fastvit_test": fastvit.Size((8, 16, 32, 64), (1, 1, 1, 2)),
            "fastvit_late_test": fastvit.Size((8, 8, 16, 32, 64), (1,) * 5, 4, late=True),
        },
    ),
    (hybrid_vit.SIZES, {"vit_mci_test": VIT}),
    (
        eva.SIZES,
        {
            "eva_test_patch16": eva.Size(64, 2, 2, 192, eva.Style()),
            "eva02_test_patch16_clip": eva.Size(64, 2, 2, 192, _GATED),
            "eva02_last_patch16_clip": eva.Size(64, 2, 2, 192, eva.Style(norm_after=True)),
            "vit_pe_core_test_patch16": eva.Size(64, 2, 2, 192, _PERCEPTION),
            "vit_pe_core_bare_patch16": eva.Size(64, 2, 2, 192, _PERCEPTION, class_token=False),
        },
    ),
    (
        vitamin.SIZES,
        {
            "vitamin_test": vitamin.Size((16, 24), 64, 2, 2),
            "vitamin_bare": vitamin.Size((16, 24), 64, 2, 2, has_positions=False),
        },
    ),
]


def add(setitem: Callable[[dict[str, Any], str, Any], None] = dict.__setitem__) -> None:
    """Adds them to this process. setitem: adds one, such as pytest's, which removes it again."""
    for table, sizes in SIZES:
        for name, size in sizes.items():
            setitem(table, name, size)
