"""report.html: what a run did, in one file that loads nothing else. A run writes it at each validation and at its end.

`python -m spo_fast.report RUN_DIR` builds it again, also for a run that is still going or was killed: all it says is
read from config.yaml, metrics.jsonl and samples/.
"""

from __future__ import annotations

import argparse
import sys

from spo_fast.evaluation.pages.run_report import write_report


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m spo_fast.report", description="Write report.html of a run.")
    parser.add_argument("run_dir", help="the --output_dir of a run, finished or not")
    try:
        print(write_report(parser.parse_args(arguments).run_dir))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
