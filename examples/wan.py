"""Wan 2.1 / 2.2 text-to-video with calibrated sparse attention: capture traces, compile a plan, generate with it.

    pip install 'calibc[cu13]' torch diffusers transformers accelerate ftfy
    python examples/wan.py capture  --traces traces/ --prompts prompts.txt
    python examples/wan.py sensitivity --traces traces/ --prompts prompts.txt         # for specs with the policy `budget`
    python examples/wan.py compile  --traces traces/ --bundle wan.bundle
    python examples/wan.py generate --bundle wan.bundle --prompt "a cat surfs a wave" --out cat.mp4

`prompts.txt` has a prompt per line; ten or so serve, the last `--holdout` of them judge the plan. A capture that is killed goes
on where it was when run again; under `torchrun --nproc-per-node=N` the prompts are shared out. `--tiny` runs everything on a
small random model without weights, in seconds, on the CPU.
"""

from __future__ import annotations

import argparse
import os
import pathlib

import calibc
import torch

MODEL = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
NEGATIVE = "blurry, low quality, static"


def load(args: argparse.Namespace) -> object:
    """The pipeline."""
    if args.tiny:
        return tiny_pipeline()
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
    return pipe.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))


def generate(pipe: object, args: argparse.Namespace, prompt: str, output_type: str) -> object:
    """One video, or its latents."""
    generator = torch.Generator().manual_seed(args.seed)
    size = {"height": args.height, "width": args.width, "num_frames": args.frames, "num_inference_steps": args.steps}
    if args.tiny:
        words = {
            "prompt_embeds": torch.randn(1, 16, 32, generator=generator),
            "negative_prompt_embeds": torch.zeros(1, 16, 32),
        }
    else:
        words = {"prompt": prompt, "negative_prompt": NEGATIVE}
    return pipe(**words, **size, guidance_scale=args.guidance, generator=generator, output_type=output_type).frames


def capture(args: argparse.Namespace) -> None:
    prompts = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
    names = {f"p{i:03}": prompt for i, prompt in enumerate(prompts)}
    holdout = set(list(names)[len(names) - args.holdout :])
    if len(holdout) == len(names):
        raise SystemExit("every prompt would be held out; give more prompts or a smaller --holdout")
    pipe = load(args)
    config = calibc.CaptureConfig(prompts=len(names), rows_per_block=args.rows_per_block, model="wan")
    with calibc.capture(pipe, args.traces, config) as cap:
        for name in cap.remaining(cap.assigned(list(names))):
            split = "holdout" if name in holdout else "calibration"
            with cap.prompt(name, seed=args.seed, split=split, label=names[name]):
                # The trace needs no pixels.
                generate(pipe, args, names[name], "latent")
        print(cap.summary())


def sensitivity(args: argparse.Namespace) -> None:
    prompts = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()][: args.measured]
    pipe = load(args)
    runs = [lambda prompt=prompt: generate(pipe, args, prompt, "latent") for prompt in prompts]
    measured = calibc.sensitivity(pipe, args.traces, run=runs)
    print(f"an error at the first step weighs {measured.step[0] / measured.step[-1]:.3g} times one at the last")


def compile(args: argparse.Namespace) -> None:
    bundle = calibc.compile(args.traces, out=args.bundle, spec=args.spec, target=args.target)
    layers = range(bundle.layers)
    density = (
        sum(bundle.density(step, layer) for step in range(bundle.steps) for layer in layers)
        / bundle.steps
        / bundle.layers
    )
    print(f"{args.bundle}: density {density:.3f}; `calibc inspect {args.bundle}` shows more")


def run(args: argparse.Namespace) -> None:
    pipe = load(args)
    with calibc.apply_sparse_attention(pipe, calibc.SparseAttentionConfig(args.bundle, strict=args.strict)) as handle:
        if args.compile:
            for name in ("transformer", "transformer_2"):
                if getattr(pipe, name, None) is not None:
                    getattr(pipe, name).compile_repeated_blocks(fullgraph=True)
        frames = generate(pipe, args, args.prompt, "latent" if args.tiny else "np")
        print(handle.stats())
    if args.tiny:
        torch.save(frames, args.out)
    else:
        from diffusers.utils import export_to_video

        export_to_video(frames[0], str(args.out), fps=16)


def tiny_pipeline() -> object:
    """A pipeline around a random model of two layers, without text encoder and decoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", default=MODEL, help="on the Hugging Face hub, or a folder")
    model.add_argument("--height", type=int)
    model.add_argument("--width", type=int)
    model.add_argument("--frames", type=int)
    model.add_argument("--steps", type=int)
    model.add_argument("--guidance", type=float, default=5.0)
    model.add_argument("--seed", type=int, default=0)
    model.add_argument("--tiny", action="store_true", help="a small random model on the CPU")

    command = commands.add_parser("capture", parents=[model], help="record traces of some prompts")
    command.add_argument("--traces", type=pathlib.Path, required=True)
    command.add_argument("--prompts", type=pathlib.Path, required=True, help="a prompt per line")
    command.add_argument("--holdout", type=int, default=1, help="prompts that judge the plan instead of making it")
    command.add_argument("--rows-per-block", type=int, default=16)
    command.set_defaults(act=capture)

    command = commands.add_parser("sensitivity", parents=[model], help="measure what errors at steps and heads cost")
    command.add_argument("--traces", type=pathlib.Path, required=True)
    command.add_argument("--prompts", type=pathlib.Path, required=True, help="a prompt per line")
    command.add_argument("--measured", type=int, default=1, help="how many of them to generate with")
    command.set_defaults(act=sensitivity)

    command = commands.add_parser("compile", help="make a bundle of traces")
    command.add_argument("--traces", type=pathlib.Path, required=True)
    command.add_argument("--bundle", type=pathlib.Path, required=True)
    command.add_argument("--spec", type=pathlib.Path, help="a file of plans/; else the paper's recipe")
    command.add_argument("--target", nargs="*", default=[], help="GPU architectures, such as sm_90a")
    command.set_defaults(act=compile)

    command = commands.add_parser("generate", parents=[model], help="make a video with a bundle")
    command.add_argument("--bundle", type=pathlib.Path, required=True)
    command.add_argument("--prompt", default="a cat surfs a wave")
    command.add_argument("--out", type=pathlib.Path, required=True)
    command.add_argument("--strict", action="store_true", help="fail rather than fall back to dense attention")
    command.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    command.set_defaults(act=run)

    args = parser.parse_args()
    if "tiny" in args:
        # 480p, 81 frames, 50 steps; or 3 x 16 x 16 tokens and 4 steps.
        size = (
            {"height": 256, "width": 256, "frames": 9, "steps": 4}
            if args.tiny
            else {"height": 480, "width": 832, "frames": 81, "steps": 50}
        )
        for name, value in size.items():
            setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    args.act(args)


if __name__ == "__main__":
    main()
