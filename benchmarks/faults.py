"""Faults that people's files, habits and machines bring out: kinds, tries, and what came of them; all zero expected.

python -m benchmarks faults                        # all kinds, as many tries as docs/figures.md says: half an hour
python -m benchmarks faults --short                # a few of each, in half a minute
python -m benchmarks faults --kind kills --tries 50 --seed 3
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

from benchmarks._measure import RESULTS, finish, parser, table
from stages.config import ROOT

KINDS = {"kills": (200, 1), "damage": (150, 1), "settings": (500, 3), "checkpoints": (0, 3), "pictures": (0, 1)}
ENVIRONMENT = {  # as stages have it; a fork cannot change it any more
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--kind", choices=tuple(KINDS), action="append", help="only this; may be given again")
    options.add_argument("--tries", type=int, help="of each kind; 0: all that there are")
    options.add_argument("--short", action="store_true", help="a few of each kind")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--keep", action="store_true", help="leave the scratch folder")
    given = options.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.chdir(ROOT)
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks", "faults", *sys.argv[1:]], os.environ | ENVIRONMENT
        )
    from benchmarks._faults import checkpoint, common, warm

    scratch = RESULTS / f"faults-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    model = given.checkpoint or checkpoint.write(scratch / "checkpoint")
    warm.preload(Path(model))
    tallies = []
    for kind in given.kind or KINDS:
        whole, few = KINDS[kind]
        tries = given.tries if given.tries is not None else few if given.short else whole
        begin = time.monotonic()
        bench = common.Bench(scratch / kind, Path(model), Random(f"{kind} {given.seed}"), tries)
        bench = replace(bench, variants=("tiles",)) if given.short else bench
        tallies.append(importlib.import_module(f"benchmarks._faults.{kind}").run(bench))
        print(f"{kind}: {tallies[-1].tries} tries in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    table(("kind", "tries", *common.FAULTS), [(t.kind, t.tries, *map(t.count, common.FAULTS)) for t in tallies])
    checks = {f"{tally.kind}: {tally.tries} tries, no fault": not tally.faults for tally in tallies}
    result = [{"kind": tally.kind, "tries": tally.tries, "faults": tally.faults} for tally in tallies]
    if not given.keep and all(checks.values()):
        shutil.rmtree(scratch, ignore_errors=True)
    return finish("faults", result, checks)


if __name__ == "__main__":
    sys.exit(main())
