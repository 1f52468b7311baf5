# What every node of a cluster has to know; sourced by hpc.yaml, setup.sh and slurm.sh. Bash.
#
# CHANGE THESE for your site. What is already in the environment wins over what is written here.

# A folder that every node sees under the same path (NFS, Lustre, BeeGFS, ...), with room for checkpoints:
export STEMTUNE_SHARED="${STEMTUNE_SHARED:-/shared/stemtune}"

# Where MLflow's records go. A file is enough for one user: the head node writes it, in a Slurm array the first node
# of each task, which needs file locks that work on the shared folder. For several users, or many tasks, a server:
#   http://mlflow.example.org:5000    name and password stand in ~/.mlflow/credentials (mode 600), never here
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-sqlite:///$STEMTUNE_SHARED/mlflow.db}"

# The Python environment. Under `ray up` setup.sh makes one on each node where none is; one that is there (a shared one,
# say, or a container's) is used as it is. Under Slurm nothing makes one: do it once by hand (`make install VENV=...`) on
# storage that all nodes see, and name it here:
export STEMTUNE_VENV="${STEMTUNE_VENV:-$HOME/stemtune-venv}"

# More options of `ray start` on every node, --num-cpus=16 for instance:
export STEMTUNE_RAY_OPTIONS="${STEMTUNE_RAY_OPTIONS:-}"

# The network device between the nodes, where a node's name leads to 127.0.0.1 or to a slower network (`ip address`
# shows them); data-parallel workers on two nodes then wait for each other for ever without these lines:
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_SOCKET_IFNAME=ib0

# --- the rest is the same everywhere ------------------------------------------------------------------------------

# Sweeps live on the shared folder: every node writes its trials' checkpoints there.
export STEMTUNE_SWEEPS="${STEMTUNE_SWEEPS:-$STEMTUNE_SHARED/sweeps}"

# Without the token in ~/.ray/auth_token (or RAY_AUTH_TOKEN_PATH) nobody can connect to this Ray.
export RAY_AUTH_MODE=token

# The code that was sent to this node comes before any other stemtune.
STEMTUNE_SRC="${STEMTUNE_SRC:-$HOME/stemtune-src}"
export PYTHONPATH="$STEMTUNE_SRC"
export PATH="$STEMTUNE_VENV/bin:$PATH"
export PYTHONDONTWRITEBYTECODE=1 RAY_USAGE_STATS_ENABLED=0
