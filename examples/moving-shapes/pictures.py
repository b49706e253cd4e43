"""PNG files of frames, without an image library."""

from __future__ import annotations

import pathlib
import struct
import zlib

import torch
from torch import Tensor


def save_png(picture: Tensor, path: pathlib.Path) -> None:
    """Writes a picture, [3, height, width] in -1..1."""
    _, height, width = picture.shape
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).reshape(height, width * 3)
    # Each row as its differences from the row above (filter 2), which compresses best here.
    above = torch.cat([torch.zeros(1, width * 3, dtype=torch.uint8, device=pixels.device), pixels[:-1]])
    rows = torch.cat([torch.full((height, 1), 2, dtype=torch.uint8, device=pixels.device), pixels - above], dim=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(rows.flatten().tolist()), 9)
    chunks = b"".join(_chunk(name, content) for name, content in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b"")))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def contact_sheet(videos: Tensor, frames: int = 6, scale: int = 2, gap: int = 2) -> Tensor:
    """A row per video, a column per frame, evenly spread: [B, 3, frames, height, width] to [3, height, width]."""
    count = videos.shape[2]
    chosen = [round(i * (count - 1) / max(frames - 1, 1)) for i in range(min(frames, count))]
    large = videos.float().repeat_interleave(scale, dim=3).repeat_interleave(scale, dim=4)
    framed = torch.nn.functional.pad(large, (gap, gap, gap, gap), value=1.0)
    return torch.cat([torch.cat([video[:, f] for f in chosen], dim=2) for video in framed], dim=1)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
