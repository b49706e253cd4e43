"""The native half of the package. Its functions take tensors by address and are for `calibc` itself; `Bundle` is for everyone."""

import os
from collections.abc import Sequence

__version__: str

_Path = str | os.PathLike[str]
# Address, element type (0 float32, 1 bfloat16, 2 float16), device (-1 is the CPU), shape and strides [batch, head, token, head_dim].
_Described = tuple[int, int, int, Sequence[int], Sequence[int]]

class Bundle:
    """A compiled plan. Opening one checks every byte of it; its kernels are machine code, so open bundles only from where you
    would run a program from."""

    def __init__(self, path: _Path) -> None: ...
    @staticmethod
    def parse(data: bytes) -> Bundle:
        """Opens a bundle that is in memory."""
    @property
    def handle(self) -> int:
        """Number that names this bundle to `calibc.ops`; valid while the object lives."""
    @property
    def model_name(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def q_tokens(self) -> int:
        """Query tokens, text included."""
    @property
    def kv_tokens(self) -> int:
        """Key tokens, text included."""
    @property
    def frames(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def text_tokens(self) -> int: ...
    @property
    def text_position(self) -> str:
        """`none`, `before` or `after` the video tokens."""
    @property
    def layout(self) -> str:
        """`raster`, or the tile: `2x8x8`."""
    @property
    def sigmas(self) -> list[float]:
        """Noise level of each step."""
    @property
    def digest(self) -> str:
        """Hexadecimal digest that commits to every byte of the bundle."""
    @property
    def spec(self) -> str:
        """The effective spec, YAML."""
    @property
    def report_json(self) -> str:
        """The compile report, JSON."""
    @property
    def kernels(self) -> list[tuple[str, str]]:
        """Symbol and architecture of every kernel."""
    def has_kernels(self, compute_capability: tuple[int, int]) -> bool:
        """Whether the plan runs on GPUs of compute capability `(major, minor)`."""
    def density(self, step: int, layer: int) -> float:
        """Share of the dense work that one layer does at one step."""
    def op_counts(self, step: int, layer: int) -> tuple[int, int, int]:
        """How many heads of one layer at one step are dense, block-sparse and computed at anchor rows."""
    def mask(self, step: int, layer: int, head: int) -> bytes:
        """Kept blocks of one head: bytes 0 and 1, [q_blocks, kv_blocks]; all ones for dense and anchor heads."""

def main(argv: Sequence[str]) -> int: ...
def compile(
    traces: _Path | None,
    out: _Path,
    *,
    spec: _Path | None,
    archs: Sequence[str],
    portable: bool,
    nvrtc: _Path | None,
    cache_dir: _Path | None,
    progress: bool,
) -> None: ...
def plan_from_mask(
    mask: int,
    shape: Sequence[int],
    q_len: int,
    kv_len: int,
    head_dim: int,
    dtype: str,
    *,
    lse: bool,
    arch: str | None,
    device: int | None,
    portable: bool,
) -> Bundle: ...
def plan_cache_info() -> tuple[int, int, int]: ...
def clear_plan_cache() -> None: ...
def load(handle: int, device: int, resident_steps: int | None) -> None: ...
def table_bytes(handle: int, device: int) -> tuple[int, int]: ...
def enter(handle: int, device: int, step: int, stream: int) -> None: ...
def attention(
    handle: int,
    layer: int,
    step: int,
    step_ptr: int,
    q: _Described,
    k: _Described,
    v: _Described,
    out: _Described,
    lse: int,
    scale: float | None,
    stream: int,
) -> None: ...
def reference_attention(
    handle: int,
    layer: int,
    step: int,
    q: _Described,
    k: _Described,
    v: _Described,
    out: _Described,
    lse: int,
    scale: float | None,
) -> None: ...
