"""Runs on clusters, through nemo-run's executors: local, Slurm, Kubernetes (KubeRay) and SkyPilot.

settings      what a cluster is, from a file
job           what is to run, on how many nodes
scripts       the shell around an attempt (`megatron_coreward.attempt`): Ray on every node, secrets by reference
local, slurm, kubernetes, skypilot      one backend each: preview, submit, poll, log
supervise     submit, show the log, submit again until the run is finished
"""
