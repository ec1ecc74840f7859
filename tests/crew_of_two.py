"""One of two processes that train together by torch.distributed alone: what Ray Train's result is compared with.

    python tests/crew_of_two.py JOB.json RANK MEETING_FILE OUT.json

The job's tiles must be there already. Rank 0 writes the epochs, and the weights beside them as safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import distributed

from slideflow_ray.train.checkpoint import result_json
from slideflow_ray.train.crew import Crew
from slideflow_ray.train.job import card_of, prepare
from slideflow_ray.train.loop import fit
from slideflow_ray.train.spec import TrainJob


def main(job_file: str, rank: str, meeting: str, out: str) -> None:
    job = TrainJob.model_validate_json(Path(job_file).read_text())
    if rank == "1":  # one at a time: a run holds the output folder
        while not Path(f"{meeting}.ready").exists():
            pass
    data = prepare(job)
    Path(f"{meeting}.ready").touch()
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2)
    found = fit(card_of(job), job.fit, data.source("train"), data.source("val"), crew=Crew(int(rank), 2))
    distributed.barrier()
    distributed.destroy_process_group()
    if rank == "0":
        epochs = [{key: value for key, value in result_json(r).items() if key != "seconds"} for r in found.history]
        Path(out).write_text(json.dumps(epochs))
        save_file(found.state_dict, Path(out).with_suffix(".safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
