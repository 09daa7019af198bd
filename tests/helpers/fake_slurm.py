"""Slurm's commands as scripts over a list of jobs that a test changes itself: nothing runs."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

_SBATCH = """#!/bin/sh
cd {folder}
[ -e refuse ] && {{ cat refuse >&2; exit 1; }}
id=$(($(cat last 2>/dev/null || echo 0) + 1)); echo $id > last
cp "$1" script.$id
comment=$(sed -n 's/^#SBATCH --comment=//p' "$1")
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
if [ -z "$last" ]; then echo "$id|$(cat state)|Priority|$comment" >> queue
else for i in $(seq 0 "$last"); do echo "${{id}}_$i|$(cat state)|Priority|$comment" >> queue; done; fi
echo "Submitted batch job $id"
"""
_SQUEUE = """#!/bin/sh
[ -e {folder}/silent ] && {{ echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }}
cat {folder}/queue
"""


class FakeSlurm:
    """The jobs by id; `PATH` must begin with `folder` for its commands to be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "queue").write_text("")
        self.begin_as("PENDING")
        self._script("sbatch", _SBATCH)
        self._script("squeue", _SQUEUE)
        self._script("srun", "#!/bin/sh\nexit 1\n")
        self._script("scancel", '#!/bin/sh\necho "$@" >> {folder}/cancelled\n')
        self.nodes(socket.gethostname())

    @property
    def path(self) -> str:
        """A PATH with nothing else but the shell's own commands and this Python."""
        return os.pathsep.join([str(self.folder), str(Path(sys.executable).parent), "/usr/bin", "/bin"])

    def _script(self, name: str, text: str) -> None:
        script = self.folder / name
        script.write_text(text.format(folder=self.folder))
        script.chmod(0o755)

    def nodes(self, *hosts: str) -> None:
        self._script("sinfo", f"#!/bin/sh\necho '{' '.join(hosts)}'\n")

    def begin_as(self, state: str) -> None:
        """Choose the state of the jobs that are submitted from now on."""
        (self.folder / "state").write_text(state)

    def refuse(self, words: str) -> None:
        """Let sbatch refuse everything."""
        (self.folder / "refuse").write_text(words)

    def silent(self, now: bool) -> None:
        """Let the controller be unreachable, or reachable again."""
        if now:
            (self.folder / "silent").touch()
        else:
            (self.folder / "silent").unlink()

    def jobs(self) -> dict[str, str]:
        """The state of each job."""
        lines = (self.folder / "queue").read_text().splitlines()
        return {job: state for job, state, *_ in (line.split("|") for line in lines)}

    def become(self, job: str, state: str | None) -> None:
        """Change a job's state; None: the queue lists it no more."""
        lines = (self.folder / "queue").read_text().splitlines()
        changed = []
        for line in lines:
            name, _, reason, comment = line.split("|")
            if name != job:
                changed.append(line)
            elif state is not None:
                changed.append(f"{name}|{state}|{reason if state == 'PENDING' else 'None'}|{comment}")
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in changed))

    def script(self, number: int) -> str:
        """The batch script of a submission."""
        return (self.folder / f"script.{number}").read_text()

    def cancelled(self) -> list[str]:
        """The jobs that were cancelled."""
        path = self.folder / "cancelled"
        return path.read_text().split() if path.exists() else []
