"""`griffin bench count`: predicts where a training step spends time and memory on GPUs, without a GPU.

On a GPU it also measures a step, and prints what is predicted beside what is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from griffin.trainer.settings.sections import Config


def add_parser(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser(
        "count",
        help="predict where a training step spends time and memory on GPUs",
        description="Runs a rank's stages on meta tensors, records every operator's shapes, FLOPs and bytes, and "
        "predicts its time on the device by a roofline. Nothing is measured; differences between two versions or "
        "layouts are more reliable than absolute figures. With --measure the step is also run on one GPU, and printed "
        "beside its prediction. Settings of a config follow as --section.key value.",
    )
    parser.add_argument("model", metavar="MODEL|CONFIG", help="a preset, or a config: a file or a packaged one")
    parser.add_argument("--world", type=int, metavar="N", help="devices (default: 64; with --measure 1)")
    parser.add_argument("--tensor", type=int, metavar="T", help="tensor-parallel size")
    parser.add_argument("--sp", action="store_true", help="sequence parallelism")
    parser.add_argument("--pipeline", type=int, metavar="P", help="pipeline-parallel size")
    parser.add_argument("--micro-batch", type=int, metavar="B", help="sequences per micro-batch (presets: 4)")
    parser.add_argument("--global-batch", type=int, metavar="N", help="sequences per step (presets: 1024)")
    parser.add_argument("--sequence", type=int, metavar="S", help="tokens per sequence (presets: 2048)")
    parser.add_argument("--device", choices=("h100", "h200"), help="default: h100; with --measure by the GPU's name")
    parser.add_argument("--gemm", type=float, metavar="TFLOPS", help="rate of large matrix products (default: 790)")
    parser.add_argument("--detail", type=int, default=0, metavar="N", help="print the N slowest operators")
    parser.add_argument("--assumptions", action="store_true", help="print the assumed rates and their sources")
    parser.add_argument(
        "--measure", action="store_true", help="also run the step on this machine's GPU, on random tokens"
    )
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="steps to measure (default: 10)")
    parser.set_defaults(run=run, overrides=[])


def run(args: argparse.Namespace) -> int:
    if args.gemm is not None and not 0 < args.gemm < 1e5:
        raise ValueError(f"--gemm {args.gemm}: must be above 0, in TFLOP/s")
    if args.detail < 0:
        raise ValueError(f"--detail {args.detail}: must be at least 0")
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: must be at least 1")
    world = args.world if args.world is not None else 1 if args.measure else 64
    config = _config(args, world)

    gpu = ""
    if args.measure:
        from griffin.tools.bench.count import measured

        gpu = measured.prepare(config, world)
    from griffin.tools.bench.count.rates import ASSUMPTIONS, DEVICES
    from griffin.tools.bench.count.report import lines
    from griffin.tools.bench.count.step import count_step

    device = DEVICES[args.device or ("h200" if "H200" in gpu else "h100")]
    if args.gemm is not None:
        device = dataclasses.replace(device, products=args.gemm * 1e12)
    layout, train = config.parallel, config.train
    print(
        f"{args.model} on {world} x {device.name}: tensor {layout.tensor}"
        f"{' with sequence parallelism' * layout.sequence_parallel}, pipeline {layout.pipeline} x "
        f"{layout.virtual_pipeline}, data {world // layout.model_ranks}; micro-batch {train.micro_batch} x "
        f"{config.data.sequence_length}, {train.dtype}, recompute {train.recompute}. Counted, not measured."
    )
    if args.assumptions:
        for what, value, source in ASSUMPTIONS:
            print(f"  {what:32} {value:28} {source}")
    step = count_step(config, world, device)
    if args.measure:
        import torch

        measured.check_memory(step, torch.cuda.mem_get_info()[1])
    for line in lines(step, args.detail):
        print(line)
    print(f"MFU {step.mfu:.1%}".replace("%", " %") + f", {step.tokens_per_second:,.0f} tokens/s/device")
    if args.measure:
        found = measured.measure_step(config, {op.name for op in step.slowest.rank.ops}, args.repeats)
        print(f"\npredicted for {device.name}, measured on {gpu}: means of {args.repeats} steps")
        for line in measured.comparison(step, found):
            print(line)
    return 0


def _config(args: argparse.Namespace, world: int) -> Config:
    """Return the settings, with those of the command line. Data is not read.

    Raises ValueError if they are not valid for this number of devices.
    """
    from griffin.trainer.settings.complete import with_vocabulary
    from griffin.trainer.settings.load import read_settings
    from griffin.trainer.settings.presets import PRESETS, VOCABULARY, preset
    from griffin.trainer.settings.sections import Config, DataConfig, TrainConfig
    from griffin.trainer.settings.validate import validate_settings

    if args.model in PRESETS:
        if args.overrides:
            raise ValueError(f"{args.overrides[0]}: settings are for configs; {args.model} is a preset")
        config = Config(
            model=preset(args.model),
            data=DataConfig(train=("data",)),
            train=TrainConfig(micro_batch=4, global_batch=1024, dtype="bfloat16"),
        )
    else:
        config = read_settings(Path(args.model), args.overrides)
        if config.model.vocabulary is None:
            config = with_vocabulary(config, VOCABULARY)
    given = {
        "parallel": {
            "tensor": args.tensor,
            "pipeline": args.pipeline,
            "sequence_parallel": True if args.sp else None,
        },
        "train": {"micro_batch": args.micro_batch, "global_batch": args.global_batch},
        "data": {"sequence_length": args.sequence},
    }
    for section, values in given.items():
        stated = {name: value for name, value in values.items() if value is not None}
        config = dataclasses.replace(
            config,
            **{section: dataclasses.replace(getattr(config, section), **stated)},  # type: ignore[arg-type]
        )
    validate_settings(config, world)
    return config
