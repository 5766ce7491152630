"""`griffin data`: build data sets from text, verify and inspect them."""

from __future__ import annotations

import argparse
import warnings

from griffin.launch.local import cores

INSPECTED_TOKENS = 64


def add_parser(subparsers) -> None:
    """Register `data` with its sub-commands `build`, `verify` and `inspect`."""
    parser = subparsers.add_parser("data", help="build data sets from text, verify and inspect them")
    parser.set_defaults(run=run)
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    build = commands.add_parser(
        "build",
        help="encode text into PREFIX.bin, PREFIX.idx and PREFIX.json",
        description="Encode text files (one document each) and JSON Lines files (one document a line) into a data set "
        "that training reads. An existing PREFIX is never overwritten.",
    )
    build.add_argument("prefix", metavar="PREFIX", help="where to write PREFIX.bin, PREFIX.idx and PREFIX.json")
    build.add_argument(
        "inputs", metavar="INPUT", nargs="+", help="folder (read recursively), text file, .jsonl, .jsonl.gz, .jsonl.zst"
    )
    build.add_argument(
        "--tokenizer",
        required=True,
        metavar="bytes|FILE",
        help='"bytes", a Hugging Face tokenizer.json or a SentencePiece .model',
    )
    build.add_argument("--eod", metavar="TOKEN", help="the tokenizer's end-of-document token (default: a usual name)")
    build.add_argument("--workers", type=int, default=cores(), metavar="N", help="processes (default: %(default)s)")
    build.add_argument(
        "--glob",
        action="append",
        metavar="PATTERN",
        dest="globs",
        help="files to take from folders, by name, or by relative path if the pattern has a slash; repeatable "
        "(default: *.txt *.md *.rst *.py *.jsonl *.jsonl.gz *.jsonl.zst)",
    )
    build.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="files and folders to leave out of folders, by the same rule; repeatable",
    )
    build.add_argument("--text-key", default="text", metavar="KEY", help="key of a JSON line's text (default: text)")
    build.add_argument(
        "--hold-out",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="hold out this fraction of the documents, selected by a hash of the relative path (and line)",
    )
    build.add_argument("--hold-out-prefix", metavar="PREFIX", help="where to write the held-out documents")

    verify = commands.add_parser("verify", help="compare all files of a data set with their checksums")
    verify.add_argument("prefix", metavar="PREFIX", help="as given to `griffin data build`")

    inspect = commands.add_parser("inspect", help="print sizes, tokenizer, inputs and first tokens of a data set")
    inspect.add_argument("prefix", metavar="PREFIX", help="as given to `griffin data build`")


def run(args: argparse.Namespace) -> None:
    """Run the sub-command. Raises ValueError for mistakes of the user."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")  # about packages that data sets do not need
    {"build": _build, "inspect": _inspect, "verify": _verify}[args.data_command](args)


def _build(args: argparse.Namespace) -> None:
    from griffin.trainer.data.build import build
    from griffin.trainer.data.documents import DEFAULT_GLOBS

    infos = build(
        args.prefix,
        args.inputs,
        tokenizer=args.tokenizer,
        eod=args.eod,
        workers=args.workers,
        globs=args.globs or DEFAULT_GLOBS,
        exclude=args.exclude,
        text_key=args.text_key,
        hold_out=args.hold_out,
        hold_out_prefix=args.hold_out_prefix,
    )
    for info in infos:
        print(f"{info.prefix}: {info.documents:,} documents, {info.tokens:,} tokens")
    if infos[0].empty or infos[0].undecodable:
        print(f"left out: {infos[0].empty:,} documents without text, {infos[0].undecodable:,} files that are not UTF-8")


def _verify(args: argparse.Namespace) -> None:
    from griffin.trainer.data.prefix import read_info, verify

    info = read_info(args.prefix)
    problems = verify(info)
    if problems:
        raise ValueError("\n".join(problems))
    print(f"{args.prefix}.bin: as built")
    if info.checksums is None:
        print(f"{args.prefix}.idx: not compared; {args.prefix}.json has no checksums of blocks")
    else:
        print(f"{args.prefix}.idx: as built")


def _inspect(args: argparse.Namespace) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from griffin.trainer.data.prefix import check_ids, read_info

    info = read_info(args.prefix)
    dataset = IndexedDataset(args.prefix)  # kept: what `get` returns is a view of its memory map
    ids = dataset.get(0)[:INSPECTED_TOKENS].tolist()
    check_ids(min(ids), max(ids), info.vocabulary, f"{args.prefix}.bin is damaged")
    print(f"documents  {info.documents:,}")
    print(f"tokens     {info.tokens:,} ({info.tokens / info.documents:,.1f} a document), {info.dtype.__name__}")
    if info.bytes_per_token is not None:
        print(f"text       {info.text_bytes:,} bytes ({info.bytes_per_token:.2f} a token)")
    print(f"tokenizer  {info.tokenizer_spec}: {info.tokenizer}")
    print(f"inputs     {' '.join(info.inputs)}")
    print(f"first ids  {ids}")
    print(f"as text    {info.load_tokenizer().decode(ids)!r}")
