"""Runs a bundle inside a diffusers pipeline, and takes it out again.

    handle = calibc.apply_sparse_attention(pipe, calibc.SparseAttentionConfig("plan.bundle"))
    video = pipe(prompt)
    print(handle.stats())
    handle.remove()

A hook around the transformer's forward decides once per pass whether the plan covers it, and at which step; the processors of
the self-attention layers then run the plan, or the attention that was set before. What falls back is counted, and said once.

`torch.compile`: `transformer.compile_repeated_blocks(fullgraph=True)` makes one graph for all layers and steps. CUDA graphs:
run a pass before capturing one; the step is read from device memory, `handle.set_step` moves it between replays.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calibc import ops
from calibc._native import Bundle
from calibc.adapters import Adapter, Call, Route, adapter_of, transformers_of
from calibc.adapters.schedule import (
    Context,
    ContextHook,
    Position,
    Progress,
    TextLengths,
    Timesteps,
    attach,
    attached,
    capturing,
    detach,
    place,
    put_back,
)
from calibc.adapters.text import attention_text
from calibc.errors import BadInput, CalibcError, Environment, Usage

Path = str | os.PathLike[str]

_HOOK = "calibc_sparse_attention"
_RAN = "ran"
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class FallbackWarning(UserWarning):
    """Something ran without the plan."""


class NotCovered(CalibcError, RuntimeError):
    """Something could not run on the plan, and the configuration is strict."""

    exit_code = 3


@dataclasses.dataclass(frozen=True)
class SparseAttentionConfig:
    """How to run a bundle."""

    bundle: Path | Bundle | Mapping[str, Path | Bundle]
    """The bundle. For pipelines with two transformers that were calibrated apart: a bundle by component name."""
    fallback: str | None = None
    """What runs where the plan does not cover: `None` is the attention that was set before, else an attention backend of
    diffusers, such as `"native"`."""
    strict: bool = False
    """Whether to raise `NotCovered` instead of falling back."""
    match: Literal["sigma", "step"] = "sigma"
    """How a denoising step finds its plan: by noise level, which also serves other numbers of steps, or by its number."""
    sigma_tolerance: float = 0.05
    """Furthest noise level of a plan that serves a step; further ones fall back."""
    resident_steps: int | None = 2
    """Of how many steps, at least 2, a GPU holds the masks at a time: the next one's are uploaded while one runs. `None` holds all,
    which takes more memory and lets passes of several streams overlap."""


@dataclasses.dataclass
class LayerStats:
    """What one attention layer did."""

    name: str
    calls: int = 0
    """Calls of the layer."""
    sparse_calls: int = 0
    """Those that ran on the plan."""
    work: float = 0.0
    """Sum of the densities of all calls; a call that fell back has 1."""

    @property
    def density(self) -> float | None:
        """Mean share of the dense work that was done; `None` before the first call."""
        return self.work / self.calls if self.calls else None


@dataclasses.dataclass
class Stats:
    """What happened since the plan was applied, as far as Python saw it: replays of CUDA graphs are not counted."""

    forwards: int
    """Forward passes of the transformers."""
    calls: int
    """Calls of self-attention layers."""
    sparse_calls: int
    """Those that ran on the plan."""
    fallbacks: dict[str, int]
    """Calls that did not, by reason."""
    reasons: dict[str, str]
    """The first occurrence of each reason, in words."""
    layers: list[LayerStats]

    @property
    def density(self) -> float | None:
        """Mean share of the dense work that was done; `None` before the first call."""
        return sum(layer.work for layer in self.layers) / self.calls if self.calls else None

    def __str__(self) -> str:
        density = "-" if self.density is None else f"{self.density:.3f}"
        lines = [f"{self.forwards} forwards, {self.sparse_calls} of {self.calls} calls on the plan, density {density}"]
        lines += [f"  {count} fell back: {self.reasons[reason]}" for reason, count in self.fallbacks.items()]
        return "\n".join(lines)


class _Control:
    """What all layers of a transformer look at in a forward pass."""

    def __init__(self, bundle: Bundle, drop_queries: bool) -> None:
        self.on = False
        self.step = torch.zeros((), dtype=torch.int32)
        # Tokens of a sample, and those of each that are real where some are padding.
        self.tokens = 0
        self.lengths: Tensor | None = None
        self.drop_queries = drop_queries
        self.heads = bundle.heads
        self.head_dim = bundle.head_dim
        self.dtypes: frozenset[torch.dtype] = frozenset()


class _Layer(Route):
    """One attention layer on the plan."""

    def __init__(self, control: _Control, site: Tensor, fallback: str | None) -> None:
        self.control = control
        self.site = site
        self.fallback = fallback
        # Written by a call, read by the hook after the forward: compiled graphs may write, not count.
        self.outcome: str | None = None

    @property
    def engaged(self) -> bool:
        return self.control.on

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        blocked: str | None = None,
    ) -> Tensor | None:
        control = self.control
        if not control.on:
            return None
        reason = blocked if blocked is not None else self._refusal(query, key, value, mask)
        if reason is not None:
            self.outcome = reason
            return None
        self.outcome = _RAN
        if control.lengths is None:
            return ops.attention(query, key, value, self.site, control.step, scale)
        return attention_text(query, key, value, self.site, control.step, control.lengths, control.drop_queries, scale)

    def _refusal(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
        """Why the plan cannot run these tensors. Nothing here reads device memory."""
        control = self.control
        if mask is not None and control.lengths is None:
            return "mask"
        if query.shape != key.shape or key.shape != value.shape:
            return "shape"
        if query.shape[1] != control.heads or query.shape[2] != control.tokens or query.shape[3] != control.head_dim:
            return "shape"
        if query.device != control.step.device:
            return "device"
        if query.dtype not in control.dtypes or key.dtype != query.dtype or value.dtype != query.dtype:
            return "dtype"
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return "gradient"
        return None


# Reasons that layers give, in words.
_WORDS = {
    "causal": "the model asks for causal attention",
    "context parallelism": "the sequence is spread over several GPUs",
    "device": "tensors are on another device than the transformer's input",
    "dropout": "the model asks for dropout in attention",
    "dtype": "the plan has no kernel for the type of q, k and v",
    "gradient": "gradients are wanted; use torch.no_grad() or inference_mode()",
    "mask": "the model masks attention in a way the plan knows nothing of",
    "processor": "the layer's attention processor was replaced after the plan was applied",
    "shape": "q, k and v are not the plan's self-attention",
}


class _Hook(ContextHook):
    """Decides per forward pass, and counts."""

    def __init__(
        self, adapter: Adapter, bundle: Bundle, config: SparseAttentionConfig, handle: Handle, name: str
    ) -> None:
        super().__init__()
        self.handle = handle
        self.bundle = bundle
        self.config = config
        self._adapter = adapter
        self._sigmas = bundle.sigmas
        self._timesteps = Timesteps(adapter)
        self._texts = TextLengths()
        self._devices: dict[torch.device, str | None] = {}
        self._density: dict[int, list[float]] = {}
        self._at = 0
        self._reason: tuple[str, str] | None = None
        self.control = _Control(bundle, adapter.drops_padding)
        self.attentions: list[Any] = adapter.layers()
        self.originals: list[Any] = [attn.processor for attn in self.attentions]
        self.layers = [
            _Layer(self.control, ops.site(bundle, i), config.fallback if adapter.dispatches else None)
            for i in range(len(self.attentions))
        ]
        self.processors = [
            adapter.processor(original, layer) for original, layer in zip(self.originals, self.layers, strict=True)
        ]
        paths = {id(module): path for path, module in adapter.module.named_modules()}
        self.stats = [LayerStats(f"{name}.{paths[id(attn)]}") for attn in self.attentions]
        self.forwards = 0

    # Under torch.compile of the whole transformer this stays Python.
    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for layer in self.layers:
            layer.outcome = None
        call = self._adapter.bind(args, kwargs)
        if not capturing(call.latents.device):
            self._reason = self._decide(call)
            self.control.on = self._reason is None
        if self._reason is not None and self.config.strict:
            raise NotCovered(f"{self._reason[0]}: {self._reason[1]}")
        return args, kwargs

    @torch.compiler.disable
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.forwards += 1
        density = self._densities(self._at)
        for layer, attn, ours, stats, share in zip(
            self.layers, self.attentions, self.processors, self.stats, density, strict=True
        ):
            stats.calls += 1
            if self._reason is None and layer.outcome == _RAN:
                stats.sparse_calls += 1
                stats.work += share
                continue
            stats.work += 1.0
            if attn.processor is not ours:
                self.handle._fell_back("processor", _WORDS["processor"])
            elif self._reason is not None:
                self.handle._fell_back(*self._reason)
            elif layer.outcome is not None:
                self.handle._fell_back(layer.outcome, _WORDS[layer.outcome])
            else:
                # A cache, say, skipped the layer: nothing was computed.
                stats.calls -= 1
                stats.work -= 1.0
        self.handle._raise_if_strict()
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.handle._progress.reset()
        return super().reset_state(module)

    def _decide(self, call: Call) -> tuple[str, str] | None:
        """Readies the layers for a pass; else says why the plan does not cover it."""
        context = self.context()
        # Always, so that the count of steps does not miss one.
        level = context.sigma if context.sigma is not None else self._timesteps.level(call.timestep)
        position = self.handle._progress.advance(level)
        return self._device(call.latents.device) or self._shape(call) or self._step(context, position)

    def _device(self, device: torch.device) -> tuple[str, str] | None:
        if device not in self._devices:
            self._devices[device] = self._loaded(device)
        refused = self._devices[device]
        if refused is not None:
            return "gpu", refused
        if self.control.step.device != device:
            # A step made under inference_mode could not be changed outside of it.
            with torch.inference_mode(False):
                self.control.step = torch.zeros((), dtype=torch.int32, device=device)
            self.control.dtypes = self._dtypes(device)
        elif not self.control.dtypes:
            self.control.dtypes = self._dtypes(device)
        return None

    def _loaded(self, device: torch.device) -> str | None:
        """Puts the bundle onto a GPU; else says why it cannot be."""
        if device.type == "cpu":
            return None
        if device.type != "cuda":
            return f"there are no kernels for {device.type} devices"
        capability = torch.cuda.get_device_capability(device)
        if not self.bundle.has_kernels(capability):
            return f"the bundle has no kernels for {torch.cuda.get_device_name(device)} (sm_{capability[0]}{capability[1]})"
        window = self.config.resident_steps
        try:
            ops.load(self.bundle, device, None if window is None or window >= self.bundle.steps else window)
        except Environment as error:
            return str(error)
        return None

    def _dtypes(self, device: torch.device) -> frozenset[torch.dtype]:
        if device.type == "cpu":
            return frozenset((torch.float32, *_NAMES))
        symbols = [symbol for symbol, _ in self.bundle.kernels]
        return frozenset(
            dtype for dtype, name in _NAMES.items() if any(f"_{name}_" in f"{symbol}_" for symbol in symbols)
        )

    def _shape(self, call: Call) -> tuple[str, str] | None:
        bundle, control = self.bundle, self.control
        grid = (bundle.frames, bundle.height, bundle.width)
        video = grid[0] * grid[1] * grid[2]
        if call.video_tokens != video or call.grid not in (None, grid):
            got = f"{call.video_tokens} tokens" if call.grid is None else "x".join(map(str, call.grid))
            return "shape", f"the video has {got}, the plan is for {'x'.join(map(str, grid))}"
        text, most = call.text_tokens, bundle.text_tokens
        # Text after the video may be shorter: nothing before it moves.
        if text != most and not (bundle.text_position == "after" and text < most):
            return "text length", f"the prompt has {text} text tokens, the plan is for {most}"
        lengths = None
        if call.text_mask is not None:
            real = self._texts.read(call.text_mask)
            if real is None:
                return "mask", "text padding stands before text, which the plan does not cover"
            lengths = [video + n for n in real]
        control.tokens = call.tokens
        if lengths is None:
            control.lengths = None
        elif control.lengths is None or control.lengths.tolist() != lengths:
            with torch.inference_mode(False):
                control.lengths = torch.tensor(lengths, dtype=torch.int64)
        return None

    def _step(self, context: Context, position: Position) -> tuple[str, str] | None:
        """Puts the step that covers this pass where kernels read it."""
        step = position.step if context.step_index is None else context.step_index
        if self.config.match == "step":
            if step >= self.bundle.steps:
                return "unknown step", f"step {step} is beyond the plan's {self.bundle.steps} steps"
        else:
            near = min(range(len(self._sigmas)), key=lambda i: abs(self._sigmas[i] - position.level))
            far, most = abs(self._sigmas[near] - position.level), self.config.sigma_tolerance
            if far > most:
                return "unknown sigma", (
                    f"noise level {position.level:.4g} is {far:.2g} from the nearest step of the plan ({self._sigmas[near]:.4g}); "
                    f"the tolerance is {most:.2g}"
                )
            # Where schedules agree in length, neighbours that rounding could swap are told apart by number.
            numbered = context.step_index is not None and context.num_steps == self.bundle.steps
            step = step if numbered and abs(self._sigmas[step] - position.level) <= most else near
        self.set_step(step)
        return None

    def set_step(self, step: int) -> None:
        """Moves all layers to a step of the plan. Waits for nothing."""
        self._at = step
        if self.control.step.is_cuda:
            ops.enter(self.bundle, step, self.control.step.device)
        self.control.step.fill_(step)

    def _densities(self, step: int) -> list[float]:
        if step not in self._density:
            self._density[step] = [self.bundle.density(step, layer) for layer in range(self.bundle.layers)]
        return self._density[step]

    def install(self) -> None:
        place(self.attentions, self.processors)
        attach(self._adapter.module, self, _HOOK)

    def uninstall(self) -> None:
        put_back(self.attentions, self.processors, self.originals)
        detach(self._adapter.module, _HOOK)


class Handle:
    """A plan in place. Also a context manager: it removes the plan at the end."""

    def __init__(self, config: SparseAttentionConfig) -> None:
        self._config = config
        self._progress = Progress()
        self._hooks: list[_Hook] = []
        self._removed = False
        self._fallbacks: collections.Counter[str] = collections.Counter()
        self._reasons: dict[str, str] = {}
        self._refused: str | None = None

    def stats(self) -> Stats:
        """Calls, fallbacks and densities so far."""
        layers = [dataclasses.replace(stats) for hook in self._hooks for stats in hook.stats]
        return Stats(
            forwards=sum(hook.forwards for hook in self._hooks),
            calls=sum(layer.calls for layer in layers),
            sparse_calls=sum(layer.sparse_calls for layer in layers),
            fallbacks=dict(self._fallbacks),
            reasons=dict(self._reasons),
            layers=layers,
        )

    def set_step(self, step: int) -> None:
        """Moves the plan to `step`. For replays of a CUDA graph, which no hook sees; other passes find their step themselves."""
        for hook in self._hooks:
            if not 0 <= step < hook.bundle.steps:
                raise BadInput(f"step {step} is out of range: the plan has {hook.bundle.steps} steps")
            hook.set_step(step)

    def remove(self) -> None:
        """Takes the plan out: processors and forward are as they were. Does nothing the second time."""
        removed, self._removed = self._removed, True
        if not removed:
            for hook in self._hooks:
                hook.uninstall()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _fell_back(self, reason: str, words: str) -> None:
        self._fallbacks[reason] += 1
        if self._config.strict:
            self._refused = f"{reason}: {words}"
        if reason not in self._reasons:
            self._reasons[reason] = words
            warnings.warn(
                f"calibc: {words}; the attention that was set before runs instead. This is said once per reason; "
                "stats() counts, strict=True raises.",
                FallbackWarning,
                stacklevel=2,
            )

    def _raise_if_strict(self) -> None:
        refused, self._refused = self._refused, None
        if refused is not None:
            raise NotCovered(refused)


def apply_sparse_attention(target: object, config: SparseAttentionConfig | Path | Bundle) -> Handle:
    """Runs the self-attention of a transformer, or of a pipeline's transformers, on a bundle.

    Args:
        target: A transformer of diffusers, or a pipeline.
        config: How; a path or a bundle alone stands for `SparseAttentionConfig(bundle)`.

    Raises:
        Usage: There is no adapter for the model, or it runs on a plan already.
        BadInput: The bundle is for another model.
    """
    if not isinstance(config, SparseAttentionConfig):
        config = SparseAttentionConfig(config)
    if config.resident_steps is not None and config.resident_steps < 2:
        raise Usage("resident_steps must be at least 2: the step that runs, and the next")
    modules = transformers_of(target)
    bundles = _bundles(config, modules)
    handle = Handle(config)
    for name, module in modules.items():
        if attached(module, _HOOK) is not None:
            raise Usage(f"{name} runs on a plan already; remove that first")
        adapter = adapter_of(module)
        _check_model(adapter, bundles[name])
        _check_fallback(adapter, config.fallback)
        handle._hooks.append(_Hook(adapter, bundles[name], config, handle, name))
    for hook in handle._hooks:
        hook.install()
    return handle


def remove_sparse_attention(target: object) -> None:
    """Takes a plan out of a transformer or a pipeline; does nothing where there is none."""
    for module in transformers_of(target).values():
        hook = attached(module, _HOOK)
        if isinstance(hook, _Hook):
            hook.handle.remove()


def _bundles(config: SparseAttentionConfig, modules: Mapping[str, nn.Module]) -> dict[str, Bundle]:
    given = config.bundle
    if isinstance(given, Mapping):
        if set(given) != set(modules):
            raise Usage(f"there are bundles for {sorted(given)}, but the target has {sorted(modules)}")
        return {name: _opened(bundle) for name, bundle in given.items()}
    bundle = _opened(given)
    return dict.fromkeys(modules, bundle)


def _opened(bundle: Path | Bundle) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else Bundle(bundle)


def _check_model(adapter: Adapter, bundle: Bundle) -> None:
    wanted = {
        "layers": (bundle.layers, len(adapter.layers())),
        "heads": (bundle.heads, adapter.heads),
        "head_dim": (bundle.head_dim, adapter.head_dim),
        "text_position": (bundle.text_position, adapter.text_position),
        "layout": (bundle.layout, "raster"),
    }
    wrong = [f"{name} {plan} against {model}" for name, (plan, model) in wanted.items() if plan != model]
    if wrong:
        raise BadInput(f"the bundle is not for this {adapter.model_class}, plan against model: {', '.join(wrong)}")


def _check_fallback(adapter: Adapter, fallback: str | None) -> None:
    if fallback is None:
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [backend.value for backend in AttentionBackendName]
    if fallback not in known:
        raise Usage(f"`{fallback}` is no attention backend of diffusers; there are {', '.join(known)}")
    if not adapter.dispatches and fallback != "native":
        raise Usage(f"{adapter.model_class} has no choice of backends; leave fallback out")


__all__ = [
    "FallbackWarning",
    "Handle",
    "LayerStats",
    "NotCovered",
    "SparseAttentionConfig",
    "Stats",
    "apply_sparse_attention",
    "remove_sparse_attention",
]
