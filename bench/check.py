"""Writes the report of ``python -m deberta_fast check`` as text and JSON, one dtype after the other.

Run ``python -m bench.check``; its exit status is that of the command.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from deberta_fast.selfcheck import check

from . import timing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"])
    parser.add_argument("--quick", action="store_true", help="few problems, no times")
    parser.add_argument("--name", default="check", help="of the two files")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=timing.results_folder(), metavar="DIR", help="folder of results")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    texts, records, passed = [], {}, True
    for name in options.dtypes:
        dtype = (getattr(torch, name),)
        start = time.perf_counter()
        report = check(options.device, dtypes=dtype, quick=options.quick)
        print(report, flush=True)
        texts.append(str(report))
        records[name] = report.as_dict() | {"seconds": time.perf_counter() - start}
        passed = passed and report.passed
        (options.out / f"{options.name}.txt").write_text("\n\n".join(texts) + "\n")
        record = {"provenance": timing.provenance(), "reports": records}
        (options.out / f"{options.name}.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
