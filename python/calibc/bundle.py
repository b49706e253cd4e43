"""Bundles: making them and looking into them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from calibc import _native
from calibc._native import Bundle

Path = str | os.PathLike[str]


def compile(
    traces: Path | None = None,
    out: Path = "plan.bundle",
    *,
    spec: Path | None = None,
    target: str | Sequence[str] = (),
    portable: bool = False,
    nvrtc: Path | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Bundle:
    """Compiles calibration traces into the bundle `out` and opens it; `calibc compile` does the same.

    Args:
        traces: Folder of traces. A spec with masks of your own (`kind: explicit`) needs none.
        out: The file to write. It appears whole or not at all.
        spec: A file of `plans/`: geometry, policy, target. By default all comes from the traces, with the paper's recipe.
        target: GPU architectures to make machine code for, such as `"sm_90a"`. By default the spec's, else Ampere to Hopper.
        portable: Only portable kernels, also where an architecture has faster ones of its own.
        nvrtc: The libnvrtc to use, or its folder.
        cache_dir: Where compiled kernels are kept. By default `CALIBC_CACHE_DIR`, else the user's cache.
        progress: Whether to draw progress bars where stderr is a terminal.

    Raises:
        CalibcError: One of its subclasses, by who must act. Ctrl-C stops the compile; nothing is written then.
    """
    archs = [target] if isinstance(target, str) else list(target)
    _native.compile(
        traces, out, spec=spec, archs=archs, portable=portable, nvrtc=nvrtc, cache_dir=cache_dir, progress=progress
    )
    return Bundle(out)


__all__ = ["Bundle", "compile"]
