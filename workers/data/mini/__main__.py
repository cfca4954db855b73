"""`python -m workers.data.mini --root data/mini` writes the mini suite; `--scan` lists pictures that two splits share."""

import argparse
import os
import sys
import time

from merge_service.errors import UserError
from workers.data.manifest import describe
from workers.data.mini.scan import scan, table
from workers.data.mini.suite import MAKERS, build


def main(arguments: list[str] | None = None) -> int:
    """`python -m workers.data.mini --root DIR`; exit code 2 on a UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.data.mini", description="Write the mini suite of real images."
    )
    parser.add_argument("--root", default="data/mini", help="where to write it (default: %(default)s)")
    parser.add_argument(
        "--scan",
        action="store_true",
        help="print a table of pictures that splits or sets share; exit code 1 if there are any",
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        if options.scan:
            found = scan(options.root)
            print(table(found))
            return int(any(pair.equal or pair.near for pair in found))
        processes = min(4, len(os.sched_getaffinity(0)))
        written = build(options.root, say=lambda line: print(line, flush=True), processes=processes)
        total = sum(
            split.samples for name in MAKERS for split in describe(options.root, name).splits.values()
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    state = f"written in {time.monotonic() - started:.0f} s" if written else "unchanged"
    print(f"mini suite: {len(MAKERS)} datasets, {total} images in {options.root}, {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
