"""`python -m data verify|info|list|gc`: look after the caches that harvests left."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data.base.errors import UserError, to_sentence
from data.base.files import format_bytes
from data.base.location import Location, parse_location
from data.storage.open import open_storage
from data.store.files import is_token_store, stores_below, token_stores_below
from data.store.find import CACHE

OUTPUTS = "outputs"
_EXAMPLES = """examples:
  python -m data list
  python -m data info outputs/cache/<store>
  python -m data verify s3://bucket/prefix/<store>
"""


def _verify_store(path: Location) -> int:
    """Print what is wrong with a store, of activations or of tokens; how many files are damaged."""
    from data.tools.inventory import Entry
    from data.tools.tokens import verify_tokens
    from data.tools.verify import verify

    of_tokens = is_token_store(path)
    findings = verify_tokens(path) if of_tokens else verify(path)
    for finding in findings:
        print(finding)
    damaged = sum(not finding.leftover for finding in findings)
    sizes = open_storage(path).sizes()
    sound = "sound, tokens" if of_tokens else f"sound, {Entry.of(path).state}"
    state = f"{damaged} damaged" if damaged else sound
    on_disk = f"{len(sizes)} files, {format_bytes(sum(sizes.values()))}"
    print(f"{path}: {state}; {on_disk}, {len(findings) - damaged} left over", flush=True)
    return damaged


def _verify(args: argparse.Namespace) -> int:
    """Return 1 where anything is damaged."""
    folders = [parse_location(folder) for folder in args.folders or [str(CACHE)]]
    stores = [path for folder in folders for below in (stores_below, token_stores_below) for path in below(folder)]
    if not stores:
        raise UserError(f"no store in {', '.join(args.folders or [str(CACHE)])}: name the folder of one")
    damages = 0
    for path in stores:
        try:
            damages += _verify_store(path)
        except (UserError, OSError) as error:  # the other stores are looked at all the same
            print(f"damaged: {path} cannot be verified: {to_sentence(error) or error}", flush=True)
            damages += 1
    return 1 if damages else 0


def _info(args: argparse.Namespace) -> int:
    from data.tools.info import report

    if not 0 < args.outlier < math.inf:
        raise UserError(f"--outlier={args.outlier} is no multiple of a norm: give a number above 0, such as 10")
    if args.rows < 1:
        raise UserError(f"--rows={args.rows} is no number of rows to look at: give 1 or more")
    for line in report(parse_location(args.store), args.outlier, args.rows):
        print(line, flush=True)
    return 0


def _list(args: argparse.Namespace) -> int:
    from data.tools.inventory import listing
    from data.tools.tokens import describe_tokens, token_entries

    folder = parse_location(args.folder)
    of_tokens = [line for entry in token_entries(folder) for line in describe_tokens(entry)]
    print("\n".join([*of_tokens, *listing(folder)]))
    return 0


def _gc(args: argparse.Namespace) -> int:
    from data.tools.gc import Candidate, collect_garbage

    # Compared so that NaN fails too: no time is older than it, and every store would go.
    if not 0 <= args.idle < math.inf:
        raise UserError(f"--idle={args.idle} is no number of minutes: give 0 or more, such as 60")

    def ask(candidate: Candidate) -> bool:
        return input(f"remove {candidate}? [y/N] ").strip().lower() == "y"

    confirm: Callable[[Candidate], bool] | None = ask if sys.stdin.isatty() else None
    if args.yes:

        def confirm(candidate: Candidate) -> bool:
            return True

    print("\n".join(collect_garbage(parse_location(args.folder), _folder(args.outputs), args.idle, confirm)))
    return 0


def _folder(text: str) -> Path:
    location = parse_location(text)
    if not isinstance(location, Path):
        raise UserError(f"--outputs={text} is no folder: name the one where the trained SAEs are")
    return location


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data",
        description="Look after the caches that harvests left.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("verify", help="check every checksum, count and statistic; exit code 1 on damage")
    verb.add_argument("folders", nargs="*", help=f"stores, or folders that hold some (default {CACHE})")
    verb.set_defaults(run=_verify)
    verb = verbs.add_parser("info", help="identity, settings, sizes, statistics, norms by position, outliers")
    verb.add_argument("store")
    verb.add_argument("--outlier", type=float, default=10.0, metavar="C", help="norm above C times the median (10)")
    verb.add_argument("--rows", type=int, default=1_000_000, help="rows of a site whose norms are looked at (1000000)")
    verb.set_defaults(run=_info)
    verb = verbs.add_parser("list", help="all caches below a folder and what made them")
    verb.add_argument("folder", nargs="?", default=str(CACHE), help=f"default {CACHE}")
    verb.set_defaults(run=_list)
    verb = verbs.add_parser("gc", help="show what no SAE needs and what was left over; remove it after asking")
    verb.add_argument("folder", nargs="?", default=str(CACHE), help=f"default {CACHE}")
    verb.add_argument("--outputs", default=OUTPUTS, help=f"where the trained SAEs are (default {OUTPUTS})")
    verb.add_argument("--idle", type=float, default=60.0, metavar="MINUTES", help="spare stores written to since (60)")
    verb.add_argument("--yes", action="store_true", help="do not ask")
    verb.set_defaults(run=_gc)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 1 for damage or a mistake, which is printed as a sentence."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except (KeyboardInterrupt, EOFError):
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        told = to_sentence(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
