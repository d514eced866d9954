"""A training as a job of many processes: errors, signals, logs, checkpoints, the watchdog."""
