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

_View = tuple[int, str, Sequence[int], Sequence[int]]
_LseView = tuple[int, Sequence[int], Sequence[int]]

class CaptureKernel:
    """A capture kernel, compiled for one GPU and loaded there."""

    BLOCK: int
    def __new__(
        cls,
        device: int,
        dtype: str,
        head_dim: int,
        *,
        encoding: str = "log2-u8",
        portable: bool = False,
        nvrtc: _Path | None = None,
        cache_dir: _Path | None = None,
    ) -> CaptureKernel: ...
    @property
    def symbol(self) -> str: ...
    @property
    def family(self) -> str:
        """hopper or portable."""
    @property
    def encoding(self) -> str:
        """log2-u8 or f32."""
    def block_statistics(
        self,
        q: _View,
        k: _View,
        v: _View,
        out: _View,
        lse: _LseView,
        *,
        energy: int,
        deviation: int,
        rows_per_block: int = 16,
        seed: int = 0,
        scale: float | None = None,
        stream: int = 0,
    ) -> None:
        """Energies and deviations of one dense attention, [heads, q_blocks, kv_blocks] at device addresses, on `stream`."""

class Shard:
    """The tensors of one prompt at one step of a branch."""

    def layer(
        self, layer: int, energy: int, deviation: int = 0, anchor_similarity: int = 0, anchor_error: int = 0
    ) -> None:
        """Checks and writes one layer from CPU addresses; energies and deviations are codes for log2-u8, else f32."""
    def finish(self) -> None: ...

class TraceWriter:
    """A trace that is captured into."""

    @staticmethod
    def open(
        path: _Path,
        *,
        model: str,
        layers: int,
        heads: int,
        head_dim: int,
        frames: int,
        height: int,
        width: int,
        text_tokens: int = 0,
        text_position: str = "none",
        tile: Sequence[int] | None = None,
        sigmas: Sequence[float],
        branches: Sequence[str],
        encoding: str = "log2-u8",
        anchor_counts: Sequence[int] = (),
        part: str | None = None,
    ) -> TraceWriter:
        """Starts a trace, or continues the one that is there; what a killed capture left half-written is discarded."""
    @property
    def prompts(self) -> list[str]:
        """Ids of the prompts that are captured already."""
    def estimate(
        self,
        prompts: int,
        steps: int,
        branches: int = 1,
        *,
        deviation: bool = True,
        anchor_similarity: bool = True,
        anchor_error: bool = True,
    ) -> int: ...
    def free_space(self) -> int: ...
    def check_space(self, bytes: int) -> None: ...
    def begin_prompt(self, id: str, *, seed: int | None = None, split: str = "calibration", label: str = "") -> None: ...
    def begin_shard(
        self,
        step: int,
        branch: str,
        *,
        deviation: bool = True,
        anchor_similarity: bool = False,
        anchor_error: bool = False,
    ) -> Shard: ...
    def end_prompt(self) -> None:
        """Commits the current prompt."""
    def discard_prompt(self) -> None: ...
    def close(self) -> None: ...
    @staticmethod
    def merge_parts(path: _Path) -> int:
        """Makes one trace of `path` and the parts that several processes wrote there; the number of its prompts."""
    @staticmethod
    def merge(out: _Path, inputs: Sequence[_Path]) -> int: ...

class TraceHead:
    """What a trace is of."""

    @staticmethod
    def read(path: _Path) -> TraceHead:
        """Reads it from the manifest of a trace."""
    @property
    def model(self) -> str: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
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
    def raster(self) -> bool:
        """Whether tokens are in raster order."""
    @property
    def sigmas(self) -> list[float]:
        """Noise level of each step."""
    @property
    def branch(self) -> str:
        """The branch that plans are made from."""

def set_sensitivity(path: _Path, step: Sequence[float], head: Sequence[float]) -> None:
    """Gives a trace its sensitivities, `step` [steps] and `head` [steps, layers, heads], in place of older ones."""
def capture_seed(prompt: str, step: int, branch: str, layer: int) -> int: ...
def sampled_rows(q_tokens: int, rows_per_block: int, seed: int, head: int) -> list[list[int]]: ...
def anchor_source(
    frames: int,
    height: int,
    width: int,
    text_tokens: int,
    text_position: str,
    tile: Sequence[int] | None,
    anchors: int,
) -> list[int]:
    """For each position of the sequence the position whose output it receives under anchor rows."""
def encode_log2_u8(src: int, dst: int, count: int) -> None: ...
def block_statistics_cpu(
    q: _View,
    k: _View,
    v: _View,
    *,
    energy: int,
    deviation: int,
    rows_per_block: int = 128,
    seed: int = 0,
    scale: float | None = None,
) -> None: ...
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
