"""A real Slurm on the hosts of `hosts.py`: munge and slurmd on each, slurmctld on the first, two partitions.

`low` gives its nodes up to jobs of `high`, which requeues what ran there after a grace time. By hand (as root):

    python tests/cluster/slurm.py 2            # starts it, says how to log in, and waits for Ctrl-C
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import hosts
from hosts import Host, Hosts

DAEMONS = ("slurmctld", "slurmd", "munged")
PLACES = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

SLURM_CONF = """\
ClusterName=test
SlurmctldHost=node1
AuthType=auth/munge
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
StateSaveLocation={folder}/slurm/state
SlurmdSpoolDir={folder}/slurm/spool-%n
SlurmctldLogFile={folder}/slurm/slurmctld.log
SlurmdLogFile={folder}/slurm/slurmd-%n.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmctldTimeout=300
SlurmdTimeout=300
MessageTimeout=60
KillWait=60
JobRequeue=1
NodeName=node[1-{count}] CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=300 PreemptMode=REQUEUE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str:
    """Return why Slurm cannot be started here, or an empty string."""
    absent = [name for name in DAEMONS if not shutil.which(name, path=PLACES)]
    if absent:
        return f"{', '.join(absent)} is not installed (apt-get install slurm-wlm munge)"
    return hosts.missing()


def start(made: Hosts) -> None:
    """Start munge and Slurm on the hosts and wait until every node is idle."""
    folder = made.folder / "slurm"
    (folder / "state").mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for host in made.hosts:
        (host.folder / "etc" / "slurm").mkdir(exist_ok=True)
        (folder / f"spool-{host.name}").mkdir()
        text = SLURM_CONF.format(folder=made.folder, count=len(made.hosts))
        host.enter(f"mkdir -p /etc/slurm && cat >/etc/slurm/slurm.conf <<'END'\n{text}END")
        host.enter(
            "mkdir -p /run/munge && chmod 755 /run/munge && exec munged --force"
            f" --key-file={key} --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/munged.pid"
            f" --seed-file={folder}/munge-{host.name}.seed --log-file={folder}/munge-{host.name}.log"
        )
    made.hosts[0].enter("PATH=$PATH:/usr/sbin; slurmctld")
    for host in made.hosts:
        host.enter(f"PATH=$PATH:/usr/sbin; slurmd -N {host.name}")
    _wait_idle(made.hosts[0], len(made.hosts), folder)


def _wait_idle(host: Host, count: int, folder: Path) -> None:
    seen = ""
    for _ in range(120):
        seen = host.enter("sinfo -h -p low -N -o %T", check=False).stdout
        if seen.split() == ["idle"] * count:
            return
        time.sleep(1)
    logs = "".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
    raise RuntimeError(f"Slurm's nodes are {seen.split()}: {logs}")


def main() -> int:
    """Start Slurm and keep it until Ctrl-C."""
    reason = missing()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Hosts(int(sys.argv[1]) if len(sys.argv) > 1 else 2) as made, contextlib.suppress(KeyboardInterrupt):
        start(made)
        print(made.hosts[0].enter("sinfo; srun -N$(sinfo -h -p low -o %D) hostname").stdout)
        print(
            f"ssh -i {made.key} root@{made.hosts[0].address}    # then sbatch, squeue; Ctrl-C here ends all", flush=True
        )
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
