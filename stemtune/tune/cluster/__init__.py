"""Ray clusters: joining one, checking its nodes, and spreading work over it."""

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # a report waits that long for the controller to look, 2 s by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",  # a trial that waits for its turn waits quietly
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
"""Set in every process of a sweep; one environment for all lets Ray reuse the processes it started ahead."""
