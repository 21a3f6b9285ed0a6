"""Runs on clusters, through nemo-run's executors: local, Slurm, Kubernetes (KubeRay) and SkyPilot.

settings      what a cluster is, from a file
job           what is to run, on how many nodes
attempt       runs inside the job: one attempt at the training, and how it ended
scripts       the shell around an attempt: Ray on every node, secrets by reference
local, slurm, kubernetes, skypilot      one backend each: preview, submit, poll, log
follow        submit, show the log, submit again until the run is finished
"""
