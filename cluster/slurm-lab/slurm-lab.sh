#!/usr/bin/env bash
# A throw-away, real SLURM on one machine, for tests: three nodes, four GPUs that are links to /dev/null.
#
#   slurm-lab.sh install            Debian packages (root; about 6 s)
#   slurm-lab.sh up                 munged + slurmctld + slurmd per node (about 1 s)
#   slurm-lab.sh env                prints the exports a client needs
#   slurm-lab.sh status | down      'down' ends only processes that 'up' recorded
#
# Nothing outside $LAB is written, and all ports are on loopback. Needs no systemd, no cgroups and no GPU; any user
# may run it (jobs then run as that user).
set -euo pipefail

LAB=${SLURMLAB_DIR:-/tmp/slurm-lab}       # all state lives here; keep it short, unix sockets allow 108 bytes
GPU_NODES=${SLURMLAB_GPU_NODES:-2}        # gpu1..gpuN
GPUS=${SLURMLAB_GPUS_PER_NODE:-2}         # on each
CPUS=${SLURMLAB_CPUS_PER_NODE:-4}         # claimed, not physical
MEM=${SLURMLAB_MEM_MB:-6000}              # claimed MiB per node
PORT0=${SLURMLAB_PORT0:-27000}            # slurmctld; slurmd on the next ones

USER_NAME=$(id -un)
HOST=$(hostname -s)

install() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends munge slurmctld slurmd slurm-client >/dev/null
}

write_conf() {
  mkdir -p "$LAB"/{etc,log,run,state,dev,spool}
  chmod 755 "$LAB" "$LAB"/{etc,log,run,state,dev,spool}
  [ -s "$LAB/etc/munge.key" ] || { umask 077; head -c 128 /dev/urandom > "$LAB/etc/munge.key"; umask 022; }
  chmod 600 "$LAB/etc/munge.key"
  # slurmd sets CUDA_VISIBLE_DEVICES only from a GRES 'File' that is a device
  # node; a link to /dev/null passes that test and needs no root (no mknod)
  for ((g = 0; g < GPUS; g++)); do ln -sfn /dev/null "$LAB/dev/nvidia$g"; done

  cat > "$LAB/etc/gres.conf" <<G
AutoDetect=off
NodeName=gpu[1-$GPU_NODES] Name=gpu File=$LAB/dev/nvidia[0-$((GPUS - 1))]
G

  cat > "$LAB/etc/slurm.conf" <<C
ClusterName=lab
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=$USER_NAME
SlurmdUser=$USER_NAME
AuthType=auth/munge
# a requeued job waits until the credential of its last launch has expired (120 s by default)
AuthInfo=socket=$LAB/run/munge.sock,cred_expire=30
CredType=cred/munge
SlurmctldPort=$PORT0
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd-%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd-%n.log
SlurmdSpoolDir=$LAB/spool/%n
StateSaveLocation=$LAB/state
# no cgroups, no systemd, no MPI, no swapping of the network stack
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$LAB/log/jobcomp.log
# the claimed CPUs/memory override what slurmd sees on this machine
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
GresTypes=gpu
EnforcePartLimits=ALL
ReturnToService=2
KillWait=5
OverTimeLimit=0
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=30
MinJobAge=300
NodeName=gpu[1-$GPU_NODES] NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT0 + 1))-$((PORT0 + GPU_NODES)) CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS State=UNKNOWN
NodeName=cpu1 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT0 + GPU_NODES + 1)) CPUs=$CPUS RealMemory=$MEM State=UNKNOWN
PartitionName=gpu   Nodes=gpu[1-$GPU_NODES] Default=YES MaxTime=1-00:00:00 DefaultTime=00:30:00 State=UP
PartitionName=short Nodes=gpu[1-$GPU_NODES] MaxTime=00:01:00 DefaultTime=00:01:00 State=UP
PartitionName=cpu   Nodes=cpu1 MaxTime=1-00:00:00 DefaultTime=00:30:00 State=UP
PartitionName=paid  Nodes=cpu1 MaxTime=1-00:00:00 DefaultTime=00:30:00 AllowAccounts=physics State=UP
C
}

nodes() { for ((n = 1; n <= GPU_NODES; n++)); do echo "gpu$n"; done; echo cpu1; }

up() {
  export SLURM_CONF=$LAB/etc/slurm.conf
  write_conf
  munged --socket="$LAB/run/munge.sock" --key-file="$LAB/etc/munge.key" \
         --pid-file="$LAB/run/munged.pid" --seed-file="$LAB/state/munge.seed" \
         --log-file="$LAB/log/munged.log" --num-threads=2
  slurmctld -f "$SLURM_CONF" -i
  for n in $(nodes); do slurmd -f "$SLURM_CONF" -N "$n"; done
  # ready = controller answers and every node is idle
  local want; want=$(nodes | wc -l)
  for ((i = 0; i < 150; i++)); do
    alive "$LAB/run/slurmctld.pid" slurmctld || { echo "slurm-lab: slurmctld died" >&2; grep -i fatal "$LAB/log/slurmctld.log" >&2 || true; return 1; }
    [ "$(timeout 5 sinfo -h -N -o '%N %T' 2>/dev/null | sort -u | grep -c ' idle$' || true)" = "$want" ] && return 0
    sleep 0.1
  done
  echo "slurm-lab: nodes not idle after 15 s" >&2; sinfo -N -l >&2 || true; tail -5 "$LAB"/log/*.log >&2; return 1
}

alive() {  # alive PIDFILE NAME - the recorded pid exists and is that program
  local p; [ -s "$1" ] && p=$(<"$1") && [ -r "/proc/$p/cmdline" ] &&
    [[ $(tr '\0' ' ' < "/proc/$p/cmdline") == *"$2"* ]]
}

stop_pid() {  # a zombie has an empty cmdline, so 'alive' is false for it
  alive "$1" "$2" || { rm -f "$1"; return 0; }
  local p; p=$(<"$1")
  kill "$p" 2>/dev/null || true
  for ((i = 0; i < 30; i++)); do alive "$1" "$2" || break; sleep 0.1; done
  alive "$1" "$2" && kill -9 "$p" 2>/dev/null || true
  rm -f "$1"
}

down() {
  export SLURM_CONF=$LAB/etc/slurm.conf
  if alive "$LAB/run/slurmctld.pid" slurmctld; then
    timeout 10 scancel -u "$USER_NAME" 2>/dev/null || true
    for ((i = 0; i < 100; i++)); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
  fi
  for n in $(nodes); do stop_pid "$LAB/run/slurmd-$n.pid" slurmd; done
  stop_pid "$LAB/run/slurmctld.pid" slurmctld
  stop_pid "$LAB/run/munged.pid" munged
}

case "${1:-}" in
  install) install ;;
  up) up ;;
  down) down ;;
  env) echo "export SLURM_CONF=$LAB/etc/slurm.conf" ;;
  status) SLURM_CONF=$LAB/etc/slurm.conf sinfo -N -o '%N %P %T %c %m %G'; SLURM_CONF=$LAB/etc/slurm.conf squeue ;;
  *) sed -n '2,10p' "$0"; exit 2 ;;
esac
