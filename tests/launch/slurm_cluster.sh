#!/bin/bash
# A real SLURM cluster on one Linux machine, by root: every node has its own network, host name, processes, /tmp and
# /dev/shm, so that localhost leads nowhere else, and what lies in another node's memory is out of reach.
#   slurm_cluster.sh up DIR [NODES=2] [CPUS=2]  start it; DIR, on a disk, is its state and the file system of all nodes
#   slurm_cluster.sh crash DIR n2               power cut: all processes of n2 die at once
#   slurm_cluster.sh node DIR n2                start n2 again
#   slurm_cluster.sh down DIR                   stop everything
# $SHARED: further folders below /tmp or /dev/shm, or mounts below DIR, that the nodes shall see.
# Needs Debian's slurmctld, slurmd, slurm-client and munge, and iproute2. One cluster at a time: names are fixed.
set -euo pipefail
command=$1
dir=$(realpath -m "$2")
bridge=slurmci0
network=10.77.0
export SLURM_CONF=$dir/slurm.conf

stop() { # FILE [SIGNAL]: end the process that FILE names, and wait for that
  local pid
  [ -s "$1" ] || return 0
  pid=$(cat "$1")
  rm -f "$1"
  kill "-${2:-TERM}" "$pid" 2>/dev/null || return 0
  for _ in $(seq 100); do
    if [ ! -d "/proc/$pid" ] || grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null; then return 0; fi
    sleep 0.05
  done
}

start_network() { # NODE ADDRESS
  ip netns add "ci-$1" 2>/dev/null || return 0
  ip link add "v-$1" type veth peer name eth0 netns "ci-$1"
  ip link set "v-$1" master $bridge up
  ip -n "ci-$1" addr add "$2/24" dev eth0
  ip -n "ci-$1" link set eth0 up
  ip -n "ci-$1" link set lo up
}

# What a node runs as its first process, whose end is the node's. Shared folders are set aside while /tmp is replaced.
# shellcheck disable=SC2016 # the node's shell expands it
node_init='
  hostname "$node"
  mount --bind "$dir/hosts" /etc/hosts
  kept=$dir/keep/$node
  i=0
  for folder in $shared; do
    i=$((i + 1))
    mkdir -p "$kept/$i"
    mount --bind "$folder" "$kept/$i"
  done
  aside=$(mktemp -d /var/tmp/ci.XXXX)
  mount --rbind "$kept" "$aside"
  mount -t tmpfs tmp /tmp
  mount -t tmpfs shm /dev/shm
  i=0
  for folder in $shared; do
    i=$((i + 1))
    mkdir -p "$folder"
    mount --bind "$aside/$i" "$folder"
  done
  umount -R "$aside"
  rmdir "$aside"
  cd /
  slurmd -D -N "$node" &
  wait'

start_node() { # NODE
  start_network "$1" "$network.${1#n}"
  mkdir -p "$dir/spool/$1" "$dir/keep/$1"
  rm -f "$dir/run/$1.init"
  env dir="$dir" node="$1" shared="$dir ${SHARED:-}" setsid ip netns exec "ci-$1" \
    unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc bash -c "$node_init" \
    </dev/null >"$dir/log/$1.out" 2>&1 &
  local outside=$! init
  for _ in $(seq 100); do
    init=$(tr -d ' ' 2>/dev/null <"/proc/$outside/task/$outside/children" || true)
    if [ -n "$init" ]; then
      echo "$init" >"$dir/run/$1.init"
      return 0
    fi
    sleep 0.02
  done
}

case $command in
  up)
    nodes=${3:-2}
    mkdir -p "$dir"/{state,spool,log,run,keep}
    chmod 755 "$dir"
    printf '127.0.0.1 localhost\n%s.254 ctl\n' $network >"$dir/hosts"
    for i in $(seq "$nodes"); do echo "$network.$i n$i" >>"$dir/hosts"; done
    cat >"$SLURM_CONF" <<END
ClusterName=ci
SlurmctldHost=$(hostname)($network.254)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits: 120 s by default.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=5
JobRequeue=1
# As some sites have it, so that requeueing twice shows.
RequeueExit=85
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=0
NodeName=n[1-$nodes] NodeAddr=$network.[1-$nodes] CPUs=${4:-2} RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 State=UP
END
    echo 'CgroupPlugin=cgroup/v1' >"$dir/cgroup.conf" # nothing here uses cgroups, but slurmd would want them mounted
    echo 'Name=gpu File=/dev/tty[0-1]' >"$dir/gres.conf" # pretended GPUs: sets CUDA_VISIBLE_DEVICES only
    if [ ! -s "$dir/munge.key" ]; then
      head -c 128 /dev/urandom >"$dir/munge.key"
      chmod 400 "$dir/munge.key"
    fi
    ip link add $bridge type bridge 2>/dev/null || true
    ip addr replace $network.254/24 dev $bridge
    ip link set $bridge up
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/run/munged.pid" \
      --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" --num-threads=2
    slurmctld -i
    for i in $(seq "$nodes"); do start_node "n$i"; done
    for _ in $(seq 400); do
      [ "$(sinfo -h -N -p main -t idle -o %N 2>/dev/null | sort -u | wc -l)" != "$nodes" ] || exit 0
      sleep 0.05
    done
    sinfo -N
    tail -n 5 "$dir"/log/*
    exit 1
    ;;
  node)
    start_node "$3"
    for _ in $(seq 400); do
      if sinfo -h -N -p main -n "$3" -o %T | grep -qE '^(idle|allocated|mixed)$'; then exit 0; fi
      sleep 0.05
    done
    exit 1
    ;;
  crash)
    stop "$dir/run/$3.init" KILL
    ;;
  down)
    for file in "$dir"/run/*.init; do stop "$file" KILL; done
    stop "$dir/run/slurmctld.pid"
    stop "$dir/run/munged.pid"
    for folder in "$dir"/spool/*/; do
      node=$(basename "$folder")
      ip link del "v-$node" 2>/dev/null || true
      ip netns del "ci-$node" 2>/dev/null || true
    done
    ip link del $bridge 2>/dev/null || true
    ;;
esac
