"""python -m torch.distributed.run ... tests/helpers/split_model.py CALLS OUT: stages by processes that run one model.

CALLS is a JSON list of [stage, settings]. Each is called in turn by every process, which writes what came of it, the
store's or report's path or the refusal, to OUT.<rank> as a JSON list.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from data.base.errors import UserError


def main(calls: str, out: str) -> None:
    from evaluate.run import evaluate
    from harvest.run import harvest

    dist.init_process_group("gloo")
    outcomes = []
    for stage, settings in json.loads(Path(calls).read_text()):
        try:
            done = harvest(settings) if stage == "harvest" else evaluate(settings)
            outcomes.append(str(done.path))
        except UserError as error:
            outcomes.append(str(error))
    Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
